"""Inlets: the linear layers that make units out of the residual stream (query, key and value, up
and gate projections). They are refitted to the stream that the pruned layers before them leave.

An outlet gives the stream back what can be made of its own units. What is still missing can in part
be read off the rest of the stream: so each inlet is refitted, too, by least squares to what the
dense inlet makes of the dense stream. Inlets of one input share its moments, and the dense ones are
linear: the second moments of both streams are all that is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import nn
from transformers import PreTrainedModel

from hfprune.recovery.layer_calls import LayerCall, Reached
from hfprune.recovery.least_squares import NormalEquations, best_fit
from hfprune.recovery.origin import Origin
from hfprune.recovery.rows import as_rows, has_bias, write_rows
from hfprune.structure.anatomy import Group
from hfprune.structure.slices import kept_rows, layer_of, slices

Read = dict[tuple[str, ...], torch.Tensor]
"""Paths in the layer of the inlets that share an input -> it, (positions, features)."""


def inlets_of(model: PreTrainedModel, group: Group) -> dict[str, nn.Module]:
    """The inlets of a group, by their paths in the layer."""
    layer = layer_of(model, group)
    paths = {module: path for path, module in layer.named_modules()}
    pieces = [piece for piece in slices(model, group) if piece.dim == 0 and piece.per_token]
    return {paths[p.module]: p.module for p in pieces if p.parameter.dim() == 2}


@contextmanager
def reading(
    model: PreTrainedModel, group: Group, call: LayerCall, stop: bool = False
) -> Iterator[Read]:
    """Collect what a group's inlets read in the coming run of their layer, if it is the stream: the
    keys of a decoder's cross-attention read another. With `stop` the run ends by `Reached` then.
    """
    inlets = inlets_of(model, group)
    entered: dict[str, torch.Tensor] = {}
    found: Read = {}

    def at_inlet(path: str, states: torch.Tensor) -> None:
        entered[path] = states
        if len(entered) < len(inlets):
            return
        together: dict[int, list[str]] = {}
        for name in inlets:
            if call.is_stream(entered[name], group.layer):
                together.setdefault(id(entered[name]), []).append(name)
        found.update((tuple(p), call.real_rows(entered[p[0]])) for p in together.values())
        if stop:
            raise Reached

    hooks = [
        module.register_forward_pre_hook(lambda _, args, path=path: at_inlet(path, args[0]))
        for path, module in inlets.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def refit_inlets(
    origin: Origin,
    group: Group,
    calls: Sequence[LayerCall],
    read: Sequence[Read],
    counts: Sequence[torch.Tensor],
) -> None:
    """Set the inlets of a pruned group to the best fits.

    Args:
        origin: of the pruned model, which knows the group's units.
        group: in the pruned model.
        calls: of its layer.
        read: what the dense inlets read in each call.
        counts: per call, (positions,) what each counts.
    """
    twin, units = origin.twin(group), origin.units(group)
    theirs, ours = inlets_of(origin.dense, twin), inlets_of(origin.pruned, group)
    if not ours:
        return
    rows = kept_rows(slices(origin.dense, twin), units, twin.kv_of(units))
    sums: dict[tuple[str, ...], tuple[NormalEquations, NormalEquations]] = {}
    for number, call in enumerate(calls):
        with reading(origin.pruned, group, call, stop=True) as now, suppress(Reached):
            call.run(layer_of(origin.pruned, group), group.layer)
        for paths in now.keys() & read[number].keys():
            both = torch.cat([now[paths], read[number][paths]], dim=1)
            empty = both.new_zeros(both.shape[1] + 1, 0, dtype=torch.float64)
            pair = sums.setdefault(
                paths, (NormalEquations.like(empty), NormalEquations.like(empty))
            )
            for equations, where in zip(pair, (~call.held, call.held), strict=True):
                equations.add(both[where], both[where, :0], counts[number][where])
    while sums:  # one pair of moments, the largest matrices here, at a time
        paths, (fit, held) = sums.popitem()
        chosen = {}
        for path in paths:
            wanted = as_rows(theirs[path])[:, rows[theirs[path], 0]]
            current = as_rows(ours[path])
            judged = _through(fit, wanted), _through(held, wanted)
            chosen[path] = best_fit(*judged, current, len(current) - 1, has_bias(ours[path]))
        fit.absorb(held)
        for path, choice in chosen.items():
            equations = _through(fit, as_rows(theirs[path])[:, rows[theirs[path], 0]])
            solution, current = choice(equations), as_rows(ours[path])
            if equations.error(solution) < equations.error(current):
                write_rows(ours[path], solution)


def _through(both: NormalEquations, wanted: torch.Tensor) -> NormalEquations:
    """From the moments of the pruned and the dense stream, side by side, those of regressing on the
    one what weights (features + 1, outputs) make of the other.
    """
    features = len(wanted) - 1
    first = torch.arange(features, device=wanted.device)
    one = wanted.new_full((1,), 2 * features, dtype=torch.long)
    ours, theirs = torch.cat([first, one]), torch.cat([first + features, one])
    targets = (wanted * (both.inputs[theirs][:, theirs] @ wanted)).sum()
    return NormalEquations(
        both.inputs[ours][:, ours],
        both.inputs[ours][:, theirs] @ wanted,
        float(targets),
        both.count,
    )
