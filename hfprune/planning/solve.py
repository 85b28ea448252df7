"""The planner: which units of all layers together are worth their cost under a budget.

Every group offers options (how many units to keep, the most important first), each with a cost and
a loss of importance. Choosing one option per group under one budget is the multiple-choice knapsack
problem (Kellerer, Pferschy and Pisinger 2004, chapter 11). It is solved in two steps: the
Lagrangian relaxation gives a price per unit of cost, a feasible plan and a bound; then dynamic
programming over the few options that the bound cannot exclude is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from hfprune.errors import BudgetError, HfpruneError, unknown
from hfprune.importance.scoring import Scores
from hfprune.planning.budget import Budget
from hfprune.planning.plan import PruningPlan
from hfprune.structure.anatomy import Anatomy, Block, Group
from hfprune.structure.checkpoint import stock_settings
from hfprune.structure.cost import group_macs, group_params, layers_macs, layers_params

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_MOST_STATES = 200_000


@dataclass(frozen=True)
class Constraints:
    """What a plan must respect besides its budget.

    Attributes:
        min_heads: query heads that every attention keeps at least; a number above all that there
            are keeps every head.
        min_neurons: neurons that every FFN keeps at least.
        round_to: FFN widths are multiples of this (8, 32, 64 suit tensor cores); a group may keep
            all of its neurons.
        tolerance: the budget is met to this share of it, or it is an error.
        uniform: all layers of a stack keep equally many heads, in equally many KV groups, and
            equally many neurons. The family's own config then holds the structure, and plain
            `AutoModel.from_pretrained` loads the pruned model.
        protect: names of groups, layers or whole stacks whose units all stay, as `inspect` prints
            them: "encoder.layer.0", or "encoder" to prune only the decoder of a model with both.
            The budget stays a share of all layers.
        layers: how many layers every stack keeps, a protected stack aside; None for all. Those of
            the greatest importance stay: a layer's is the sum over its heads and neurons.
        experts: how many routed experts every layer keeps, those of the greatest importance; None
            for all. A token is sent to as many as before: parameters go, MACs do not.
    """

    min_heads: int = 1
    min_neurons: int = 1
    round_to: int = 1
    tolerance: float = 0.01
    uniform: bool = False
    protect: tuple[str, ...] = ()
    layers: int | None = None
    experts: int | None = None

    def __post_init__(self) -> None:
        if min(self.min_heads, self.min_neurons) < 0 or self.round_to < 1 or self.tolerance <= 0:
            raise HfpruneError(
                "min_heads and min_neurons must be 0 or more, round_to 1 or more, tolerance above"
                f" 0: {self}."
            )
        if self.layers is not None and self.layers < 1:
            raise HfpruneError(f"layers must be 1 or more, not {self.layers}.")
        if self.uniform and not (self.min_heads and self.min_neurons):
            raise HfpruneError(
                "uniform needs min_heads and min_neurons of 1 or more: a stock config cannot hold"
                " a layer without heads or neurons."
            )

    def check(self, model: PreTrainedModel) -> None:
        """Refuse constraints that do not fit a model; for before anything is trained or scored.

        Raises:
            HfpruneError: `protect` names nothing in the model or more layers than may stay,
                `experts` are fewer than a token is sent to, or `uniform` asks for what the family's
                own config cannot hold.
        """
        anatomy = Anatomy.of(model)
        layers = [f"{stack.name}.{n}" for stack in anatomy.stacks for n in range(stack.units)]
        names = {*layers, *(part.name for part in (*anatomy, *anatomy.experts))}
        for name in self.protect:
            if not any(_lies_in(known, name) for known in names):
                stacks = {stack.name for stack in anatomy.stacks}
                raise HfpruneError(unknown("name in protect", name, names | stacks))
        for stack in anatomy.stacks:
            self.layers_that_stay(stack)
        if self.experts is not None:
            self._check_experts(anatomy, self.experts)
        for group in anatomy if self.uniform else ():
            floor = self.min_heads if group.kind == "head" else self.min_neurons
            if (
                floor < group.units
                and not self.protects(group)
                and not stock_settings(model, group)
            ):
                raise HfpruneError(
                    f"uniform: the config of a {anatomy.model_type} cannot hold fewer"
                    f" {group.kind}s, as in {group.name}. Keep them all with"
                    f" min_{group.kind}s={group.units}, or plan without uniform."
                )

    def _check_experts(self, anatomy: Anatomy, count: int) -> None:
        if not anatomy.experts:
            raise HfpruneError(f"A {anatomy.model_type} has no routed experts to keep.")
        if self.uniform and len({self.protects(block) for block in anatomy.experts}) > 1:
            raise HfpruneError(
                "uniform: the experts of some layers are protected, and of others not. Protect all"
                " layers of the stack or none, or plan without uniform."
            )
        for block in anatomy.experts:
            if count < block.least:
                raise HfpruneError(
                    f"experts must be {block.least} or more, not {count}: the router of"
                    f" {block.name} sends every token to {block.least}."
                )

    def layers_that_stay(self, stack: Block) -> set[int]:
        """The layers of a stack that no plan may drop.

        Raises:
            HfpruneError: they are more than `layers`, and not all that there are.
        """
        names = [(n, f"{stack.name}.{n}") for n in range(stack.units)]
        stay = {*stack.pinned} | {
            n for n, name in names for p in self.protect if _lies_in(name, p) or _lies_in(p, name)
        }
        if self.layers is not None and self.layers < len(stay) < stack.units:
            raise HfpruneError(
                f"{stack.name}: only {self.layers} layers are to stay, but layers"
                f" {', '.join(map(str, sorted(stay)))} must."
            )
        return stay

    def protects(self, group: Group | Block) -> bool:
        """Whether all units of a group, or all experts of a layer, must stay."""
        return any(_lies_in(group.name, name) for name in self.protect)


def _lies_in(name: str, prefix: str) -> bool:
    """Whether a module path is another one or lies below it."""
    return name == prefix or name.startswith(f"{prefix}.")


@dataclass(frozen=True)
class _Options:
    """What one group offers: parallel arrays of cost and loss, and the shape of each option.

    Attributes:
        ranked: (KV groups, query heads per group) unit indices, most important first in each row.
        importance: (KV groups, query heads per group) importance in that order.
        kv: KV groups of each option, taken in the order of their best query heads.
        per_kv: query heads per KV group of each option (1 for neurons, whose "KV groups" are the
            neurons).
    """

    group: Group
    ranked: Ints
    importance: Floats
    kv: Ints
    per_kv: Ints
    cost: Ints
    loss: Floats

    def units(self, option: int) -> tuple[int, ...]:
        """The units that an option keeps, ascending."""
        kv, per_kv = int(self.kv[option]), int(self.per_kv[option])
        if not kv:
            return ()
        best = np.argsort(-self.importance[:, :per_kv].sum(axis=1), kind="stable")[:kv]
        return tuple(sorted(self.ranked[best, :per_kv].flatten().tolist()))


def plan(
    model: PreTrainedModel,
    scores: Scores,
    budget: str | Budget,
    criterion: str = "fisher",
    constraints: Constraints | None = None,
    tokens: int | None = None,
) -> PruningPlan:
    """Choose what to keep of a model under a budget.

    Args:
        model: the model that was scored.
        scores: from `hfprune.score`.
        budget: "macs=50%" or "params=0.6": the share of the layers' cost to keep.
        criterion: by which importance.
        constraints: floors, granularity, and what must stay; by default one head and one neuron per
            layer at least.
        tokens: length of the example whose MACs are counted; by default the calibration data's
            mean.

    Raises:
        BudgetError: no structure meets the budget; the message names the nearest that one can.
        HfpruneError: the scores belong to another model, the criterion was not scored, or the
            constraints do not fit the model.
    """
    anatomy = Anatomy.of(model)
    if scores.fingerprint != anatomy.fingerprint:
        raise HfpruneError(
            "These scores were measured on a model of another structure; score this model again."
        )
    constraints = constraints or Constraints()
    constraints.check(model)
    return solve(
        anatomy,
        scores.by(criterion),
        Budget.parse(budget),
        criterion=criterion,
        constraints=constraints,
        tokens=tokens or max(1, round(scores.tokens)),
    )


def solve(
    anatomy: Anatomy,
    importance: Mapping[str, torch.Tensor],
    budget: Budget,
    *,
    criterion: str,
    constraints: Constraints,
    tokens: int,
) -> PruningPlan:
    """The plan that keeps the most importance under a budget; see `plan`."""
    keep: dict[str, tuple[int, ...]] = _kept_layers(anatomy, importance, constraints)
    stay = {stack.stack: keep.get(stack.name, range(stack.units)) for stack in anatomy.stacks}
    for block in anatomy.experts:
        fewer = constraints.experts is not None and constraints.experts < block.units
        if fewer and block.layer in stay[block.stack] and not constraints.protects(block):
            best = importance[block.name].argsort(descending=True, stable=True)
            keep[block.name] = tuple(sorted(best[: constraints.experts].tolist()))
    offers = [
        _options(group, importance[group.name], budget.resource, constraints, tokens)
        for group in anatomy
        if group.layer in stay[group.stack]
    ]
    tied = _tied(offers) if constraints.uniform else [[n] for n in range(len(offers))]
    if budget.resource == "params":
        dense, left = layers_params(anatomy), layers_params(anatomy, keep)
        fixed = left - sum(o.group.owned_params for o in offers)
    else:
        dense, left = layers_macs(anatomy, tokens), layers_macs(anatomy, tokens, keep)
        whole = (group_macs(g, g.units, g.kv_groups, tokens) for g in (o.group for o in offers))
        fixed = left - sum(whole)
    limit = int(budget.share * dense + 0.5)
    least = fixed + sum(int(offer.cost.min()) for offer in offers)
    if least > limit:
        raise BudgetError(
            f"No structure keeps only {budget}: with at least {constraints.min_heads} heads and"
            f" {constraints.min_neurons} neurons in every layer{_whole(constraints)}, the least is"
            f" {budget.resource}={_percent(least / dense)}."
        )
    picks, gap = choose(
        [np.sum([offers[n].cost for n in together], axis=0) for together in tied],
        [np.sum([offers[n].loss for n in together], axis=0) for together in tied],
        limit - fixed,
    )
    options = {n: pick for together, pick in zip(tied, picks, strict=True) for n in together}
    chosen = [options[n] for n in range(len(offers))]
    spent = fixed + sum(int(o.cost[i]) for o, i in zip(offers, chosen, strict=True))
    if spent < limit * (1 - constraints.tolerance):
        raise BudgetError(
            f"{budget} cannot be met within {constraints.tolerance:.0%}: the nearest below is "
            f"{budget.resource}={_percent(spent / dense)}. Ask for that, or for a finer round_to."
        )
    total = sum(float(importance[g.name].sum()) for g in anatomy)
    keep |= {group.name: () for group in anatomy}
    lost = dict.fromkeys((group.name for group in anatomy), 1.0)
    for offer, option in zip(offers, chosen, strict=True):
        name = offer.group.name
        keep[name] = offer.units(option)
        lost[name] = float(offer.loss[option] / max(float(importance[name].sum()), 1e-300))
    return PruningPlan(
        anatomy,
        keep,
        budget,
        criterion,
        tokens,
        lost,
        gap / total if total > 0 else 0.0,
        uniform=constraints.uniform,
    )


def _kept_layers(
    anatomy: Anatomy, importance: Mapping[str, torch.Tensor], constraints: Constraints
) -> dict[str, tuple[int, ...]]:
    """{stack path: layers that stay}, of the stacks that lose any."""
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
    return kept


def _whole(constraints: Constraints) -> str:
    return f" and all of {', '.join(constraints.protect)}" if constraints.protect else ""


def _tied(offers: Sequence[_Options]) -> list[list[int]]:
    """Numbers of the offers that must choose the same option: those of a stack and kind.

    Raises:
        HfpruneError: the layers are not alike before pruning, or some are protected and some not.
    """
    tied: dict[tuple[int, str], list[int]] = {}
    for number, offer in enumerate(offers):
        tied.setdefault((offer.group.stack, offer.group.kind), []).append(number)
    for together in tied.values():
        first = offers[together[0]]
        for other in (offers[n] for n in together):
            if not (
                np.array_equal(first.kv, other.kv) and np.array_equal(first.per_kv, other.per_kv)
            ):
                raise HfpruneError(
                    f"uniform: {first.group.name} and {other.group.name} have different numbers of"
                    f" {other.group.kind}s to choose from. Protect all layers of the stack or none,"
                    " or plan without uniform."
                )
    return list(tied.values())


def _percent(share: float) -> str:
    """A share that can be asked for: rounded up, so that what costs it fits."""
    return f"{math.ceil(share * 1e4) / 100:.2f}%"


def _options(
    group: Group,
    importance: torch.Tensor,
    resource: str,
    constraints: Constraints,
    tokens: int,
) -> _Options:
    """Everything a group can keep, by count."""
    values = importance.double().cpu().numpy().reshape(-1, group.heads_per_kv)
    order = np.argsort(-values, axis=1, kind="stable")
    ranked = order + np.arange(len(values))[:, None] * group.heads_per_kv
    sorted_values = np.take_along_axis(values, order, axis=1)
    if constraints.protects(group):
        kv, per_kv = np.array([len(values)]), np.array([group.heads_per_kv])
    elif group.kind == "neuron":
        counts = np.arange(group.units + 1)
        allowed = (counts % constraints.round_to == 0) | (counts == group.units)
        allowed &= counts >= min(constraints.min_neurons, group.units)
        kv, per_kv = counts[allowed], np.ones(int(allowed.sum()), dtype=np.int64)
    else:
        shapes = [
            (g, h) for h in range(1, group.heads_per_kv + 1) for g in range(1, len(values) + 1)
        ]
        floor = min(constraints.min_heads, group.units)
        shapes = [(g, h) for g, h in [(0, 1), *shapes] if g * h >= floor]
        kv, per_kv = (np.array(side, dtype=np.int64) for side in zip(*shapes, strict=True))
    kept = np.zeros(len(kv))
    for h in np.unique(per_kv):  # the best g KV groups, when each keeps its best h query heads
        best = -np.sort(-sorted_values[:, :h].sum(axis=1))
        kept[per_kv == h] = np.concatenate([[0.0], np.cumsum(best)])[kv[per_kv == h]]
    cost = [
        (
            group_params(group, int(g * h), int(g))
            if resource == "params"
            else group_macs(group, int(g * h), int(g), tokens)
        )
        for g, h in zip(kv, per_kv, strict=True)
    ]
    return _Options(
        group,
        ranked,
        sorted_values,
        kv,
        per_kv,
        np.array(cost, dtype=np.int64),
        values.sum() - kept,
    )


def choose(costs: Sequence[Ints], losses: Sequence[Floats], limit: int) -> tuple[list[int], float]:
    """Pick one option per group with the least total loss at a total cost of at most `limit`.

    Args:
        costs: per group, the cost of each option.
        losses: per group, the loss of each option.
        limit: at least the sum of the groups' least costs.

    Returns:
        The option of each group, and a bound on how much more it loses than the best choice (0: it
        is the best).
    """
    price, chosen = _price(costs, losses, limit)
    chosen = _fill(costs, losses, chosen, limit)
    best = sum(float(loss[i]) for loss, i in zip(losses, chosen, strict=True))
    reduced = [loss + price * cost for loss, cost in zip(losses, costs, strict=True)]
    bound = sum(float(r.min()) for r in reduced) - price * limit
    exact = _search(costs, losses, reduced, price, limit, best)
    if exact is None:
        return chosen, max(0.0, best - bound)
    return exact or chosen, 0.0


def _price(costs: Sequence[Ints], losses: Sequence[Floats], limit: int) -> tuple[float, list[int]]:
    """The lowest price of cost at which the groups, each choosing for itself, meet the limit."""

    def at(price: float) -> list[int]:
        # Of equally good options the cheaper one, so that a high enough price is always feasible.
        picks = []
        for cost, loss in zip(costs, losses, strict=True):
            value = loss + price * cost
            ties = np.flatnonzero(value <= value.min())
            picks.append(int(ties[np.argmin(cost[ties])]))
        return picks

    def spent(picks: Sequence[int]) -> int:
        return sum(int(cost[i]) for cost, i in zip(costs, picks, strict=True))

    if spent(picks := at(0.0)) <= limit:
        return 0.0, picks
    low, high = 0.0, 1e-12 + max(float(loss.max()) for loss in losses) / max(1, limit)
    while spent(at(high)) > limit:
        low, high = high, high * 4
        if not np.isfinite(high):
            return low, [int(np.argmin(cost)) for cost in costs]
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if spent(at(middle)) > limit else (low, middle)
    return high, at(high)


def _fill(
    costs: Sequence[Ints], losses: Sequence[Floats], chosen: Sequence[int], limit: int
) -> list[int]:
    """Spend what the relaxation left over, each time on the change that saves the most loss."""
    chosen = list(chosen)
    left = limit - sum(int(cost[i]) for cost, i in zip(costs, chosen, strict=True))
    while True:
        saving, where = 0.0, None
        for g, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
            affordable = np.flatnonzero(cost <= cost[chosen[g]] + left)
            option = int(affordable[np.argmin(loss[affordable])])
            if loss[chosen[g]] - loss[option] > saving:
                saving, where = float(loss[chosen[g]] - loss[option]), (g, option)
        if where is None:
            return chosen
        g, option = where
        left -= int(costs[g][option] - costs[g][chosen[g]])
        chosen[g] = option


def _search(
    costs: Sequence[Ints],
    losses: Sequence[Floats],
    reduced: Sequence[Floats],
    price: float,
    limit: int,
    best: float,
) -> list[int] | None:
    """Exact dynamic programming over the options whose bound is below `best`.

    Returns:
        The best choice, [] if none is better than `best`, None if there were too many states to be
        sure.
    """
    slack = 1e-9 * (abs(best) + 1e-300)
    rest = np.concatenate([np.cumsum([r.min() for r in reduced][::-1])[::-1], [0.0]])
    ceiling = best - slack + price * limit
    cost, loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    # Per group: which earlier state and which option led to a state.
    steps: list[tuple[Ints, Ints]] = []
    for g, (option_cost, option_loss) in enumerate(zip(costs, losses, strict=True)):
        floor_before = float(np.min(loss + price * cost))
        options = np.flatnonzero(floor_before + reduced[g] + rest[g + 1] <= ceiling)
        if len(cost) * len(options) > 50 * _MOST_STATES:
            return None
        new_cost = (cost[:, None] + option_cost[options][None]).ravel()
        new_loss = (loss[:, None] + option_loss[options][None]).ravel()
        alive = np.flatnonzero(
            (new_cost <= limit) & (new_loss + price * new_cost + rest[g + 1] <= ceiling)
        )
        order = alive[np.lexsort((new_loss[alive], new_cost[alive]))]
        falls = np.minimum.accumulate(new_loss[order]) if len(order) else np.zeros(0)
        first = np.ones(len(order), dtype=bool)
        first[1:] = falls[1:] < falls[:-1]  # dearer and no better: dominated
        order = order[first]
        if not len(order):
            return []
        if len(order) > _MOST_STATES:
            return None
        steps.append((order // len(options), options[order % len(options)]))
        cost, loss = new_cost[order], new_loss[order]
    state, picks = int(np.argmin(loss)), []
    if loss[state] >= best - slack:
        return []
    for parents, chosen in reversed(steps):
        picks.append(int(chosen[state]))
        state = int(parents[state])
    return picks[::-1]
