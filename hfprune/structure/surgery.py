"""The only code that reshapes tensors: it cuts a model down to a selection of its units."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfprune.errors import HfpruneError
from hfprune.structure.anatomy import Anatomy, Block, Group
from hfprune.structure.architectures import Attention, Stack, row_of
from hfprune.structure.checkpoint import adopt, own_config
from hfprune.structure.cost import Selection
from hfprune.structure.fitness import check_whole
from hfprune.structure.modeling_hfprune import NUMBERS, PATCH, empty_attention, help_forward, resize
from hfprune.structure.slices import (
    axis_of,
    config_of,
    ffn_of,
    kept_rows,
    layer_of,
    moe_of,
    owned_slices,
    routing_of,
    stack_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cut(
    model: PreTrainedModel,
    selection: Selection,
    plan_summary: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Remove, in place, every unit that the selection does not keep, and return the model.

    Each kept tensor slice is copied, so the removed memory is free afterwards. The model becomes an
    instance of the generated subclass of its own class, and `config.hfprune` describes the
    structure.

    Args:
        model: a plain transformers model of a known family.
        selection: {name of a group or block: kept unit indices}; what is left out stays whole. The
            units of a stack ("encoder.layer") are its layers.
        plan_summary: a few plain values about the plan, appended to the config's lineage.

    Raises:
        HfpruneError: the selection names unknown groups or units, or uneven heads in the KV groups
            of one layer.
    """
    check_whole(model)
    anatomy = Anatomy.of(model)
    check_selection(anatomy, selection)
    selection = _without_dropped(anatomy, selection)
    own_config(model)
    _share_tables(model, anatomy, selection)
    for group in anatomy:
        keep = sorted(selection.get(group.name, range(group.units)))
        if len(keep) < group.units:
            kv = group.kv_of(keep)
            for (module, dim), rows in kept_rows(owned_slices(model, group), keep, kv).items():
                _take(module, dim, rows)
            layer, stack = layer_of(model, group), stack_of(model, group)
            if group.kind == "head":
                _count_heads(layer, stack.attentions[group.part], group, keep, len(kv))
            elif width := ffn_of(layer, stack).width:
                path, attribute = width.split(":")
                _set_present(layer.get_submodule(path), {attribute: len(keep)})
    stacks = row_of(model.config.model_type).stacks
    for block in anatomy.blocks:
        keep = sorted(selection.get(block.name, range(block.units)))
        if len(keep) < block.units and block.kind == "expert":
            _cut_experts(model, block, keep)
    for block in anatomy.blocks:
        keep = sorted(selection.get(block.name, range(block.units)))
        if len(keep) < block.units and block.kind == "layer":
            _drop_layers(model, stacks[block.stack], block, keep)
    return adopt(model, plan_summary)


