"""Where the units of a group lie: which rows or columns of which tensors are theirs."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfprune.structure.architectures import Attention, Ffn, Stack, row_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hfprune.structure.anatomy import Block, Group


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
    return size_of(outlet, 1)


def size_of(module: nn.Module, dim: int) -> int:
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
        return neuron_slices(layer, ffn_of(layer, stack))
    return head_slices(layer, stack.attentions[group.part])


def lists_of_layers(model: PreTrainedModel) -> list[str]:
    """Paths in the base model of its lists of layers, of nested ones the outer; also of a family
    that has no row.
    """
    modules = model.base_model.named_modules()
    paths = [path for path, module in modules if isinstance(module, nn.ModuleList)]
    inside = tuple(f"{path}." for path in paths)
    return [path for path in paths if not path.startswith(inside)]


def stack_of(model: PreTrainedModel, group: Group) -> Stack:
    """The row's stack that a group of this model belongs to."""
    return row_of(model.config.model_type).stacks[group.stack]


def config_of(config: PreTrainedConfig, stack: Stack) -> PreTrainedConfig:
    """The part of a model's config that describes a stack."""
    *path, _ = stack.depth.split(".")
    return functools.reduce(getattr, path, config)


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


def head_slices(layer: nn.Module, row: Attention) -> list[Slice]:
    outlet = layer.get_submodule(row.o)
    dim = int(getattr(layer.get_submodule(row.at), row.dim))
    heads = inputs_of(outlet) // dim
    found = [Slice(outlet, 1, _blocks(heads, dim))]
    if not heads:
        return found
    q = layer.get_submodule(row.q)
    outputs = size_of(q, 0) // dim
    if row.layout == "split":
        k, v = layer.get_submodule(row.k), layer.get_submodule(row.v)
        kv = size_of(k, 0) // dim
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


def neuron_slices(layer: nn.Module, row: Ffn) -> list[Slice]:
    outlet = layer.get_submodule(row.down)
    neurons = inputs_of(outlet)
    rows = _blocks(neurons, 1)
    if row.fused:
        rows = torch.cat([rows, rows + neurons], dim=1)
    return [Slice(outlet, 1, _blocks(neurons, 1))] + [
        Slice(module, 0, rows) for module in present(layer, row.ups)
    ]


def kept_rows(
    found: Iterable[Slice], units: Sequence[int], kv: Sequence[int]
) -> dict[tuple[nn.Module, int], torch.Tensor]:
    """{(module, dim): indices that stay, ascending} where these units, in these KV groups, stay:
    several slices may lie in one fused matrix.
    """
    rows: dict[tuple[nn.Module, int], list[torch.Tensor]] = {}
    for piece in found:
        kept = piece.rows[list(kv if piece.per_kv else units)].flatten()
        rows.setdefault((piece.module, piece.dim), []).append(kept)
    return {where: torch.cat(parts).sort().values for where, parts in rows.items()}


def present(layer: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """Those of the modules that the layer has."""
    found = []
    for path in filter(None, paths):
        with suppress(AttributeError):
            found.append(layer.get_submodule(path))
    return found


def ffn_of(layer: nn.Module, stack: Stack) -> Ffn:
    """The FFN of a layer that has one: its own, or the one beside its experts."""
    found = ffn_in(layer, stack)
    assert found is not None, "only a layer with an FFN has a group of neurons"
    return found


def ffn_in(layer: nn.Module, stack: Stack) -> Ffn | None:
    """The FFN of a layer, if it has one."""
    ffns = (stack.ffn, stack.moe.shared if stack.moe else None)
    return next((ffn for ffn in ffns if ffn and present(layer, (ffn.down,))), None)


def _blocks(count: int, size: int, offset: int = 0) -> torch.Tensor:
    """(count, size) indices of consecutive blocks of rows."""
    return torch.arange(offset, offset + count * size).reshape(count, size)
