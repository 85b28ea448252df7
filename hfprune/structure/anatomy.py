"""What a model is made of: its groups of prunable units, as plain numbers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfprune.errors import UnsupportedModelError
from hfprune.structure.architectures import Attention, Ffn, Row, Stack, row_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

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
        _check_plain(model)
        row = row_of(model.config.model_type)
        _check_variant(model, row)
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


def stack_of(model: PreTrainedModel, group: Group) -> Stack:
    """The row's stack that a group of this model belongs to."""
    return row_of(model.config.model_type).stacks[group.stack]


def _check_plain(model: PreTrainedModel) -> None:
    """Refuse, before any change, a model whose tensors are not all there and its own.

    Raises:
        UnsupportedModelError: says what is in the way and what to do.
    """
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        inside = (getattr(model, name, None) for name in ("module", "_orig_mod", "base_model"))
        wrapped = next((module for module in inside if module is not None), None)
        hint = (
            f"it wraps a {type(wrapped).__name__}: give the model inside (merged, if it is PEFT's)"
            if wrapped is not None
            else "load one with AutoModel...from_pretrained"
        )
        raise UnsupportedModelError(f"A {name} is not a transformers model; {hint}.")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None or any(map(_is_quantized, model.parameters())):
        raise UnsupportedModelError(
            f"This {name} is quantized: its weights cannot be cut. Load it unquantized, prune, "
            "then quantize."
        )
    modules = list(model.modules())
    if getattr(model, "_hf_peft_config_loaded", False) or any(
        type(m).__module__.startswith("peft.") for m in modules
    ):
        raise UnsupportedModelError(
            f"This {name} has PEFT adapters inside: merge them (merge_and_unload), then prune."
        )
    if any("FullyShardedDataParallel" in type(m).__name__ for m in modules):
        raise UnsupportedModelError(
            f"This {name} is flattened by FSDP 1: prune the whole model first, then wrap it."
        )
    if any(p.is_meta for m in modules if not is_offloaded(m) for p in m.parameters(recurse=False)):
        raise UnsupportedModelError(
            f"This {name} has parameters on the meta device, without values: load its weights, "
            "then prune."
        )


def _is_quantized(weight: nn.Parameter) -> bool:
    """Whether a weight is packed: in less than 16 bits, or in a tensor of another kind."""
    plain = type(weight.data) is torch.Tensor or is_sharded(weight)
    return not plain or weight.element_size() < 2


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether FSDP keeps parts of a tensor in other processes."""
    return type(tensor).__name__ == "DTensor"


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a module's weights elsewhere and brings them when it is called."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def check_whole(model: PreTrainedModel) -> None:
    """Refuse to cut a model whose weights are not all in the memory of this process.

    Raises:
        UnsupportedModelError: it is sharded or offloaded; it can be scored and planned for.
    """
    sharded = any(map(is_sharded, model.parameters()))
    if sharded or any(map(is_offloaded, model.modules())):
        raise UnsupportedModelError(
            f"This {type(model).__name__} is {'sharded by FSDP' if sharded else 'offloaded'}: it "
            "can be scored and planned for, but not cut; cut one that is loaded whole."
        )


def _check_variant(model: PreTrainedModel, row: Row) -> None:
    """Refuse a variant of the family that its row does not describe.

    Raises:
        UnsupportedModelError: names the flag, the module or the tensors.
    """
    name = type(model).__name__
    for flag in row.unless:
        name_of, unset = flag.removeprefix("!"), flag.startswith("!")
        if bool(getattr(model.config, name_of, None)) != unset:
            raise UnsupportedModelError(
                f"This {name} has {name_of} {'unset' if unset else 'set'}; the row for "
                f"{row.model_type!r} does not cover that."
            )
    names: dict[int, list[str]] = {}
    for path, parameter in model.base_model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(path)
    for stack in row.stacks:
        shared = [
            paths
            for paths in names.values()
            if len(paths) > 1 and any(path.startswith(f"{stack.layers}.") for path in paths)
        ]
        if shared:
            raise UnsupportedModelError(
                f"This {name} shares one tensor between {' and '.join(shared[0])}; cutting one "
                "would cut the other."
            )
        try:
            layers = model.base_model.get_submodule(stack.layers)
            for layer in layers.children():
                for attention in stack.attentions:
                    layer.get_submodule(attention.o)
                if stack.ffn is not None and stack.moe is None:
                    layer.get_submodule(stack.ffn.down)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"This {name} is not built as the row for {row.model_type!r} says: {error}."
            ) from error


@dataclass(frozen=True)
class Slice:
    """The part of one module's tensors that the units of a group own.

    Attributes:
        module: a Linear, Conv1D, norm or Embedding; of a parameter per head, the attention itself.
        dim: 0 where the units are outputs (rows of weight and bias), 1 where they are inputs
            (columns).
        rows: (units, rows per unit) indices along `dim`; KV groups instead of units if `per_kv`.
        per_kv: the rows belong to the KV groups.
        per_token: its inputs are the tokens, as against the embeddings of relative positions.
        name: of the module's parameter.
    """

    module: nn.Module
    dim: int
    rows: torch.Tensor
    per_kv: bool = False
    per_token: bool = True
    name: str = "weight"

    @property
    def parameter(self) -> torch.Tensor:
        """The tensor that the rows index."""
        found: torch.Tensor = getattr(self.module, self.name)
        return found

    @property
    def axis(self) -> int:
        """Axis of the tensor that the rows index."""
        return axis_of(self.module, self.dim) if self.name == "weight" else 0

    @property
    def weights(self) -> int:
        """Scalars of matrices, per unit: what costs MACs."""
        if not isinstance(self.module, nn.Linear | Conv1D):
            return 0
        return self._share(self.module.weight)

    @property
    def params(self) -> int:
        """All scalars, per unit."""
        bias = getattr(self.module, "bias", None) if self.name == "weight" else None
        owned = self._share(self.parameter)
        return owned + (self.rows.shape[1] if bias is not None and self.dim == 0 else 0)

    def _share(self, weight: torch.Tensor) -> int:
        others = [n for axis, n in enumerate(weight.shape) if axis != self.axis]
        return math.prod(others) * self.rows.shape[1]


def axis_of(module: nn.Module, dim: int) -> int:
    """Axis of `module.weight` that holds outputs (dim 0) or inputs (dim 1)."""
    if module.weight.dim() == 1:  # type: ignore[operator]
        return 0
    return 1 - dim if isinstance(module, Conv1D) else dim  # Conv1D stores (in, out)


def inputs_of(outlet: nn.Module) -> int:
    """Number of input columns of an outlet."""
    return _size(outlet, 1)


def _size(module: nn.Module, dim: int) -> int:
    """Number of outputs (dim 0) or inputs (dim 1) of a module."""
    return int(_weight(module).shape[axis_of(module, dim)])


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor), f"a {type(module).__name__} has no weight"
    return weight


def slices(model: PreTrainedModel, group: Group) -> list[Slice]:
    """The slices of weights that the units of a group own, the outlet's columns first."""
    return [piece for piece in owned_slices(model, group) if piece.name == "weight"]


