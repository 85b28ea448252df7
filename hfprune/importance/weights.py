"""What the weights themselves say: their norms, and by what they are known again."""

from __future__ import annotations

import zlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hfprune.importance.gates import outlet_of
from hfprune.structure.anatomy import Anatomy, Block, Group, axis_of, moe_of, slices

_LOOKED_AT = 4096
"""Numbers of an outlet: those of two fine-tuned models are never all alike."""


def digest(model: PreTrainedModel, anatomy: Anatomy) -> str:
    """A short text that other weights of the same structure do not have: of some numbers of every
    outlet, in bfloat16, so that the same weights in another precision have it, too.

    "" of weights that are not all here, sharded or offloaded: not every process may be asking.
    """
    found = 0
    for group in anatomy:
        weight = outlet_of(model, group).get_parameter("weight").detach()
        if isinstance(weight, DTensor) or weight.is_meta:
            return ""
        values = weight.flatten()
        some = values[:: max(1, len(values) // _LOOKED_AT)].to("cpu", torch.bfloat16).contiguous()
        found = zlib.crc32(some.view(torch.uint8).numpy().tobytes(), found)
    return f"{found:08x}"


def outlet_rows(model: PreTrainedModel, group: Group) -> torch.Tensor:
    """An outlet's weights as (columns, outputs)."""
    outlet = outlet_of(model, group)
    (weight,) = _whole(outlet, "weight")
    return weight if axis_of(outlet, 1) == 0 else weight.T


def weight_norms(model: PreTrainedModel, group: Group | Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared weight norms, float64: (units, columns) of the outlet, (units,) of all of a unit.

    The key and value of a KV group count for each of its query heads. Of an expert, whose routing
    weight is its gate, the outlet is the expert itself.
    """
    if isinstance(group, Block):
        tensors = [p.double().flatten(1) for p in _whole(moe_of(model, group)[1])]
        norms = torch.stack([t.square().sum(dim=1) for t in tensors]).sum(dim=0).cpu()
        return norms[:, None], norms
    columns = outlet_rows(model, group).double().square().sum(dim=1).cpu()
    total = torch.zeros(group.units, dtype=torch.float64)
    for piece in slices(model, group):
        weight = _whole(piece.module, "weight")[0].double().square()
        axis = axis_of(piece.module, piece.dim)
        rows = (weight if weight.dim() == 1 else weight.sum(dim=1 - axis)).cpu()
        owned = rows[piece.rows].sum(dim=1)
        total += owned.repeat_interleave(group.heads_per_kv) if piece.per_kv else owned
    return columns.reshape(group.units, group.columns), total


def _whole(module: nn.Module, *names: str) -> list[torch.Tensor]:
    """The values of the named parameters of a module, or of all of its own, whether they are
    sharded or offloaded.
    """
    from accelerate.utils import align_module_device  # a second to import

    with align_module_device(module):
        own = dict(module.named_parameters(recurse=False))
        values = [own[name].detach() for name in names or own]
        return [v.full_tensor() if isinstance(v, DTensor) else v for v in values]
