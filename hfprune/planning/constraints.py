"""What a plan must respect besides its budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

from transformers import PreTrainedModel

from hfprune.errors import HfpruneError, expect, unknown
from hfprune.structure.anatomy import Anatomy, Block, Group
from hfprune.structure.checkpoint import also_sized, sizes_heads, stock_settings


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
        floors, fewer = (self.min_heads, self.min_neurons), (self.layers or 1, self.experts or 1)
        expect(self.tolerance, Real, "tolerance", "a number")
        if not all(isinstance(count, int) for count in (*floors, self.round_to, *fewer)):
            raise HfpruneError(
                "min_heads, min_neurons, round_to, layers and experts must be whole numbers:"
                f" {self}."
            )
        if (
            min(floors) < 0
            or self.round_to < 1
            or not self.tolerance > 0  # nor is that which is no number
        ):
            raise HfpruneError(
                "min_heads and min_neurons must be 0 or more, round_to 1 or more, tolerance above"
                f" 0: {self}."
            )
        if isinstance(self.protect, str):  # whose letters would be taken for names
            raise HfpruneError(f"protect takes a tuple of names: ({self.protect!r},).")
        expect(self.protect, Iterable, "protect", "a tuple of names")
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
            if self._cuts(group) and not stock_settings(model, group):
                raise self._not_held(anatomy, group)
        if self.uniform:
            self._check_built(model, anatomy)

    def _cuts(self, group: Group) -> bool:
        """Whether a group may lose units."""
        floor = self.min_heads if group.kind == "head" else self.min_neurons
        return floor < group.units and not self.protects(group)

    def _not_held(self, anatomy: Anatomy, group: Group) -> HfpruneError:
        return HfpruneError(
            f"uniform: the config of a {anatomy.model_type} cannot hold fewer"
            f" {group.kind}s, as in {group.name}. Keep them all with"
            f" min_{group.kind}s={group.units}, or plan without uniform."
        )

    def _check_built(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        """Refuse uniform widths whose setting does not size the heads, or sizes also what no plan
        cuts.
        """
        cut = [group for group in anatomy if self._cuts(group)]
        for group in {(g.stack, g.part): g for g in cut if g.kind == "head"}.values():
            if not sizes_heads(model, group):
                raise self._not_held(anatomy, group)
        for group in {g.stack: g for g in cut if g.kind == "neuron"}.values():
            if other := also_sized(model, group):
                raise HfpruneError(
                    f"uniform: in the config of a {anatomy.model_type}, the width of {group.name}"
                    f" is also that of {other}, which stays. Keep all neurons of its stack with"
                    f" protect or min_neurons={group.units}, or plan without uniform."
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
            if block.pinned and count < block.units:
                raise HfpruneError(
                    f"The experts of {block.name} are chosen by groups of equal size: all"
                    f" {block.units} must stay."
                )
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