def owned_slices(model: PreTrainedModel, group: Group) -> list[Slice]:
    """Every tensor slice that the units of a group own, the outlet's columns first."""
    stack = stack_of(model, group)
    layer = layer_of(model, group)
    if group.kind == "neuron":
        return _neuron_slices(layer, ffn_of(layer, stack))
    return _head_slices(layer, stack.attentions[group.part])


def config_of(model: PreTrainedModel, stack: Stack) -> PreTrainedConfig:
    """The part of a model's config that describes a stack."""
    *path, _ = stack.depth.split(".")
    return functools.reduce(getattr, path, model.config)


def layer_of(model: PreTrainedModel, group: Group) -> nn.Module:
    """The layer that a group lies in."""
    return model.base_model.get_submodule(f"{stack_of(model, group).layers}.{group.layer}")


def moe_of(model: PreTrainedModel, block: Block) -> tuple[nn.Module, nn.Module]:
    """The router and the experts of one layer."""
    stack = row_of(model.config.model_type).stacks[block.stack]
    assert stack.moe is not None, "only a stack with experts has such a block"
    layer = model.base_model.get_submodule(f"{stack.layers}.{block.layer}")
    return layer.get_submodule(stack.moe.router), layer.get_submodule(stack.moe.experts)


def routing_of(model: PreTrainedModel, block: Block) -> list[tuple[nn.Module, str, int]]:
    """The tensors that choose a layer's experts: (module, name, axis of the experts)."""
    stack = row_of(model.config.model_type).stacks[block.stack]
    assert stack.moe is not None, "only a stack with experts has such a block"
    router = moe_of(model, block)[0]
    found = [(router, name, 0) for name, _ in router.named_parameters(recurse=False)]
    if stack.moe.correction:
        path, _, name = stack.moe.correction.rpartition(".")
        layer = model.base_model.get_submodule(f"{stack.layers}.{block.layer}")
        found.append((layer.get_submodule(path), name, -1))
    return found


def _head_slices(layer: nn.Module, row: Attention) -> list[Slice]:
    outlet = layer.get_submodule(row.o)
    dim = int(getattr(layer.get_submodule(row.at), row.dim))
    heads = inputs_of(outlet) // dim
    found = [Slice(outlet, 1, _blocks(heads, dim))]
    if not heads:
        return found
    q = layer.get_submodule(row.q)
    outputs = _size(q, 0) // dim
    if row.layout == "split":
        k, v = layer.get_submodule(row.k), layer.get_submodule(row.v)
        kv = _size(k, 0) // dim
        found += [
            Slice(q, 0, _blocks(heads, dim)),
            Slice(k, 0, _blocks(kv, dim), per_kv=True),
            Slice(v, 0, _blocks(kv, dim), per_kv=True),
        ]
    else:
        kv = (outputs - heads) // 2
        found += _fused_slices(q, row.layout, heads, kv, dim)
    found += [
        Slice(module, 0, _blocks(heads, dim), per_token=not row.positions)
        for module in present(layer, row.follow)
    ]
    at = layer.get_submodule(row.at)
    found += [
        Slice(at, 0, _blocks(heads, 1), name=name)
        for name in row.own
        if getattr(at, name, None) is not None
    ]
    found += [Slice(module, 1, _blocks(heads, 1)) for module in present(layer, (row.bias,))]
    return found


