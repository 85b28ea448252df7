"""What a structure costs, analytically: parameters and multiply-accumulates (MACs) of the layers.

A `Selection` is {name of a group or block: kept unit indices}; what it leaves out stays whole.
Budgets are shares of the layers' cost: embeddings and task heads are not for removing, so a share
of them would promise what no plan can keep. They are shown beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hfprune.errors import HfpruneError
from hfprune.structure.anatomy import Anatomy, Block, Group
from hfprune.structure.architectures import ROWS, row_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

Selection = Mapping[str, Sequence[int]]

Tokens = int | tuple[int, ...]
"""Tokens of an example: one number for all stacks of layers, or one for each."""


def tokens_of(anatomy: Anatomy, given: float | Sequence[float]) -> Tokens:
    """Whole numbers of tokens; a single one where all stacks read equally many.

    Raises:
        HfpruneError: several numbers, and not one for each stack.
    """
    if not isinstance(given, Sequence):
        return round(given)
    if len(given) != len(anatomy.stacks):
        names = ", ".join(stack.name for stack in anatomy.stacks)
        raise HfpruneError(
            f"tokens has {len(given)} numbers; give one for all stacks of layers, or one for each"
            f" ({names})."
        )
    whole = tuple(max(1, round(count)) for count in given)
    return whole if len(set(whole)) > 1 else whole[0]


def tokens_in(tokens: Tokens, stack: int) -> int:
    """Tokens that one stack reads."""
    return tokens if isinstance(tokens, int) else tokens[stack]


def longest(tokens: Tokens) -> int:
    """Tokens of the stack that reads most."""
    return tokens if isinstance(tokens, int) else max(tokens)


def written_tokens(tokens: float | Sequence[float], digits: int = 0) -> str:
    """Numbers of tokens as people read them: "128", or "512 and 40" of two stacks."""
    each = tokens if isinstance(tokens, Sequence) else (tokens,)
    return " and ".join(f"{count:.{digits}f}" for count in each)


def group_params(group: Group, units: int, kv_groups: int) -> int:
    """Parameters of a group that keeps `units` units in `kv_groups` KV groups."""
    shared = group.shared_params if units else 0
    return units * group.unit_params + kv_groups * group.kv_params + shared + group.fixed_params


def group_macs(group: Group, units: int, kv_groups: int, tokens: Tokens) -> int:
    """MACs of a group for one example of `tokens` tokens: its matrices, and for heads scores and
    mixing of values.

    The keys and values of a cross-attention are of the tokens of the first stack, the encoder.
    Attention is counted as dense (tokens x tokens), as torch's FlopCounterMode counts it, whatever
    the mask.
    """
    if not units:
        return 0
    own = tokens_in(tokens, group.stack)
    seen = tokens_in(tokens, 0) if group.cross else own
    macs = own * units * group.unit_weights + seen * kv_groups * group.kv_weights
    if group.kind == "head":
        macs += 2 * own * seen * units * group.columns
        compared = group.position_terms * own * group.columns
        macs += units * group.positions * (group.position_weights + compared)
    return macs


def mixing_macs(columns: int, tokens: int, window: int) -> int:
    """MACs of comparing tokens and mixing their values in `columns` columns, without projections.

    Within windows (longformer), the example is padded to whole ones; scores are computed in chunks
    of two windows that overlap by half, values are mixed over a window and both its neighbours.
    """
    if not window:
        return 2 * tokens * tokens * columns
    tokens = -(-tokens // (2 * window)) * 2 * window
    return columns * ((tokens // window - 1) * (2 * window) ** 2 + tokens * 3 * window)


def block_macs(block: Block, units: Collection[int], tokens: Tokens) -> int:
    """MACs of the units of a block for one example, besides the groups and experts inside.

    Experts are counted as their eager implementation computes them: each token passes its router
    and the experts that it is sent to, `top_k` of them however many there are.
    """
    own = tokens_in(tokens, block.stack)
    weights = block.routed_weights + sum(block.unit_weights[n] for n in units if block.unit_weights)
    mixing = sum(
        mixing_macs(block.unit_mixing[n], own, block.unit_windows[n])
        for n in units
        if block.unit_mixing
    )
    return own * weights + mixing


def layers_params(anatomy: Anatomy, selection: Selection | None = None) -> int:
    """Parameters of the layers that a selection (everything, if None) leaves."""
    keep = selection or {}
    whole = sum(
        block.unit_params[unit] for block, units in _kept_blocks(anatomy, keep) for unit in units
    )
    return (
        whole
        + sum(group_params(g, len(units), len(g.kv_of(units))) for g, units in _kept(anatomy, keep))
        + _own_tables(anatomy, keep)
    )


def table_params(anatomy: Anatomy) -> dict[str, int]:
    """{group name: parameters of one head's position biases}, of attentions that share the table of
    layer 0 as long as their stack loses no heads (t5), and have their own as soon as it does.
    """
    stacks = row_of(anatomy.model_type).stacks if anatomy.model_type in ROWS else ()
    found: dict[str, int] = {}
    first: dict[tuple[int, int], int] = {}
    for group in anatomy:
        if group.kind == "head" and stacks and stacks[group.stack].attentions[group.part].bias:
            of_first = first.setdefault((group.stack, group.part), group.unit_params)
            if group.units and of_first > group.unit_params:
                found[group.name] = of_first - group.unit_params
    return found


def _own_tables(anatomy: Anatomy, keep: Selection) -> int:
    """Parameters of the tables of position biases that layers get of their own."""
    kept = {group.name: units for group, units in _kept(anatomy, keep)}
    changed = {b.stack for b in anatomy.stacks if 0 not in keep.get(b.name, (0,))}
    for name, units in kept.items():
        if anatomy[name].kind == "head" and len(units) < anatomy[name].units:
            changed.add(anatomy[name].stack)
    return sum(
        params * len(kept[name])
        for name, params in table_params(anatomy).items()
        if name in kept and anatomy[name].stack in changed
    )


def layers_macs(anatomy: Anatomy, tokens: Tokens, selection: Selection | None = None) -> int:
    """MACs of the layers that a selection leaves, for one example of `tokens` tokens."""
    return sum(stack_macs(anatomy, stack.stack, tokens, selection) for stack in anatomy.stacks)


def stack_macs(
    anatomy: Anatomy, stack: int, tokens: Tokens, selection: Selection | None = None
) -> int:
    """MACs of one stack of layers, as `layers_macs`."""
    keep = selection or {}
    whole = sum(
        block_macs(block, units, tokens)
        for block, units in _kept_blocks(anatomy, keep)
        if block.stack == stack
    )
    return whole + sum(
        group_macs(g, len(units), len(g.kv_of(units)), tokens)
        for g, units in _kept(anatomy, keep)
        if g.stack == stack
    )


def _kept(anatomy: Anatomy, keep: Selection) -> Iterator[tuple[Group, Sequence[int]]]:
    """The groups of the layers that stay, each with its kept units."""
    for group in anatomy:
        if group.layer in _kept_layers(anatomy, group.stack, keep):
            yield group, keep.get(group.name, range(group.units))


def _kept_blocks(anatomy: Anatomy, keep: Selection) -> Iterator[tuple[Block, Sequence[int]]]:
    """The stacks, and the experts of the layers that stay, each with its kept units."""
    for block in anatomy.blocks:
        if block.kind == "layer" or block.layer in _kept_layers(anatomy, block.stack, keep):
            yield block, keep.get(block.name, range(block.units))


def _kept_layers(anatomy: Anatomy, stack: int, keep: Selection) -> Sequence[int]:
    block = next(b for b in anatomy.blocks if b.kind == "layer" and b.stack == stack)
    return keep.get(block.name, range(block.units))


def counted_macs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> int:
    """MACs of one real forward pass of the whole model, as torch's FlopCounterMode counts.

    The pass runs the eager attention and experts: of the fused kernels the counter knows only some,
    and takes the others for free.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    # The counter follows arguments that require grad, and stumbles over parameters among them.
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with (
            _eager(model.config),
            torch.no_grad(),
            FlopCounterMode(display=False) as counter,
        ):
            model(**batch)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    return counter.get_total_flops() // 2


@contextmanager
def _eager(config: PreTrainedConfig) -> Iterator[None]:
    """Eager kernels while the context is open; each sub-config's own come back after."""
    kinds = ("_attn_implementation", "_experts_implementation")
    before = {kind: _kernels(config, kind) for kind in kinds}
    try:
        for kind in kinds:
            setattr(config, kind, "eager")
        yield
    finally:
        for kind, kernels in before.items():
            setattr(config, kind, kernels)


def _kernels(config: PreTrainedConfig, kind: str) -> dict[str, Any]:
    """The kernels of a config, at "", and of its sub-configs, as the setter of `kind` takes."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    inner = {name: _kernels(part, kind) for name, part in parts.items() if part is not None}
    return {"": getattr(config, kind), **inner}


def anatomy_table(anatomy: Anatomy, tokens: int = 128) -> str:
    """A table of the groups: kind, units, parameters, MACs for one example of `tokens` tokens."""
    rows = [("layer", "kind", "units", "parameters", f"MACs at {tokens} tokens")]
    for g in anatomy:
        kinds = f"{g.kind}s" if g.heads_per_kv == 1 else f"{g.kind}s in {g.kv_groups} KV groups"
        rows.append(
            (
                g.name,
                kinds,
                f"{g.units:,}",
                f"{group_params(g, g.units, g.kv_groups):,}",
                f"{group_macs(g, g.units, g.kv_groups, tokens):,}",
            )
        )
    for block in (*anatomy.experts, *anatomy.stacks):
        params = f"{sum(block.unit_params):,}"
        macs = f"{block_macs(block, range(block.units), tokens):,}"
        name = block.name if block.kind == "expert" else f"{block.name}, the rest"
        rows.append((name, f"{block.kind}s", f"{block.units:,}", params, macs))
    rows.append(
        ("all layers", "", "", f"{layers_params(anatomy):,}", f"{layers_macs(anatomy, tokens):,}")
    )
    rows.append(("outside the layers", "", "", f"{anatomy.outside_params:,}", ""))
    lines = aligned(rows, left={0, 1})
    return "\n".join([*lines, f"Note: {anatomy.note}."] if anatomy.note else lines)


def aligned(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """The rows of a text table as lines, the columns numbered in `left` to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
