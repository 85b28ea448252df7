"""What each part of a pruned model is left of, in the dense one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel

from hfprune.errors import HfpruneError
from hfprune.structure.anatomy import Anatomy, Block, Group
from hfprune.structure.cost import Selection
from hfprune.structure.surgery import check_selection


@dataclass(frozen=True)
class Origin:
    """A pruned model beside the dense one.

    Attributes:
        dense: the model before removal.
        pruned: the model after it.
        kept: what stayed, as far as that is known.
        before, after: what they are made of.
        layers: for each layer of each pruned stack: which dense layer it is, and the last it stands
            for.
    """

    dense: PreTrainedModel
    pruned: PreTrainedModel
    kept: Selection
    before: Anatomy
    after: Anatomy
    layers: list[list[tuple[int, int]]]

    @staticmethod
    def of(dense: PreTrainedModel, pruned: PreTrainedModel, kept: Selection) -> Origin:
        """Look both models over.

        Raises:
            HfpruneError: the pruned model is not of the dense one, layers went and `kept` does not
                say which, or it says what cannot be.
        """
        if dense is pruned:
            raise HfpruneError("The dense and the pruned model are one and the same.")
        before, after = Anatomy.of(dense), Anatomy.of(pruned)
        if before.model_type != after.model_type:
            raise HfpruneError(
                f"The pruned model is a {after.model_type}, the dense one a {before.model_type}:"
                " give the model that it was pruned from."
            )
        check_selection(before, kept)
        layers = [_layers(before.stacks[stack.stack], stack, kept) for stack in after.stacks]
        origin = Origin(dense, pruned, kept, before, after, layers)
        for group in after:
            origin.check_twin(group)
        return origin

    def check_twin(self, group: Group) -> None:
        """Refuse a group that cannot be left of the dense one in its place.

        Raises:
            HfpruneError: it has more units, or they are of other sizes.
        """
        twin = self.twin(group)
        if group.units > twin.units:
            raise HfpruneError(
                f"{group.name} has {group.units} {group.kind}s in the pruned model and {twin.units}"
                " in the dense one: were they swapped?"
            )
        if group.units and (group.columns, group.unit_weights) != (twin.columns, twin.unit_weights):
            raise HfpruneError(
                f"The {group.kind}s of {group.name} are not of the size of the dense model's: give"
                " the model that it was pruned from."
            )

    @cached_property
    def _dense_groups(self) -> dict[tuple[int, int, str, int], Group]:
        return {(g.stack, g.layer, g.kind, g.part): g for g in self.before}

    def dense_group(self, like: Group, layer: int) -> Group | None:
        """The group of a dense layer that is as a group of another one."""
        return self._dense_groups.get((like.stack, layer, like.kind, like.part))

    def twin(self, group: Group) -> Group:
        """The dense group that a pruned one is left of."""
        return self._dense_groups[
            group.stack, self.layers[group.stack][group.layer][0], group.kind, group.part
        ]

    def knows(self, group: Group) -> bool:
        """Whether it is known which of its twin's units a pruned group still has."""
        return group.units == len(self._stayed(group))

    def units(self, group: Group) -> Sequence[int]:
        """Those of its twin's units that a pruned group still has, ascending.

        Raises:
            HfpruneError: some went, and `kept` does not say which.
        """
        if not self.knows(group):
            twin = self.twin(group)
            raise HfpruneError(
                f"{twin.name} keeps {group.units} of its {twin.units} {twin.kind}s; say which of"
                " them, compensate(..., kept=plan.keep)."
            )
        return sorted(self._stayed(group))

    def _stayed(self, group: Group) -> Collection[int]:
        twin = self.twin(group)
        return self.kept.get(twin.name, range(twin.units))

    def changed(self, stack: int) -> list[Group]:
        """The groups of a pruned stack that lost units, or whose layer lost experts or moved."""
        experts = {b.layer: b.units for b in self.before.experts if b.stack == stack}
        fewer = {
            b.layer
            for b in self.after.experts
            if b.stack == stack and b.units < experts[self.layers[stack][b.layer][0]]
        }
        return [
            g
            for g in self.after
            if g.stack == stack
            and (
                g.units < self.twin(g).units
                or self.layers[stack][g.layer] != (g.layer, g.layer)
                or g.layer in fewer
            )
        ]


def _layers(dense: Block, pruned: Block, kept: Selection) -> list[tuple[int, int]]:
    stayed = sorted(kept.get(dense.name, range(dense.units)))
    if len(stayed) != pruned.units:
        raise HfpruneError(
            f"{dense.name}: the pruned model has {pruned.units} layers and the dense one"
            f" {dense.units}; say which of them stayed, compensate(..., kept=plan.keep)."
        )
    return list(zip(stayed, dense.stands_for(stayed), strict=True))