def _fused_slices(qkv: nn.Module, layout: str, heads: int, kv: int, dim: int) -> list[Slice]:
    """Where query, key and value rows lie in one matrix."""
    if layout == "concat":
        q, k, v = (
            _blocks(heads, dim),
            _blocks(kv, dim, offset=heads * dim),
            _blocks(kv, dim, offset=(heads + kv) * dim),
        )
    else:  # "per_head" is "per_group" with one query head per group
        queries = heads // kv
        block = (queries + 2) * dim
        starts = torch.arange(kv)[:, None] * block
        q = (starts[:, :, None] + _blocks(queries, dim)[None]).reshape(heads, dim)
        k = starts + queries * dim + torch.arange(dim)
        v = k + dim
    return [Slice(qkv, 0, q), Slice(qkv, 0, k, per_kv=True), Slice(qkv, 0, v, per_kv=True)]


def _neuron_slices(layer: nn.Module, row: Ffn) -> list[Slice]:
    outlet = layer.get_submodule(row.down)
    neurons = inputs_of(outlet)
    rows = _blocks(neurons, 1)
    if row.fused:
        rows = torch.cat([rows, rows + neurons], dim=1)
    return [Slice(outlet, 1, _blocks(neurons, 1))] + [
        Slice(module, 0, rows) for module in present(layer, row.ups)
    ]


def present(layer: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """Those of the modules that the layer has."""
    known = dict(layer.named_modules())
    return [known[path] for path in paths if path and path in known]


def ffn_of(layer: nn.Module, stack: Stack) -> Ffn:
    """The FFN of a layer that has one: its own, or the one beside its experts."""
    found = _ffn(layer, stack)
    assert found is not None, "only a layer with an FFN has a group of neurons"
    return found


def _ffn(layer: nn.Module, stack: Stack) -> Ffn | None:
    ffns = (stack.ffn, stack.moe.shared if stack.moe else None)
    return next((ffn for ffn in ffns if ffn and present(layer, (ffn.down,))), None)


def _blocks(count: int, size: int, offset: int = 0) -> torch.Tensor:
    """(count, size) indices of consecutive blocks of rows."""
    return torch.arange(offset, offset + count * size).reshape(count, size)


def _groups(layer: nn.Module, stack: Stack, number: int, index: int) -> list[Group]:
    """The groups of one layer, in forward order."""
    parts: list[int | None] = [*range(len(stack.attentions))]
    if _ffn(layer, stack):  # a layer of experts may have none
        parts.append(None)
    return [_group(layer, stack, number, index, part) for part in parts]


def _experts(layer: nn.Module, stack: Stack, number: int, index: int) -> list[Block]:
    """The routed experts of one layer, if it has any."""
    found = present(layer, (stack.moe.router, stack.moe.experts)) if stack.moe else []
    if len(found) < 2:
        return []
    assert stack.moe is not None
    router, experts = found
    count = _size(router, 0)
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
            (_size(router, 1),) * count,
            routed_weights=chosen * matrices,
            least=chosen,
            pinned=tuple(range(count)) if in_groups else (),
        )
    ]


def _read_layers(model: PreTrainedModel, stack: Stack, count: int) -> tuple[int, tuple[int, ...]]:
    """How many layers of a stack anybody reads, and which of all must stay."""
    if stack.tapped:
        config = config_of(model, stack)
        return count, tuple(sorted({*stack.pinned, *getattr(config, stack.tapped)}))
    if not stack.read:
        return count, tuple(n for n in stack.pinned if n < count)
    said = getattr(model.config, stack.read)
    if not isinstance(said, int) or said >= 0:  # counted from the front: none may move
        said = max(said, default=-1) if isinstance(said, list | tuple) else said
        return count if said < 0 else said, tuple(range(count))
    read = count + 1 + said  # the embeddings' output is number 0
    return read, tuple(range(read, count))


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
    found = [piece for row in stack.attentions for piece in _head_slices(layer, row)]
    if ffn := _ffn(layer, stack):
        found += _neuron_slices(layer, ffn)
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
        found, at, outlet_path = _neuron_slices(layer, ffn), ffn.down, ffn.down
        columns, inside = 1, []
    else:
        row = stack.attentions[part]
        found, at, outlet_path = _head_slices(layer, row), row.at, row.o
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
