"""The planner: which units of all layers together are worth their cost under a budget.

Every group offers options (how many units to keep, the most important first), each with its costs
and a loss of importance. Choosing one option per group under the budget's limits is the
multiple-choice knapsack problem; see `hfprune.planning.knapsack`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

import numpy as np
import torch
from transformers import PreTrainedModel

from hfprune.errors import BudgetError, HfpruneError, expect
from hfprune.importance.scores import Scores
from hfprune.planning.budget import Budget
from hfprune.planning.constraints import Constraints
from hfprune.planning.knapsack import Choice, Ints, choose
from hfprune.planning.latency import LatencyTable
from hfprune.planning.offers import Offer, offer, tied
from hfprune.planning.plan import PruningPlan, Spending
from hfprune.planning.resources import Meter, meter
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.cost import Selection, Tokens, tokens_of

_TIE = 1e-12
"""What using all of the room is worth, relative to all importance: it decides between equally
important choices, for the dearest.
"""


def plan(
    model: PreTrainedModel,
    scores: Scores,
    budget: str | Budget | Sequence[str],
    criterion: str = "reconstruction",
    constraints: Constraints | None = None,
    tokens: int | Sequence[int] | None = None,
    latency: LatencyTable | None = None,
) -> PruningPlan:
    """Choose what to keep of a model under a budget.

    Args:
        model: the model that was scored.
        scores: from `hfprune.score`.
        budget: "macs=50%" or "params=0.6", the share of the layers' cost to keep; or several such
            limits, "macs=50%, params=60%". No limit is exceeded, and the spending is within the
            constraints' tolerance below one of them. "memory=400MB@1x128" and
            "memory=60%@1x128" limit the bytes of the whole model's weights and of its key-value
            cache, of 1 example of 128 tokens here; without an @, of one example of `tokens`, of the
            longest stack's.
            "latency=8ms@1x128" and "latency=60%@1x128" limit the time of the whole model's forward
            pass on this machine.
        criterion: by which importance.
        constraints: floors, granularity, and what must stay; by default one head and one neuron per
            layer at least.
        tokens: length of the example whose MACs are counted, or one for each stack of layers, such
            as encoder and decoder; by default the calibration data's means.
        latency: from `hfprune.measure_latency`, for a budget of latency; by default it is measured
            now, which takes seconds to minutes. A table that is read back plans for the machine
            that it was measured on.

    Raises:
        BudgetError: no structure meets the budget; the message names the nearest that one can.
        HfpruneError: the scores are of a model of another structure (of other weights there is a
            warning), the criterion was not scored, `tokens` are less than 1, or the constraints or
            the latency table do not fit the model.
    """
    return plan_family(model, scores, [budget], criterion, constraints, tokens, latency)[0]


def plan_family(
    model: PreTrainedModel,
    scores: Scores,
    budgets: str | Budget | Sequence[str | Budget | Sequence[str]],
    criterion: str = "reconstruction",
    constraints: Constraints | None = None,
    tokens: int | Sequence[int] | None = None,
    latency: LatencyTable | None = None,
) -> list[PruningPlan]:
    """Plans for several budgets, nested: a smaller plan keeps a subset of what a larger one keeps.

    So the models of a family can be made one from the other, and a user who moves from one to the
    next loses units only. The largest is planned as `plan` would; each smaller one chooses among
    the units of the one before, which may cost it a little importance: its `gap` says how much.

    Args:
        model: the model that was scored.
        scores: from `hfprune.score`.
        budgets: in any order, such as ["macs=80%", "macs=60%", "macs=40%"]; all limit the same
            resources, and of any two one is the smaller by every limit. A text, or a
            `Budget`, is a single one.
        criterion: by which importance.
        constraints: of all plans.
        tokens: as for `plan`.
        latency: as for `plan`; measured once.

    Returns:
        A plan per budget, in the order given.

    Raises:
        BudgetError: no structure meets a budget, or the budgets are not of one kind.
        HfpruneError: as `plan`.
    """
    anatomy = Anatomy.of(model)
    constraints = Constraints() if constraints is None else constraints
    expect(scores, Scores, "scores", "what hfprune.score returns")
    expect(constraints, Constraints, "constraints", "hfprune.Constraints")
    if latency is not None:
        expect(latency, LatencyTable, "latency", "a table of hfprune.measure_latency")
    scores.check_model(model, anatomy)
    constraints.check(model)
    importance = scores.by(criterion)
    parts = (*anatomy, *(anatomy.experts if constraints.experts else ()))
    if missing := [part.name for part in parts if part.name not in importance]:
        raise HfpruneError(
            f"These scores hold nothing for {missing[0]}: they were measured by an hfprune that did"
            " not know such units. Score this model again."
        )
    expect(budgets, (str, Budget, Sequence), "budgets", "one such as 'macs=50%', or several")
    each = [budgets] if isinstance(budgets, str | Budget) else budgets
    asked = [Budget.parse(budget) for budget in each]
    falling = _falling(asked)
    _check_tokens(tokens)
    lengths = tokens_of(anatomy, scores.tokens if tokens is None else tokens)
    meters = [meter(limit, model, anatomy, lengths, latency) for limit in asked[falling[0]].limits]
    solved = functools.partial(
        solve,
        anatomy,
        importance,
        meters=meters,
        criterion=criterion,
        constraints=constraints,
        tokens=lengths,
    )
    made: dict[int, PruningPlan] = {}
    larger: PruningPlan | None = None
    for number in falling:
        larger = _nested(solved, asked[number], importance, larger, constraints.tolerance)
        made[number] = larger
    return [made[number] for number in range(len(asked))]


def _check_tokens(tokens: int | Sequence[int] | None) -> None:
    each = tokens if isinstance(tokens, Sequence) else [1 if tokens is None else tokens]
    if not all(_is_count(count) for count in each):
        raise HfpruneError(
            f"tokens must be 1 or more, not {tokens!r}: give a whole number, or one for each stack"
            " of layers."
        )


def _is_count(value: object) -> bool:
    """Whether it is a whole number of 1 or more; True, which equals 1, is a slip."""
    if not isinstance(value, Real) or value is True:
        return False
    return float(value) >= 1 and float(value).is_integer()


def _nested(
    solved: Callable[..., PruningPlan],
    budget: Budget,
    importance: Mapping[str, torch.Tensor],
    larger: PruningPlan | None,
    tolerance: float,
) -> PruningPlan:
    """The best plan for a budget that keeps nothing but what a larger plan keeps."""
    if larger and larger.meets(budget, tolerance):
        return dataclasses.replace(larger, budget=budget)
    alone = solved(budget)
    if larger is None or alone.is_within(larger):
        return alone
    try:
        nested = solved(budget, within=larger.keep)
    except BudgetError as error:
        raise BudgetError(
            f"Among what {larger.budget} keeps, because a family is nested: {error} By itself"
            f" {budget} can be met."
        ) from error
    total, cost = 0.0, 0.0
    for group in nested.anatomy:
        values = importance[group.name].double()
        total += float(values.sum())
        cost += float(values[list(alone.keep[group.name])].sum())
        cost -= float(values[list(nested.keep[group.name])].sum())
    return dataclasses.replace(nested, gap=alone.gap + max(0.0, cost) / (total or 1.0))


def _falling(budgets: Sequence[Budget]) -> list[int]:
    """Numbers of the budgets, the largest first.

    Raises:
        BudgetError: they are none, of different resources, or of two neither is the smaller.
    """
    if not budgets:
        raise BudgetError("A family needs one budget at least, such as macs=50%.")
    amounts = [[limit.amount for limit in budget.limits] for budget in budgets]
    order = sorted(range(len(budgets)), key=lambda n: amounts[n], reverse=True)
    for larger, smaller in pairwise(order):
        kinds = [
            [(limit.resource, limit.absolute, limit.shape) for limit in budgets[n].limits]
            for n in (larger, smaller)
        ]
        pairs = zip(amounts[larger], amounts[smaller], strict=False)
        if kinds[0] != kinds[1] or not all(more >= less for more, less in pairs):
            raise BudgetError(
                f"{budgets[larger]} and {budgets[smaller]} cannot be of one family: its budgets"
                " limit the same resources in the same order, and a smaller one is smaller by every"
                " limit."
            )
    return order


def solve(
    anatomy: Anatomy,
    importance: Mapping[str, torch.Tensor],
    budget: Budget,
    meters: Sequence[Meter],
    *,
    criterion: str,
    constraints: Constraints,
    tokens: Tokens,
    within: Selection | None = None,
) -> PruningPlan:
    """The plan that keeps the most importance under a budget, counted by one meter per limit.

    It chooses among the units of `within` only, if that is given. See `plan`.
    """
    among = anatomy.everything | dict(within or {})
    blocks = _kept_blocks(anatomy, importance, constraints)
    stay = {stack.stack: blocks.get(stack.name, range(stack.units)) for stack in anatomy.stacks}
    offers = [
        offer(group, importance[group.name], among[group.name], meters, constraints)
        for group in anatomy
        if group.layer in stay[group.stack]
    ]
    together = tied(offers) if constraints.uniform else [[n] for n in range(len(offers))]
    account = _Account.of(budget, meters, blocks, offers)
    total = sum(float(importance[g.name].sum()) for g in anatomy) or 1.0
    choice = Choice([own.largest for own in offers], 0.0, [0.0] * len(meters))
    keep = _left(anatomy, blocks, offers, choice)
    spent = account.spent(keep)
    if (spent > account.limits).any():
        account.check_reachable(offers, constraints)
        choice = _choose(offers, together, account, constraints.tolerance, _TIE * total)
        keep = _left(anatomy, blocks, offers, choice)
        spent = account.spent(keep)
    account.check_met(spent, constraints)
    prices = np.array(choice.prices)
    lost, margins = dict.fromkeys(anatomy.everything, 1.0), {}
    for own, option in zip(offers, choice.picks, strict=True):
        whole = max(float(importance[own.group.name].sum()), 1e-300)
        # A sum in another order can be a little negative.
        lost[own.group.name] = max(0.0, float(own.loss[option]) / whole)
        if prices.any():
            margins[own.group.name] = own.margin(option, prices)
    return PruningPlan(
        anatomy,
        keep,
        budget,
        criterion,
        tokens,
        lost,
        choice.gap / total,
        uniform=constraints.uniform,
        margins=margins,
        spending=tuple(
            Spending(int(before), int(after), float(price * before / 100 / total))
            for before, after, price in zip(account.dense, spent, prices, strict=True)
        ),
    )


def _left(
    anatomy: Anatomy,
    blocks: Mapping[str, tuple[int, ...]],
    offers: Sequence[Offer],
    choice: Choice,
) -> dict[str, tuple[int, ...]]:
    """The selection that a choice leaves; groups without an offer lose all."""
    left = {own.group.name: own.units(i) for own, i in zip(offers, choice.picks, strict=True)}
    return {**blocks, **{group.name: () for group in anatomy}, **left}


def _choose(
    offers: Sequence[Offer],
    together: Sequence[Sequence[int]],
    account: _Account,
    tolerance: float,
    tie: float,
) -> Choice:
    """The option of each offer, the same of those together; using all of the room is worth `tie`,
    in importance.
    """
    costs = [np.sum([offers[n].cost for n in numbers], axis=0) for numbers in together]
    losses = [np.sum([offers[n].loss for n in numbers], axis=0) for numbers in together]
    room = account.limits - account.fixed
    unit = tie / np.maximum(np.abs(room), 1) / len(room)
    losses = [
        loss + (cost.max(axis=0) - cost) @ unit for cost, loss in zip(costs, losses, strict=True)
    ]
    floors = account.least_spent(tolerance) - account.fixed
    choice = choose(costs, losses, room.tolist(), floors.tolist())
    if choice is None:
        raise account.at_odds(costs)
    picks = {n: i for numbers, i in zip(together, choice.picks, strict=True) for n in numbers}
    return choice._replace(picks=[picks[n] for n in range(len(offers))])


@dataclass(frozen=True)
class _Account:
    """What the limits of a budget allow, what is spent whatever is chosen, and what all costs.

    Attributes:
        dense, limits, fixed: (limits,) in the meters' whole numbers.
    """

    budget: Budget
    meters: Sequence[Meter]
    dense: Ints
    limits: Ints
    fixed: Ints

    @staticmethod
    def of(
        budget: Budget, meters: Sequence[Meter], keep: Selection, offers: Sequence[Offer]
    ) -> _Account:
        dense = np.array([meter.of_all({}) for meter in meters])
        limits = [n.of(int(all_)) for n, all_ in zip(budget.limits, dense, strict=True)]
        # What has no choice stays as it is: a stack that loses no heads shares its tables (t5).
        least = {own.group.name: own.units(0) if len(own.kv) == 1 else () for own in offers}
        groups = [own.group for own in offers]
        sizes = [(g, len(least[g.name]), len(g.kv_of(least[g.name]))) for g in groups]
        fixed = [
            meter.of_all({**keep, **least}) - sum(meter.of_group(*size) for size in sizes)
            for meter in meters
        ]
        return _Account(budget, meters, dense, np.array(limits), np.array(fixed))

    def spent(self, keep: Selection) -> Ints:
        """What a selection costs."""
        return np.array([meter.of_all(keep) for meter in self.meters])

    def check_reachable(self, offers: Sequence[Offer], constraints: Constraints) -> None:
        """Refuse a limit below what the constraints leave.

        Raises:
            BudgetError: names the least of each such limit.
        """
        least = self.fixed + sum(own.cost.min(axis=0) for own in offers)
        if (least > self.limits).any():
            raise BudgetError(
                f"No structure keeps only {self.budget}: with at least {constraints.min_heads}"
                f" heads and {constraints.min_neurons} neurons in every layer{_whole(constraints)},"
                f" the least is {self._asked_for(least, least > self.limits)}."
            )

    def at_odds(self, costs: Sequence[Ints]) -> BudgetError:
        """Of limits that can be met, but not together: how far each must be relaxed by itself.

        Args:
            costs: per group, (options, limits) what each option costs.
        """
        least = self.fixed.copy()
        found = [False] * len(least)
        for n in range(len(least)):
            room = self.limits - self.fixed
            room[n] = sum(int(cost[:, n].max()) for cost in costs)
            shares = [cost[:, n] / max(1, room[n]) for cost in costs]
            if choice := choose(costs, shares, room.tolist()):
                least[n] += sum(int(c[i, n]) for c, i in zip(costs, choice.picks, strict=True))
                found[n] = True
        nearest = f" The least of each, where the others hold: {self._asked_for(least, found)}."
        return BudgetError(
            f"No structure was found that meets all limits of {self.budget} at once; relax one of"
            f" them.{nearest if any(found) else ''}"
        )

    def least_spent(self, tolerance: float) -> Ints:
        """What must be spent of one limit at least, so that the budget counts as met."""
        return np.ceil(self.limits * (1 - tolerance)).astype(np.int64)

    def check_met(self, spent: Ints, constraints: Constraints) -> None:
        """Refuse to stay far below every limit.

        Raises:
            BudgetError: names the nearest below.
        """
        if (spent >= self.least_spent(constraints.tolerance)).any():
            return
        if (spent >= self.dense).all():
            raise BudgetError(
                f"Nothing needs to go for {self.budget}: the dense model keeps"
                f" {self._asked_for(spent)}. Ask for less."
            )
        coarse = {
            "round_to": constraints.round_to > 1,
            "layers": constraints.layers is not None,
            "experts": constraints.experts is not None,
            "uniform": constraints.uniform,
        }
        relaxed = ", ".join(name for name, given in coarse.items() if given) or "tolerance"
        raise BudgetError(
            f"{self.budget} cannot be met within {constraints.tolerance:.0%}: the nearest below is"
            f" {self._asked_for(spent)}. Ask for that, or relax {relaxed}."
        )

    def _asked_for(self, amounts: Ints, which: Sequence[bool] | None = None) -> str:
        """The budget that allows just these amounts, of all limits or of some."""
        return ", ".join(
            str(limit.allowing(int(amount), int(all_)))
            for n, (limit, amount, all_) in enumerate(
                zip(self.budget.limits, amounts, self.dense, strict=True)
            )
            if which is None or which[n]
        )


def _kept_blocks(
    anatomy: Anatomy, importance: Mapping[str, torch.Tensor], constraints: Constraints
) -> dict[str, tuple[int, ...]]:
    """{stack path: layers that stay}, of the stacks that lose any; {experts: those that stay}, of
    the layers that stay and lose any.
    """
    kept = {}
    for stack in anatomy.stacks:
        stay = constraints.layers_that_stay(stack)
        if constraints.layers is None or max(constraints.layers, len(stay)) >= stack.units:
            continue
        worth = [0.0] * stack.units
        for group in anatomy:
            if group.stack == stack.stack:
                worth[group.layer] += float(importance[group.name].sum())
        rest = sorted(set(range(stack.units)) - stay, key=lambda n: -worth[n])
        kept[stack.name] = tuple(sorted([*stay, *rest[: constraints.layers - len(stay)]]))
    layers = {stack.stack: kept.get(stack.name, range(stack.units)) for stack in anatomy.stacks}
    for block in anatomy.experts:
        fewer = constraints.experts is not None and constraints.experts < block.units
        if fewer and block.layer in layers[block.stack] and not constraints.protects(block):
            best = importance[block.name].argsort(descending=True, stable=True)
            kept[block.name] = tuple(sorted(best[: constraints.experts].tolist()))
    return kept


def _whole(constraints: Constraints) -> str:
    return f" and all of {', '.join(constraints.protect)}" if constraints.protect else ""
