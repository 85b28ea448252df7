"""The pruning plan: a frozen value that says which units stay, and explains itself. It holds no
tensor.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfprune.errors import HfpruneError
from hfprune.files import write_whole
from hfprune.planning.budget import Budget
from hfprune.structure.anatomy import Anatomy, Group
from hfprune.structure.cost import (
    Tokens,
    aligned,
    group_macs,
    group_params,
    layers_macs,
    layers_params,
    tokens_of,
    written_tokens,
)
from hfprune.structure.surgery import check_selection

VERSION = 1

Margin = tuple[float | None, float | None]


@dataclass(frozen=True)
class Spending:
    """One limit of a budget, before and after.

    Attributes:
        dense, kept: what the dense and the pruned model cost, in MACs, parameters, bytes or
            nanoseconds.
        price: the share of all importance that a limit greater by 1 % of the dense cost would keep
            in addition, at the margin; 0 if the limit does not bind.
    """

    dense: int
    kept: int
    price: float


@dataclass(frozen=True)
class PruningPlan:
    """Which units of a model stay under a budget.

    Attributes:
        anatomy: of the model the plan was made for.
        keep: {group name: kept unit indices, ascending}, every group of the anatomy; and {stack
            path: kept layers} of the stacks that lose layers, whose groups keep nothing; and {path
            of a layer's experts: kept experts} where some go.
        budget: what was asked for.
        criterion: by which importance the units were chosen.
        tokens: length of the example whose MACs are counted; one per stack where they differ.
        lost: {group name: share of the group's importance that goes}.
        gap: how far the kept importance may lie below the best of all choices that meet the budget
            within the tolerance, as a share of all importance.
        uniform: the layers of a stack keep equally many units, and the pruned model is to be one of
            its stock class.
        spending: one per limit of the budget.
        margins: {group name: worth of the best units that go, of the least that stay}. Worth is
            importance over cost at the price of the margin: above 1 units stay, unless a constraint
            forbids it. None where none can go or stay, and without a price.
    """

    anatomy: Anatomy
    keep: Mapping[str, tuple[int, ...]]
    budget: Budget
    criterion: str
    tokens: Tokens
    lost: Mapping[str, float] = field(default_factory=dict)
    gap: float = 0.0
    uniform: bool = False
    spending: tuple[Spending, ...] = ()
    margins: Mapping[str, Margin] = field(default_factory=dict)

    @property
    def macs_share(self) -> float:
        """MACs of the pruned layers over those of the dense layers."""
        return layers_macs(self.anatomy, self.tokens, self.keep) / layers_macs(
            self.anatomy, self.tokens
        )

    @property
    def params_share(self) -> float:
        """Parameters of the pruned layers over those of the dense layers."""
        return layers_params(self.anatomy, self.keep) / layers_params(self.anatomy)

    @property
    def dropped(self) -> dict[str, tuple[int, ...]]:
        """{stack path: layers that go}, of the stacks that lose any."""
        return {
            stack.name: tuple(sorted(set(range(stack.units)) - set(self.keep[stack.name])))
            for stack in self.anatomy.stacks
            if stack.name in self.keep
        }

    def meets(self, budget: Budget, tolerance: float) -> bool:
        """Whether a plan that spends what this one spends meets a budget of the same resources."""
        allowed = [
            (limit.of(own.dense), own.kept)
            for limit, own in zip(budget.limits, self.spending, strict=True)
        ]
        return all(kept <= limit for limit, kept in allowed) and any(
            kept >= limit * (1 - tolerance) for limit, kept in allowed
        )

    def is_within(self, larger: PruningPlan) -> bool:
        """Whether all that this plan keeps is kept by another for the same model."""
        return all(
            set(self.keep.get(part.name, range(part.units)))
            <= set(larger.keep.get(part.name, range(part.units)))
            for part in (*self.anatomy, *self.anatomy.blocks)
        )

    def drops(self, group: Group) -> bool:
        """Whether a group goes with its layer."""
        stack = self.anatomy.stacks[group.stack].name
        return group.layer in self.dropped.get(stack, ())

    @property
    def layer_map(self) -> list[int] | None:
        """For each layer that stays, the dense layer whose output its own is compared with.

        Counted through all stacks; None if no layer goes.
        """
        matched, offset = [], 0
        for stack in self.anatomy.stacks:
            kept = self.keep.get(stack.name, range(stack.units))
            matched += [offset + layer for layer in stack.stands_for(kept)]
            offset += stack.units
        return matched if self.dropped else None

    @property
    def fingerprint(self) -> str:
        """Short hash of the plan; processes that must agree on a plan compare it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def summary(self) -> dict[str, Any]:
        """A few plain values for the lineage that a pruned model carries in its config."""
        return {
            "plan": self.fingerprint,
            "budget": str(self.budget),
            "criterion": self.criterion,
            "macs_share": round(self.macs_share, 4),
            "params_share": round(self.params_share, 4),
        }

    def explain(self) -> str:
        """A table: per group what stays and at what loss of importance, and how the worth of what
        goes and of what stays compares; then the budget before and after.
        """
        rows = [
            ("layer", "stays", "of", "kind", "parameters", "MACs", "importance lost")
            + ("worth of next", "worth of last") * bool(self.margins)
        ]
        rows += [self._row(group) for group in self.anatomy]
        lines = aligned(rows, left={0, 3})
        lines += [
            f"Of {stack}, whole layers go: {', '.join(map(str, layers))}."
            for stack, layers in self.dropped.items()
        ]
        lines += [
            f"Of {block.name}, these of {block.units} experts stay:"
            f" {', '.join(map(str, self.keep[block.name]))}."
            for block in self.anatomy.experts
            if block.name in self.keep
        ]
        if self.margins:
            lines.append(
                "Worth is importance over cost, 1 at the margin of this budget: of the next units"
                " that would stay, and of the last that do. Where the next are worth more than 1, a"
                " constraint keeps them out; where the last are worth less, one keeps them in."
            )
        before, after = layers_params(self.anatomy), layers_params(self.anatomy, self.keep)
        lines += [
            "",
            (
                f"Budget {self.budget} by {self.criterion}: the layers keep {self.macs_share:.1%}"
                f" of their MACs ({written_tokens(self.tokens)} tokens) and {self.params_share:.1%}"
                f" of their parameters ({before:,} -> {after:,};"
                f" {self.anatomy.outside_params:,} outside the layers stay)."
            ),
        ]
        lines += [
            f"{limit}: {limit.written(own.dense)} -> {limit.written(own.kept)}"
            f" ({own.kept / own.dense:.1%}); "
            + (
                f"at the margin, 1 % more would keep {own.price:.2%} more of all importance."
                if own.price
                else "this limit does not bind."
            )
            for limit, own in zip(self.budget.limits, self.spending, strict=False)
        ]
        return "\n".join(lines)

    def _row(self, group: Group) -> tuple[str, ...]:
        """The line of one group in `explain`."""
        units = len(self.keep[group.name])
        kv = len(group.kv_of(self.keep[group.name]))
        whole = (group.units, group.kv_groups)
        params = group_params(group, units, kv) / max(1, group_params(group, *whole))
        params *= not self.drops(group)  # an emptied group leaves the outlet's bias, a layer none
        macs = group_macs(group, units, kv, self.tokens) / max(
            1, group_macs(group, *whole, self.tokens)
        )
        margin = self.margins.get(group.name, (None, None))
        return (
            group.name,
            f"{units:,}",
            f"{group.units:,}",
            f"{group.kind}s",
            f"{params:.0%}",
            f"{macs:.0%}",
            f"{self.lost[group.name]:.1%}" if group.name in self.lost else "",
            *("-" if worth is None else f"{worth:.2f}" for worth in margin if self.margins),
        )

    def diff(self, other: PruningPlan) -> str:
        """What another plan for the same model keeps instead, a line per group that differs."""
        self.check_fits(other.anatomy)
        lines = []
        for part in (*self.anatomy, *self.anatomy.blocks):
            mine, theirs = (
                set(plan.keep.get(part.name, range(part.units))) for plan in (self, other)
            )
            if mine != theirs:
                lines.append(
                    f"{part.name}: {len(mine)} -> {len(theirs)} {part.kind}s "
                    f"(+{len(theirs - mine)} -{len(mine - theirs)})"
                )
        return "\n".join(lines) or "The plans keep the same units."

    def check_fits(self, anatomy: Anatomy) -> None:
        """Refuse to serve a model that the plan was not made for.

        Raises:
            HfpruneError: the anatomies differ.
        """
        if anatomy != self.anatomy:
            raise HfpruneError(
                f"This plan is for a {self.anatomy.model_type} with {len(self.anatomy.groups)}"
                f" groups of units ({self.anatomy.fingerprint}); the model is a"
                f" {anatomy.model_type} with {len(anatomy.groups)} ({anatomy.fingerprint}). Score"
                " and plan the model that is to be pruned."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "version": VERSION,
            "budget": str(self.budget),
            "criterion": self.criterion,
            "tokens": self.tokens,
            "macs_share": self.macs_share,
            "params_share": self.params_share,
            "gap": self.gap,
            "uniform": self.uniform,
            "lost": dict(self.lost),
            "spending": [dataclasses.asdict(own) for own in self.spending],
            "margins": {name: list(margin) for name, margin in self.margins.items()},
            "keep": {name: list(units) for name, units in self.keep.items()},
            "anatomy": self.anatomy.to_dict(),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> PruningPlan:
        """The inverse of `to_dict`.

        Raises:
            HfpruneError: written by a newer version, or it keeps what its anatomy does not have.
        """
        if values["version"] > VERSION:
            raise HfpruneError(
                f"This plan has format version {values['version']}; this hfprune reads up to"
                f" {VERSION}. Upgrade it."
            )
        anatomy = Anatomy.from_dict(values["anatomy"])
        keep = {name: tuple(units) for name, units in values["keep"].items()}
        check_selection(anatomy, keep)
        if missing := [group.name for group in anatomy if group.name not in keep]:
            raise HfpruneError(f"The plan does not say what stays of {missing[0]}.")
        return PruningPlan(
            anatomy=anatomy,
            keep=keep,
            budget=Budget.parse(values["budget"]),
            criterion=values["criterion"],
            tokens=tokens_of(anatomy, values["tokens"]),
            lost=values["lost"],
            gap=values["gap"],
            uniform=values.get("uniform", False),
            spending=tuple(Spending(**own) for own in values.get("spending", ())),
            margins={name: (up, down) for name, (up, down) in values.get("margins", {}).items()},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, under a temporary name first."""
        write_whole(path, json.dumps(self.to_dict()) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> PruningPlan:
        """The inverse of `save`.

        Raises:
            HfpruneError: the file is not a plan, or one from a newer version.
        """
        try:
            return PruningPlan.from_dict(json.loads(Path(path).read_text()))
        except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            raise HfpruneError(f"{path} is not a pruning plan that can be read: {error}") from error

    def __str__(self) -> str:
        return self.explain()
