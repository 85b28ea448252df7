"""Compensation: the kept units take over what the removed ones did, by least squares and without
training.

Removing units changes what an outlet hands to the residual stream. Its remaining columns are
refitted so that the stream on calibration data is again what the dense model's was: ridge
regression in float64, layer by layer in forward order, each on the inputs that the already pruned
and refitted layers before it really give. The closed form is that of layer-wise reconstruction (He
et al. 2017, arXiv:1707.06168). The target is the dense model's residual stream after the outlet,
not the outlet's own output: so each outlet also takes back the error that earlier layers left in
the stream.

Fits are judged on a held-out part of the batches. It chooses the ridge, which pulls to the weights
as they are, and leaves an outlet alone where no fit is better there than what it has.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfprune.errors import DataError, HfpruneError
from hfprune.importance.gates import evaluating, outlet_of
from hfprune.importance.losses import Batch, is_decoder, padding_mask
from hfprune.recovery.least_squares import RIDGES, UNCHOSEN, Moments, solve
from hfprune.structure.anatomy import Anatomy, Block, Group, axis_of, layer_of
from hfprune.structure.architectures import row_of
from hfprune.structure.cost import Selection

logger = logging.getLogger(__name__)

HELD_OUT = 5
"""One batch in so many is held out to choose the ridge."""


@dataclass
class _Call:
    """How a layer was called in one batch: the hidden state, and the rest of its arguments."""

    hidden: torch.Tensor
    # Per layer: (args after the hidden state, kwargs).
    rest: list[tuple[tuple[object, ...], dict[str, object]]]
    mask: torch.Tensor | None  # (batch, tokens): which positions are not padding


def compensate(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    batches: Sequence[Batch],
    kept: Selection | None = None,
) -> PreTrainedModel:
    """Refit every outlet of a pruned model, in place, to the dense model's residual stream.

    Memory: the hidden states of all batches twice, the residual sums of one layer, and one
    (columns x columns) covariance in float64. Time: about five forward passes over the layers.

    Args:
        dense: the model before removal.
        pruned: the model after removal.
        batches: calibration batches; labels are not read.
        kept: what stayed, `PruningPlan.keep`; needed where whole layers went. The layer before them
            takes over their work: its last outlet is refitted to the sum that they leave.

    Returns:
        The pruned model.

    Raises:
        DataError: there are no batches.
        HfpruneError: layers went, and `kept` does not say which.
    """
    if not len(batches):
        raise DataError("There are no calibration batches to compensate on; give at least one.")
    anatomy, before = Anatomy.of(pruned), Anatomy.of(dense)
    layers = [_layers(before.stacks[stack.stack], stack, kept or {}) for stack in anatomy.stacks]
    dense_groups = {(g.stack, g.layer, g.kind, g.part): g for g in before}
    twins = {
        g.name: dense_groups[g.stack, layers[g.stack][g.layer][0], g.kind, g.part] for g in anatomy
    }
    experts = {(b.stack, b.layer): b.units for b in before.experts}
    fewer_experts = {
        (b.stack, b.layer)
        for b in anatomy.experts
        if b.units < experts[b.stack, layers[b.stack][b.layer][0]]
    }
    bar = tqdm(total=len(anatomy.groups), desc="compensating", delay=2, leave=False)
    with torch.no_grad(), evaluating(dense), evaluating(pruned):
        for index, stack in enumerate(row_of(pruned.config.model_type).stacks):
            groups = [g for g in anatomy if g.stack == index]
            changed = [
                g
                for g in groups
                if g.units < twins[g.name].units
                or layers[index][g.layer] != (g.layer, g.layer)
                or (index, g.layer) in fewer_experts
            ]
            if not changed:
                continue
            decoder = is_decoder(pruned, changed[0])
            ours = _calls(pruned, stack.layers, batches, decoder)
            theirs = _calls(dense, stack.layers, batches, decoder)
            for before_first in range(layers[index][0][0]):
                _advance(dense, stack.layers, theirs, before_first)
            for layer, (own, last) in enumerate(layers[index]):
                here = [g for g in groups if g.layer == layer]
                same = [twins[g.name] for g in here]
                points = [_sum_point(dense, g, theirs[0], own) for g in same]
                sums = _dense_sums(dense, stack.layers, same, points, theirs, own)
                for gone in range(own + 1, last + 1):
                    end = dense_groups.get((index, gone, same[-1].kind, same[-1].part))
                    # Where experts come after the last outlet, its sum is not the layer's.
                    if end is None or points[-1] is None or end.kind != "neuron":
                        _advance(dense, stack.layers, theirs, gone)
                    else:
                        sums[-1:] = _dense_sums(
                            dense, stack.layers, [end], points[-1:], theirs, gone
                        )
                for group, point, targets in zip(here, points, sums, strict=True):
                    # An outlet that lost nothing is refitted too, once the layers before it have
                    # changed.
                    if layer >= changed[0].layer:
                        _refit(pruned, group, ours, layer, point, targets)
                    bar.update()
                _advance(pruned, stack.layers, ours, layer)
    bar.close()
    return pruned


def _layers(dense: Block, pruned: Block, kept: Selection) -> list[tuple[int, int]]:
    """For each layer of a pruned stack: which dense layer it is, and the last it stands for."""
    stayed = sorted(kept.get(dense.name, range(dense.units)))
    if len(stayed) != pruned.units:
        raise HfpruneError(
            f"{dense.name}: the pruned model has {pruned.units} layers and the dense one"
            f" {dense.units}; say which of them stayed, compensate(..., kept=plan.keep)."
        )
    return list(zip(stayed, dense.stands_for(stayed), strict=True))


class _Reached(Exception):
    """All that is wanted of a forward pass is known; what comes after need not run."""


def _calls(
    model: PreTrainedModel, layers: str, batches: Sequence[Batch], decoder: bool
) -> list[_Call]:
    """Run the model up to its last layer and keep how each of its layers is called."""
    modules = list(model.base_model.get_submodule(layers).children())

    def stop(module: nn.Module, args: object, output: object) -> None:
        raise _Reached

    calls = []
    for batch in batches:
        seen: list[tuple[tuple[object, ...], dict[str, object]]] = []

        def see(
            module: nn.Module,
            args: tuple[object, ...],
            kwargs: dict[str, object],
            seen: list = seen,
        ) -> None:
            seen.append((args, kwargs))

        hooks = [m.register_forward_pre_hook(see, with_kwargs=True) for m in modules]
        hooks.append(modules[-1].register_forward_hook(stop))
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        try:
            model(**inputs, **({"use_cache": False} if model.can_generate() else {}))
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        rest = [(args[1:], kwargs) for args, kwargs in seen]
        hidden = seen[0][0][0]
        assert isinstance(hidden, torch.Tensor)
        mask = padding_mask(inputs, hidden, decoder)
        calls.append(_Call(hidden, rest, None if mask is None else mask.bool()))
    return calls


def _run(layer: nn.Module, call: _Call, index: int) -> torch.Tensor:
    """The layer's output hidden state for one batch."""
    args, kwargs = call.rest[index]
    output = layer(call.hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _sum_point(dense: PreTrainedModel, group: Group, call: _Call, index: int) -> str | None:
    """Where an outlet's output joins the residual stream: the module whose input is the sum.

    Found by looking rather than by a table: in one batch, the first module input (or "" for the
    layer's output) that is the outlet's output plus a tensor seen before. None where a norm or a
    scale lies between, as in Gemma 3.
    """
    layer, outlet = layer_of(dense, group), outlet_of(dense, group)
    paths = {module: path for path, module in layer.named_modules()}
    seen: list[torch.Tensor] = [call.hidden]
    after: list[tuple[str, torch.Tensor]] = []
    output: list[torch.Tensor] = []

    def look(module: nn.Module, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor) and args[0].shape == call.hidden.shape:
            if output:
                after.append((paths[module], args[0]))
            else:
                seen.append(args[0])

    hooks = [m.register_forward_pre_hook(look) for m in paths if m is not layer]
    hooks.append(outlet.register_forward_hook(lambda module, args, out: output.append(out)))
    try:
        after.append(("", _run(layer, call, index)))
    finally:
        for hook in hooks:
            hook.remove()
    for path, tensor in after:
        rest = (tensor - output[0]).float()
        scale = rest.abs().max()
        if any((rest - s.float()).abs().max() < 0.01 * scale for s in seen):
            return path
    return None


@contextmanager
def _watch(
    model: PreTrainedModel,
    group: Group,
    point: str | None,
    mask: torch.Tensor | None,
    stop: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Collect, of the coming run, the outlet's "input", its "output" and the residual "sum".

    Each is (positions, features) without padding. Where there is no sum point, the sum is the
    output. With `stop` the run ends by `_Reached` once all three are known.
    """
    found: dict[str, torch.Tensor] = {}
    layer, outlet = layer_of(model, group), outlet_of(model, group)

    def flat(tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.flatten(0, -2)
        return rows if mask is None else rows[mask.flatten()]

    def at_outlet(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found["input"], found["output"] = flat(args[0]), flat(output)
        found.setdefault("sum", found["output"])
        if stop and point is None:
            raise _Reached

    def at_sum(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found["sum"] = flat(args[0])
        if stop:
            raise _Reached

    def at_end(
        module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]
    ) -> None:
        found["sum"] = flat(output[0] if isinstance(output, tuple) else output)

    hooks = [outlet.register_forward_hook(at_outlet)]
    if point == "":
        hooks.append(layer.register_forward_hook(at_end))
    elif point is not None:
        hooks.append(layer.get_submodule(point).register_forward_pre_hook(at_sum))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _dense_sums(
    dense: PreTrainedModel,
    layers: str,
    groups: Sequence[Group],
    points: Sequence[str | None],
    calls: Sequence[_Call],
    index: int,
) -> list[list[torch.Tensor]]:
    """Per group and batch the dense residual sum; the calls advance to the next layer."""
    layer = dense.base_model.get_submodule(f"{layers}.{index}")
    sums: list[list[torch.Tensor]] = [[] for _ in groups]
    for call in calls:
        with ExitStack() as stack:
            found = [
                stack.enter_context(_watch(dense, group, point, call.mask))
                for group, point in zip(groups, points, strict=True)
            ]
            hidden = _run(layer, call, index)
        call.hidden = hidden
        for known, values in zip(sums, found, strict=True):
            known.append(values["sum"])
    return sums


def _advance(model: PreTrainedModel, layers: str, calls: Sequence[_Call], index: int) -> None:
    layer = model.base_model.get_submodule(f"{layers}.{index}")
    for call in calls:
        call.hidden = _run(layer, call, index)


def _refit(
    pruned: PreTrainedModel,
    group: Group,
    calls: Sequence[_Call],
    index: int,
    point: str | None,
    targets: Sequence[torch.Tensor],
) -> None:
    """Set an outlet's weights, and its bias if it has one, to the least-squares solution."""
    outlet = outlet_of(pruned, group)

    def moments(batch: int) -> Moments:
        call = calls[batch]
        with _watch(pruned, group, point, call.mask, stop=True) as found, suppress(_Reached):
            _run(layer_of(pruned, group), call, index)
        # What the outlet should give, so that the sum with the pruned model's own stream is the
        # dense sum.
        wanted = targets[batch] - (found["sum"] - found["output"])
        return Moments.of(found["input"], wanted)

    train, held_out = _parts(len(calls))
    fit = _total(moments(i) for i in train)
    held = _total(moments(i) for i in held_out) if held_out else None
    current = _as_rows(outlet)
    bias = getattr(outlet, "bias", None) is not None
    everything = fit if held is None else fit + held
    if everything.count < len(current):
        logger.warning(
            "%s has %d columns and only %d calibration tokens: give more examples.",
            group.outlet,
            len(current) - 1,
            everything.count,
        )
    best = UNCHOSEN
    if held is not None:
        errors = {ridge: held.error(solve(fit, current, ridge, bias)) for ridge in RIDGES}
        best = min(errors, key=errors.__getitem__)
        if errors[best] >= held.error(current):
            return  # what a fit would gain on these examples it would lose on others
    solution = solve(everything, current, best, bias)
    if everything.error(solution) < everything.error(current):
        _write(outlet, solution)


def _parts(count: int) -> tuple[list[int], list[int]]:
    """Batch numbers to fit on and to choose the ridge on."""
    held = [i for i in range(count) if i % HELD_OUT == HELD_OUT - 1]
    return [i for i in range(count) if i not in set(held)], held


def _total(parts: Iterable[Moments]) -> Moments:
    return functools.reduce(operator.add, parts)


def _as_rows(outlet: nn.Module) -> torch.Tensor:
    """An outlet's weights as (columns + 1, outputs) float64, the last row the bias or zeros."""
    weight: torch.Tensor = outlet.weight.detach()  # type: ignore[operator]
    rows = (weight if axis_of(outlet, 1) == 0 else weight.T).double()
    bias: torch.Tensor | None = getattr(outlet, "bias", None)
    last = rows.new_zeros(rows.shape[1]) if bias is None else bias.detach().double()
    return torch.cat([rows, last[None]])


def _write(outlet: nn.Module, rows: torch.Tensor) -> None:
    weight: torch.Tensor = outlet.weight  # type: ignore[assignment]
    weight.copy_(rows[:-1] if axis_of(outlet, 1) == 0 else rows[:-1].T)
    if getattr(outlet, "bias", None) is not None:
        outlet.bias.copy_(rows[-1])  # type: ignore[operator]
