"""What became of a model's units, layer by layer, small enough for a report to hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from hfprune.importance.scores import Scores
    from hfprune.planning.plan import PruningPlan
    from hfprune.structure.anatomy import Block, Group

MARKS = 96
"""More units than this are counted and drawn as one bar, not one by one."""

NAMES = {"head": "attention heads", "neuron": "FFN neurons", "expert": "routed experts"}
"""What the kinds of units are called."""

SAMPLED = 60
"""So many importances of a group's kept units, and of its removed ones, stand for all of them."""


@dataclass(frozen=True)
class Units:
    """What became of the heads, neurons or routed experts of one layer.

    Attributes:
        kind: "head", "neuron" or "expert".
        stack: name of the stack where a model has several, else "".
        layer: which layer of the stack.
        total: how many units there were.
        kept: how many stay.
        which: those that stay, by number; None where there are more than `MARKS`.
        cross: heads of a cross-attention.
        dropped: the whole layer goes.
        kept_importance, removed_importance: of the units that stay and go, ascending; at most
            `SAMPLED` values, evenly spaced in rank. Empty where the units were not scored.
    """

    kind: str
    stack: str
    layer: int
    total: int
    kept: int
    which: tuple[int, ...] | None
    cross: bool = False
    dropped: bool = False
    kept_importance: tuple[float, ...] = ()
    removed_importance: tuple[float, ...] = ()

    @property
    def place(self) -> str:
        """Stack and layer: "3", "decoder 3", "decoder 3 cross"."""
        return " ".join(filter(None, (self.stack, str(self.layer), "cross" * self.cross)))

    @property
    def label(self) -> str:
        """What these units are, in a line of its own: "decoder layer 3 cross-attention"."""
        part = "cross-attention" if self.cross else f"{self.kind}s"
        gone = "(removed)" if self.dropped else ""
        return " ".join(filter(None, (self.stack, f"layer {self.layer}", gone, part)))


@dataclass(frozen=True)
class Pruning:
    """What was removed, and on what evidence.

    Attributes:
        model_type: the family.
        budget: what was asked for.
        criterion: by which importance the units were chosen.
        macs_share, params_share: what the layers keep of their MACs and parameters.
        units: of every layer, in forward order.
        examples: calibration examples.
        tokens: mean tokens per calibration example, of each stack of layers.
        agreement: Spearman rank correlation of the importances from the two halves of them; None
            for a criterion that reads no gradients.
    """

    model_type: str
    budget: str
    criterion: str
    macs_share: float
    params_share: float
    units: tuple[Units, ...]
    examples: int
    tokens: tuple[float, ...]
    agreement: float | None

    @staticmethod
    def of(plan: PruningPlan, scores: Scores) -> Pruning:
        """What a plan removes, with the scores it was made from."""
        return Pruning(
            model_type=plan.anatomy.model_type,
            budget=str(plan.budget),
            criterion=plan.criterion,
            macs_share=plan.macs_share,
            params_share=plan.params_share,
            units=units_of(plan, scores.by(plan.criterion)),
            examples=scores.examples,
            tokens=scores.tokens,
            agreement=scores.agreement.get(plan.criterion),
        )

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Pruning:
        """The inverse of `dataclasses.asdict`, after JSON."""
        units = []
        for row in values["units"]:
            plain: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in row.items()
            }
            units.append(Units(**plain))
        tokens = values["tokens"]  # one number in reports of hfprune 0.1.0
        tokens = tuple(tokens) if isinstance(tokens, list) else (tokens,)
        return Pruning(**{**values, "units": tuple(units), "tokens": tokens})

    def count(self, kind: str) -> tuple[int, int]:
        """How many units of a kind stay, and how many there were."""
        rows = [row for row in self.units if row.kind == kind]
        return sum(row.kept for row in rows), sum(row.total for row in rows)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of units there are."""
        return tuple(dict.fromkeys(row.kind for row in self.units))


def units_of(
    plan: PruningPlan, importance: Mapping[str, torch.Tensor] | None = None
) -> tuple[Units, ...]:
    """What a plan keeps of every layer, in forward order, with the importances if they are given.

    Args:
        plan: what stays.
        importance: {group name: (units,)}, as `Scores.by` gives it.
    """
    several = len(plan.anatomy.stacks) > 1
    parts: Sequence[Group | Block] = (*plan.anatomy, *plan.anatomy.experts)
    rows = []
    for part in parts:
        stack = plan.anatomy.stacks[part.stack].name
        dropped = part.layer in plan.dropped.get(stack, ())
        kept = () if dropped else plan.keep.get(part.name, tuple(range(part.units)))
        values = (importance or {}).get(part.name)
        gone = sorted(set(range(part.units)) - set(kept))
        rows.append(
            Units(
                kind=part.kind,
                stack=stack.split(".")[0] if several else "",  # encoder, decoder, text_model ...
                layer=part.layer,
                total=part.units,
                kept=len(kept),
                which=tuple(kept) if part.units <= MARKS else None,
                cross=getattr(part, "cross", False),
                dropped=dropped,
                kept_importance=_sample(values, kept),
                removed_importance=_sample(values, gone),
            )
        )
    return tuple(rows)


def _sample(importance: torch.Tensor | None, units: Sequence[int]) -> tuple[float, ...]:
    """Some of the units' importances, ascending and evenly spaced in rank."""
    if importance is None or not units:
        return ()
    ordered = importance[list(units)].sort().values.tolist()
    count = min(len(ordered), SAMPLED)
    ranks = [round(i * (len(ordered) - 1) / max(1, count - 1)) for i in range(count)]
    return tuple(float(f"{ordered[rank]:.4g}") for rank in ranks)
