"""What a model is made of: its groups of prunable units, as plain numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from hfprune.structure.architectures import Attention, Stack, row_of
from hfprune.structure.fitness import check_plain, check_variant, check_whole, is_offloaded
from hfprune.structure.slices import (
    Slice,
    axis_of,
    config_of,
    ffn_in,
    ffn_of,
    head_slices,
    inputs_of,
    layer_of,
    moe_of,
    neuron_slices,
    present,
    routing_of,
    size_of,
    slices,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The other floors find here what they ask of a model.
__all__ = [
    "Anatomy",
    "Block",
    "Group",
    "axis_of",
    "check_whole",
    "is_offloaded",
    "layer_of",
    "moe_of",
    "routing_of",
    "slices",
]

Kind = Literal["head", "neuron"]


@dataclass(frozen=True)
class Group:
    """The units that share one outlet: the query heads of one attention, or the neurons of one FFN.

    A KV group is `heads_per_kv` consecutive query heads with their common key and value head. All
    sizes are counts of scalars; "weights" leave biases out, because only weights cost
    multiply-accumulates.

    Attributes:
        name: path of the attention module or of the FFN's outlet, relative to `model.base_model`;
            unique.
        kind: "head" or "neuron".
        stack, layer: which stack of the family's row, which layer in it.
        part: index of the attention in its layer (0 self, 1 cross); 0 for an FFN.
        units: how many units there are.
        columns: input columns of the outlet per unit: the head size, or 1.
        heads_per_kv: query heads per KV group; 1 where every head has its own key and value, and
            for neurons.
        outlet: path of the outlet, relative to `model.base_model`.
        unit_weights, unit_params: what one unit owns.
        kv_weights, kv_params: what one KV group owns besides its query heads.
        shared_params: owned by the group as a whole, gone when the last unit goes (norms inside an
            attention).
        fixed_params: stays even when the group is emptied (the outlet's bias).
        cross: keys and values come from another stack.
        positions: relative positions whose embeddings every forward pass projects (deberta-v2).
        position_weights: what one unit projects them with.
        position_terms: how often a unit compares every token with every position.
    """

    name: str
    kind: Kind
    stack: int
    layer: int
    part: int
    units: int
    columns: int
    heads_per_kv: int
    outlet: str
    unit_weights: int
    unit_params: int
    kv_weights: int
    kv_params: int
    shared_params: int
    fixed_params: int
    cross: bool = False
    positions: int = 0
    position_weights: int = 0
    position_terms: int = 0

    @property
    def kv_groups(self) -> int:
        """KV groups of an attention; for neurons, the number of neurons."""
        return self.units // self.heads_per_kv

    @property
    def owned_params(self) -> int:
        """Parameters of the whole group."""
        kv_groups = self.kv_groups if self.kind == "head" else 0
        return (
            self.units * self.unit_params
            + kv_groups * self.kv_params
            + (self.shared_params if self.units else 0)
            + self.fixed_params
        )

    def kv_of(self, units: Iterable[int]) -> tuple[int, ...]:
        """The KV groups that the given query heads belong to, in order."""
        return tuple(sorted({unit // self.heads_per_kv for unit in units}))


@dataclass(frozen=True)
class Block:
    """Units that go whole: the layers of a stack, or the routed experts of a layer.

    Attributes:
        name: path of the ModuleList or of the experts, relative to `model.base_model`; unique.
        kind: "layer" or "expert".
        stack: which stack of the family's row.
        layer: which layer in it; -1 for the layers themselves.
        unit_params: per unit, what goes with it besides the groups and experts inside.
        unit_weights: of these, the weights that every token passes; of an expert, its row of the
            router.
        routed_weights: of experts, the weights that a token passes in those it is sent to; as many,
            however many there are.
        unit_mixing: of a layer, columns of attentions whose heads are not units.
        unit_windows: of a layer, tokens on either side that they compare a token with; 0 for all.
        least: how many units must stay.
        pinned: units that must stay.
        columns: an expert has one routing weight, as a neuron has one column.
    """

    name: str
    kind: Literal["layer", "expert"]
    stack: int
    layer: int
    unit_params: tuple[int, ...]
    unit_weights: tuple[int, ...] = ()
    routed_weights: int = 0
    unit_mixing: tuple[int, ...] = ()
    unit_windows: tuple[int, ...] = ()
    least: int = 1
    pinned: tuple[int, ...] = ()
    columns: ClassVar[int] = 1

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.unit_params)

    def stands_for(self, kept: Sequence[int]) -> list[int]:
        """Of layers: for each that stays, the last layer before the next that stays.

        A layer that stays does, as well as it can, what the dropped layers after it did: its output
        is compared with theirs.
        """
        return [following - 1 for following in (*sorted(kept)[1:], self.units)]


@dataclass(frozen=True)
class Anatomy:
    """A model's prunable groups in forward order, with what the rest of it holds.

    Attributes:
        model_type: the family.
        groups: every prunable group.
        blocks: its layers and routed experts, which can go whole.
        outside_params: parameters outside the layers (embeddings, heads), tied ones counted once.
        note: what the family's row says of what cannot be pruned.
    """

    model_type: str
    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    outside_params: int
    note: str = ""

    @property
    def stacks(self) -> tuple[Block, ...]:
        """The blocks of layers, one per stack."""
        return tuple(block for block in self.blocks if block.kind == "layer")

    @property
    def experts(self) -> tuple[Block, ...]:
        """The blocks of routed experts, one per layer that has some."""
        return tuple(block for block in self.blocks if block.kind == "expert")

    @staticmethod
    def of(model: PreTrainedModel) -> Anatomy:
        """Read the anatomy of a transformers model.

        Raises:
            UnsupportedModelError: the family has no row, or the model is not a plain, loaded
                transformers model.
        """
        check_plain(model)
        row = row_of(model.config.model_type)
        check_variant(model, row)
        groups: list[Group] = []
        blocks: list[Block] = []
        total = sum(p.numel() for p in model.parameters())
        outside = total
        for number, stack in enumerate(row.stacks):
            params, weights, mixing, windows = [], [], [], []
            layers = list(model.base_model.get_submodule(stack.layers).children())
            read, pinned = _read_layers(model, stack, len(layers))
            for index, layer in enumerate(layers):
                here = stack if index < read else _without_units(stack)
                inside = sum(p.numel() for p in layer.parameters())
                found = _groups(layer, here, number, index)
                experts = _experts(layer, here, number, index)
                owned = sum(g.owned_params for g in found)
                owned += sum(sum(block.unit_params) for block in experts)
                groups += found
                blocks += experts
                params.append(inside - owned)
                weights.append(_other_weights(layer, here))
                mixing.append(sum(_mixed(layer, a) for a in here.whole))
                windows.append(max((_window(layer, a) for a in here.whole), default=0))
                outside -= inside
            blocks.append(
                Block(
                    stack.layers,
                    "layer",
                    number,
                    -1,
                    tuple(params),
                    tuple(weights),
                    unit_mixing=tuple(mixing),
                    unit_windows=tuple(windows),
                    pinned=pinned,
                )
            )
        return Anatomy(row.model_type, tuple(groups), tuple(blocks), outside, row.note)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __getitem__(self, name: str) -> Group:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    @property
    def everything(self) -> dict[str, tuple[int, ...]]:
        """The selection that keeps every unit: {group name: unit indices}."""
        return {group.name: tuple(range(group.units)) for group in self.groups}

    @property
    def fingerprint(self) -> str:
        """Short hash that two models share exactly when a plan for one fits the other."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Anatomy:
        """The inverse of `to_dict`."""
        groups = tuple(Group(**group) for group in values["groups"])
        blocks = tuple(Block(**_tuples(block)) for block in values["blocks"])
        return Anatomy(**{**values, "groups": groups, "blocks": blocks})

    def __str__(self) -> str:
        from hfprune.structure.cost import anatomy_table

        return anatomy_table(self)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _groups(layer: nn.Module, stack: Stack, number: int, index: int) -> list[Group]:
    """The groups of one layer, in forward order."""
    parts: list[int | None] = [*range(len(stack.attentions))]
    if ffn_in(layer, stack):  # a layer of experts may have none
        parts.append(None)
    return [_group(layer, stack, number, index, part) for part in parts]


def _experts(layer: nn.Module, stack: Stack, number: int, index: int) -> list[Block]:
    """The routed experts of one layer, if it has any."""
    found = present(layer, (stack.moe.router, stack.moe.experts)) if stack.moe else []
    if len(found) < 2:
        return []
    assert stack.moe is not None
    router, experts = found
    count = size_of(router, 0)
    each = sum(p.numel() for m in (router, experts) for p in m.parameters()) // count
    name = f"{stack.layers}.{index}.{stack.moe.experts}"
    in_groups = (getattr(router, "num_group", None) or 1) > 1  # of equal size
    chosen = int(router.top_k)  # type: ignore[arg-type]
    matrices = sum(p.numel() for p in experts.parameters() if p.dim() == 3) // count
    return [
        Block(
            name,
            "expert",
            number,
            index,
            (each,) * count,
            (size_of(router, 1),) * count,
            routed_weights=chosen * matrices,
            least=chosen,
            pinned=tuple(range(count)) if in_groups else (),
        )
    ]


def _read_layers(model: PreTrainedModel, stack: Stack, count: int) -> tuple[int, tuple[int, ...]]:
    """How many layers of a stack anybody reads, and which of all must stay."""
    pinned = {layer for layer in stack.pinned if layer < count}
    if stack.tapped:
        pinned |= {*getattr(config_of(model.config, stack), stack.tapped)}
    read = count
    if stack.read:
        said = getattr(model.config, stack.read)
        outputs = [said] if isinstance(said, int) else said
        # The embeddings' output is number 0.
        read = max(output if output >= 0 else count + 1 + output for output in outputs)
        moves_along = len(outputs) == 1 and outputs[0] < 0  # when a layer before it goes
        pinned |= {*range(read if moves_along else 0, count)}
    return read, tuple(sorted(pinned))


def _without_units(stack: Stack) -> Stack:
    return replace(stack, attentions=(), ffn=None, whole=(*stack.attentions, *stack.whole))


def _mixed(layer: nn.Module, row: Attention) -> int:
    """Columns in which an attention compares tokens and mixes their values, the mean of both."""
    values = inputs_of(layer.get_submodule(row.o))
    if not row.compared:
        return values
    at = layer.get_submodule(row.at)
    heads = values // int(getattr(at, row.dim))
    return (values + heads * int(getattr(at, row.compared))) // 2


def _window(layer: nn.Module, row: Attention) -> int:
    return int(getattr(layer.get_submodule(row.at), row.window)) if row.window else 0


def _other_weights(layer: nn.Module, stack: Stack) -> int:
    """Weights of a layer that every token passes, besides those of its units and its router, and
    those for the few tokens that see all.
    """
    found = [piece for row in stack.attentions for piece in head_slices(layer, row)]
    if ffn := ffn_in(layer, stack):
        found += neuron_slices(layer, ffn)
    units = {piece.module for piece in found}
    units |= {m for row in stack.whole if row.window for m in present(layer, row.follow)}
    router = stack.moe.router if stack.moe else None
    return sum(
        module.weight.numel()
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module not in units and path != router
    )


def _group(layer: nn.Module, stack: Stack, stack_index: int, index: int, part: int | None) -> Group:
    """The group of attention number `part`, or of the FFN if None."""
    prefix = f"{stack.layers}.{index}"
    if part is None:
        ffn = ffn_of(layer, stack)
        found, at, outlet_path = neuron_slices(layer, ffn), ffn.down, ffn.down
        columns, inside = 1, []
    else:
        row = stack.attentions[part]
        found, at, outlet_path = head_slices(layer, row), row.at, row.o
        inside = [layer.get_submodule(at)]
        columns = int(getattr(inside[0], row.dim))
    outlet = found[0]
    units = len(outlet.rows)
    kv = next((len(s.rows) for s in found if s.per_kv), units)
    unit_params = sum(s.params for s in found if not s.per_kv)
    kv_params = sum(s.params for s in found if s.per_kv)
    extra = _relative(inside[0], stack.attentions[part], found) if part is not None else {}
    bias = getattr(outlet.module, "bias", None)
    fixed = 0 if bias is None else bias.numel()
    modules = [*inside, *(s.module for s in found)]
    tensors = {id(p): p for module in modules for p in module.parameters()}
    shared = sum(p.numel() for p in tensors.values()) - fixed - units * unit_params - kv * kv_params
    return Group(
        name=f"{prefix}.{at}",
        kind="neuron" if part is None else "head",
        stack=stack_index,
        layer=index,
        part=part or 0,
        units=units,
        columns=columns,
        heads_per_kv=units // kv if units else 1,
        outlet=f"{prefix}.{outlet_path}",
        unit_weights=sum(s.weights for s in found if not s.per_kv and s.per_token),
        unit_params=unit_params,
        kv_weights=sum(s.weights for s in found if s.per_kv),
        kv_params=kv_params,
        shared_params=shared,
        fixed_params=fixed,
        cross=part is not None and stack.attentions[part].context == "cross",
        **extra,
    )


def _relative(at: nn.Module, row: Attention, found: Sequence[Slice]) -> dict[str, int]:
    """The sizes of an attention between tokens and relative positions, {} if it has none."""
    span = getattr(at, row.positions, 0) if row.positions else 0
    if not span:
        return {}
    own = sum(piece.weights for piece in found if not piece.per_token)
    shared = sum(piece.weights for piece in found[1:3])  # query and key serve positions too
    return {
        "positions": 2 * int(span),
        "position_weights": own or shared,
        "position_terms": len(getattr(at, row.terms)),
    }
