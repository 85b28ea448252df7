"""Rounds: prune, recover, and prune what came of it again.

Every round scores and plans the model that the round before left, but its budget is a share of the
dense model, and what it leaves is told in units of the dense model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hfprune.errors import BudgetError
from hfprune.planning.budget import Budget, Limit
from hfprune.planning.constraints import Constraints
from hfprune.planning.plan import PruningPlan
from hfprune.recipe import Recipe
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.cost import Tokens, layers_macs, layers_params


@dataclass(frozen=True)
class Round:
    """One time of pruning and recovery.

    Attributes:
        number: from 1.
        budget: share of the dense layers that may stay.
        given: the model that it prunes, by its folder in the run's.
        folder: of its artefacts, in the run's; "" where there is one round only.
        start: what distillation starts from: "pruned" or "compensated".
        result: what it ends with: that, or "distilled".
    """

    number: int
    budget: Budget
    given: str
    folder: str
    start: str
    result: str

    def path(self, artefact: str) -> str:
        """An artefact of this round, in the run's folder."""
        return f"{self.folder}/{artefact}" if self.folder else artefact

    @property
    def first(self) -> bool:
        """Whether it prunes the dense model itself."""
        return self.number == 1

    @property
    def latency(self) -> Limit | None:
        """The limit of time, for which a table must say where the time goes."""
        return next((limit for limit in self.budget.limits if limit.resource == "latency"), None)

    @staticmethod
    def of(recipe: Recipe) -> list[Round]:
        """The rounds of a recipe, one for each of its budgets."""
        start = "compensated" if recipe.prune.compensate else "pruned"
        result = "distilled" if recipe.distill else start
        rounds: list[Round] = []
        for number, budget in enumerate(recipe.prune.budgets, 1):
            folder = f"round-{number}" if len(recipe.prune.budgets) > 1 else ""
            given = rounds[-1].path(result) if rounds else "dense"
            rounds.append(Round(number, Budget.parse(budget), given, folder, start, result))
        return rounds


def budget_on_given(budget: Budget, dense: Anatomy, tokens: Tokens) -> Budget:
    """A budget in shares of the dense model as one in amounts, which any smaller model can meet.

    Raises:
        BudgetError: a share of memory or latency, which are not counted on the layers alone.
    """
    costs = {"macs": layers_macs(dense, tokens), "params": layers_params(dense)}
    limits = []
    for limit in budget.limits:
        if not limit.absolute:
            if limit.resource not in costs:
                raise BudgetError(
                    f"After the first round, {limit} has no meaning: write the {limit.resource} as"
                    " an amount, or a share of macs or params."
                )
            amount = int(limit.amount * costs[limit.resource] + 0.5)
            limit = dataclasses.replace(limit, amount=amount, absolute=True)
        limits.append(limit)
    return Budget(tuple(limits))


def constraints_on_given(constraints: Constraints, earlier: PruningPlan) -> Constraints:
    """The constraints with protected layers under the numbers that they have by now."""
    protect = list(constraints.protect)
    for stack, gone in earlier.dropped.items():
        for place, name in enumerate(constraints.protect):
            if name.startswith(f"{stack}."):
                layer, *rest = name.removeprefix(f"{stack}.").split(".")
                now = int(layer) - sum(other < int(layer) for other in gone)
                protect[place] = ".".join([stack, str(now), *rest])
    return dataclasses.replace(constraints, protect=tuple(protect))


def in_all(
    earlier: PruningPlan, cut: PruningPlan, importance: Mapping[str, torch.Tensor], budget: Budget
) -> PruningPlan:
    """What stays of the dense model when a plan for it and then another one are followed.

    Args:
        earlier: for the dense model.
        cut: for what the earlier plan leaves.
        importance: of the dense model's units, for what was lost of it in all.
        budget: of both, as a share of the dense model.
    """
    dense, given = earlier.anatomy, cut.anatomy
    keep: dict[str, tuple[int, ...]] = {group.name: () for group in dense}
    stays = {s.stack: earlier.keep.get(s.name, tuple(range(s.units))) for s in dense.stacks}
    for stack in dense.stacks:
        layers = stays[stack.stack]
        kept = tuple(layers[n] for n in cut.keep.get(stack.name, range(len(layers))))
        if len(kept) < stack.units:
            keep[stack.name] = kept
    # Both anatomies list the groups in forward order; the layers that went are not in the second.
    groups = [group for group in dense if group.layer in stays[group.stack]]
    for was, now in zip(groups, given, strict=True):
        keep[was.name] = tuple(earlier.keep[was.name][unit] for unit in cut.keep[now.name])
    blocks = [block for block in dense.experts if block.layer in stays[block.stack]]
    for block, left in zip(blocks, given.experts, strict=True):
        before = earlier.keep.get(block.name, tuple(range(block.units)))
        kept = tuple(before[unit] for unit in cut.keep.get(left.name, range(left.units)))
        if len(kept) < block.units:
            keep[block.name] = kept
    lost = {}
    for group in dense:
        values = importance[group.name]
        whole = max(float(values.sum()), 1e-300)
        lost[group.name] = 1 - float(values[list(keep[group.name])].sum()) / whole
    # What the last cut was worth at its margin says nothing of both cuts together.
    whole_plan = dataclasses.replace(earlier, spending=(), margins={})
    return dataclasses.replace(whole_plan, keep=keep, budget=budget, lost=lost, gap=cut.gap)