@torch.inference_mode(False)  # of a tensor made in that mode nothing could be learnt any more
def copy_and_cut(
    model: PreTrainedModel,
    selection: Selection,
    plan_summary: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A pruned copy; the given model stays as it is. See `cut`."""
    return cut(copy.deepcopy(model), selection, plan_summary)


def check_selection(anatomy: Anatomy, selection: Selection) -> None:
    """Refuse a selection that the anatomy cannot take.

    Raises:
        HfpruneError: names the group and what is wrong.
    """
    blocks = {block.name: block for block in anatomy.blocks}
    for name, units in selection.items():
        if name in blocks:
            _check_block(blocks[name], units)
            continue
        if name not in anatomy:
            raise HfpruneError(
                f"The selection names {name!r}; this model has no such group of units."
            )
        group = anatomy[name]
        if not _are_numbers(units, group.units):
            raise HfpruneError(
                f"{name}: the kept units must be distinct and lie in 0...{group.units - 1}."
            )
        counts = {kv: 0 for kv in group.kv_of(units)}
        for unit in units:
            counts[unit // group.heads_per_kv] += 1
        if len(set(counts.values())) > 1:
            raise HfpruneError(
                f"{name}: every kept KV group must keep the same number of query heads, not "
                f"{sorted(counts.values())}: attention repeats each key the same number of times."
            )


def _without_dropped(anatomy: Anatomy, selection: Selection) -> Selection:
    """The selection without what it says about groups in layers that go: they go whole."""
    stay = {stack.stack: selection.get(stack.name, range(stack.units)) for stack in anatomy.stacks}
    gone = {group.name for group in anatomy if group.layer not in stay[group.stack]}
    return {name: units for name, units in selection.items() if name not in gone}


def _are_numbers(units: Sequence[int], below: int) -> bool:
    """Whether units are distinct whole numbers from 0 on."""
    whole = all(isinstance(unit, Integral) and 0 <= unit < below for unit in units)
    return whole and len(set(units)) == len(units)


def _check_block(block: Block, units: Sequence[int]) -> None:
    if not _are_numbers(units, block.units):
        raise HfpruneError(
            f"{block.name}: the kept {block.kind}s must be distinct and lie in "
            f"0...{block.units - 1}."
        )
    if len(units) < block.least or not set(block.pinned) <= set(units):
        need = f"at least {block.least}" + "".join(f", number {n} among them" for n in block.pinned)
        raise HfpruneError(
            f"{block.name}: {need} must stay of its {block.kind}s, not {list(units)}."
        )


def _cut_experts(model: PreTrainedModel, block: Block, keep: Sequence[int]) -> None:
    """Keep some of the routed experts of one layer, and their rows in the router."""
    router, experts = moe_of(model, block)
    around = model.base_model.get_submodule(block.name.rpartition(".")[0])
    kept = torch.tensor(keep)
    for module, name, axis in routing_of(model, block):
        tensor = getattr(module, name)
        cut_down = tensor.detach().index_select(axis, kept.to(tensor.device)).contiguous()
        if isinstance(tensor, nn.Parameter):
            cut_down = nn.Parameter(cut_down, requires_grad=tensor.requires_grad)
        setattr(module, name, cut_down)
    resize(router)
    _take(experts, 0, kept)
    for module in (router, experts, around):
        _set_present(module, {"num_experts": len(keep)})


_PER_LAYER = (
    *("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers"),
    "attention_window",
)
"""Config lists with a value per layer."""
_NUMBERED = ("mlp_only_layers", "fullatt_block_indexes", "deepstack_visual_indexes")
"""Config lists of layers."""
_FIRST = ("first_k_dense_replace", "moe_layer_start_index")
"""Config numbers of a layer from which on layers are of another kind."""
_LAST = ("moe_layer_end_index",)
"""Config numbers of a layer after which they are."""


def _drop_layers(model: PreTrainedModel, stack: Stack, block: Block, keep: Sequence[int]) -> None:
    """Keep some layers of a stack; number them anew in modules and config."""
    path, _, name = stack.layers.rpartition(".")
    layers = list(model.base_model.get_submodule(stack.layers).children())
    parent = model.base_model.get_submodule(path)
    setattr(parent, name, nn.ModuleList([layers[old] for old in keep]))
    for new, old in enumerate(keep):
        for module in layers[old].modules():
            _set_present(module, dict.fromkeys(NUMBERS, new))
    config, names = config_of(model.config, stack), stack.depth.split(".")[-1]
    before = {listed: getattr(config, listed, None) or () for listed in _NUMBERED}
    for named in (*_FIRST, *_LAST):
        if getattr(config, named, None) is not None:
            until = getattr(config, named) + (named in _LAST)
            stay = sum(layer < until for layer in keep)
            setattr(config, named, stay - (named in _LAST))
    for depth in names.split():
        if hasattr(config, depth):
            setattr(config, depth, len(keep))
    _set_present(parent, dict.fromkeys(names.split(), len(keep)))
    if hasattr(config, "stage_names"):  # vision backbones name their layers
        config.stage_names = config.stage_names[: len(keep) + 1]
        config.set_output_features_output_indices(out_features=None, out_indices=None)
    for listed in _PER_LAYER:
        values = getattr(config, listed, None)
        if isinstance(values, list) and len(values) == block.units:
            setattr(config, listed, [values[old] for old in keep])
    if hasattr(config, "attention_types"):  # gpt_neo reads its layers' kinds from runs of them
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    for listed in _NUMBERED:
        for owner in (config, parent):  # a tower may hold its config's list itself
            if getattr(owner, listed, None):
                numbers = [keep.index(n) for n in before[listed] if n in keep]
                setattr(owner, listed, numbers)


def _take(module: nn.Module, dim: int, index: torch.Tensor) -> None:
    """Keep the given output rows (dim 0) or input columns (dim 1) of a module, in place."""
    with torch.no_grad():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if name == "bias" and dim == 1:
                continue  # a bias has no inputs
            axis = axis_of(module, dim) if name == "weight" else 0
            kept = parameter.index_select(axis, index.to(parameter.device)).contiguous()
            setattr(module, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
    resize(module)


def _count_heads(
    layer: nn.Module, row: Attention, group: Group, keep: Sequence[int], kv: int
) -> None:
    """Write the new numbers of heads where the forward reads them."""
    at = layer.get_submodule(row.at)
    heads = len(keep)
    counts = dict.fromkeys(row.heads, heads) | dict.fromkeys(row.kv_heads, kv)
    counts |= dict.fromkeys(row.sizes, heads * group.columns)
    if kv:
        counts[row.groups] = heads // kv
    if not heads:
        _set_present(at, counts)
        inside = row.o.startswith(f"{row.at}.")
        empty_attention(at, row.o[len(row.at) + 1 :] if inside else "", row.patch)
        return
    if row.patch:
        before = vars(at)[PATCH]["heads"] if PATCH in vars(at) else range(group.units)
        help_forward(at, row.patch, [before[unit] for unit in keep])
    _set_present(at, counts)


def _set_present(module: nn.Module, values: Mapping[str, int]) -> None:
    """Set those of the attributes that a module has."""
    for name, value in values.items():
        if name in vars(module):
            setattr(module, name, value)


def _share_tables(model: PreTrainedModel, anatomy: Anatomy, selection: Selection) -> None:
    """Before layers differ in their heads, give each its own copy of layer 0's bias table (t5)."""
    everything = anatomy.everything
    changed = {
        g.stack
        for g in anatomy
        if g.kind == "head" and len(selection.get(g.name, everything[g.name])) < g.units
    }
    changed |= {
        b.stack
        for b in anatomy.blocks
        if b.kind == "layer" and 0 not in selection.get(b.name, (0,))
    }
    for group in anatomy:
        row = stack_of(model, group).attentions[group.part] if group.kind == "head" else None
        if row is None or row.patch not in ("own_bias", "no_bias") or group.stack not in changed:
            continue
        at = layer_of(model, group).get_submodule(row.at)
        if group.units and PATCH not in vars(at):
            help_forward(at, row.patch, list(range(group.units)))
            if row.patch == "own_bias" and group.layer:
                stack = stack_of(model, group)
                first = model.base_model.get_submodule(f"{stack.layers}.0.{row.bias}")
                at.relative_attention_bias = copy.deepcopy(first)
