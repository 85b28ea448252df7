"""The sweep of compensation: layer by layer in forward order, each refitted on what the already
refitted layers before it really give.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfprune.errors import DataError
from hfprune.importance.batches import Batch
from hfprune.importance.gates import outlet_of
from hfprune.recovery.inlets import Read, inlets_of, reading, refit_inlets
from hfprune.recovery.junctions import Junction, junction_of, watch
from hfprune.recovery.layer_calls import LayerCall, Reached, advance, layer_calls
from hfprune.recovery.least_squares import NormalEquations, best_fit
from hfprune.recovery.origin import Origin
from hfprune.recovery.rows import as_rows, has_bias, put_back, write_rows
from hfprune.recovery.token_weights import Weights
from hfprune.structure.anatomy import Group
from hfprune.structure.architectures import row_of
from hfprune.structure.slices import layer_of

logger = logging.getLogger(__name__)

_SPARED = 0.01
"""How little a scaling between an outlet and the stream may give a feature, in mean squares of all
features, before the outlet is spared the stream's error there: it would grow out of proportion.
"""


@dataclass
class _Target:
    """What an outlet should give, and what its inlets should see, one tensor for every call.

    Attributes:
        read: by the dense inlets, if they are to be refitted.
        sums: (positions, outputs) the dense model's residual stream after the outlet.
        outputs: of the dense outlet, less `unscaled` times what joined the stream.
        unscaled: what one unit of the stream's error is at the outlet's output; empty where its
            output joins the stream as it is.
    """

    read: list[Read] = field(default_factory=list)
    sums: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    unscaled: list[torch.Tensor] = field(default_factory=list)

    def wanted(self, call: int, stream: torch.Tensor) -> torch.Tensor:
        """The output that would give the dense sum with the pruned model's own stream."""
        joining = self.sums[call] - stream
        if not self.unscaled:
            return joining
        return self.outputs[call] + joining * self.unscaled[call]


def sweep(origin: Origin, batches: Sequence[Batch], weights: Sequence[Weights], bar: tqdm) -> None:
    """Refit the pruned model's groups, in place.

    Args:
        origin: of the pruned model.
        batches: calibration batches.
        weights: per batch, what each position counts at each dense outlet, where not all alike.
        bar: moves on with every group.

    Raises:
        DataError: no batch reaches a stack that changed, or all are padding there, or an outlet's
            inputs or target are not finite in one (it names both).
    """
    # Where every token counts alike, as in language models, inlets won nothing (docs/recovery.md).
    inlets = any(weights)
    for index, stack in enumerate(row_of(origin.pruned.config.model_type).stacks):
        changed = origin.changed(index)
        if not changed:
            continue
        ours = layer_calls(origin.pruned, stack.layers, batches)
        theirs = layer_calls(origin.dense, stack.layers, batches)
        if not ours:
            raise DataError(
                f"No calibration batch reaches {stack.layers}: give some that do, with images for a"
                " tower that reads them."
            )
        if not any(len(call.held) for call in ours):
            raise DataError("The calibration batches are all padding.")
        layers = origin.layers[index]
        for before_first in range(layers[0][0]):
            advance(origin.dense, stack.layers, theirs, before_first)
        for layer, (own, last) in enumerate(layers):
            here = [g for g in origin.after if (g.stack, g.layer) == (index, layer)]
            twins = [origin.twin(group) for group in here]
            junctions = [junction_of(origin.dense, twin, theirs[0], own) for twin in twins]
            targets = _targets(origin.dense, stack.layers, twins, junctions, theirs, own, inlets)
            for gone in range(own + 1, last + 1):
                end = origin.dense_group(twins[-1], gone)
                # Where experts come after the last outlet, its sum is not the layer's.
                if end is None or junctions[-1].sum is None or end.kind != "neuron":
                    advance(origin.dense, stack.layers, theirs, gone)
                else:
                    [further] = _targets(
                        origin.dense, stack.layers, [end], junctions[-1:], theirs, gone
                    )
                    targets[-1].sums = further.sums
            for group, junction, target in zip(here, junctions, targets, strict=True):
                # What lost nothing is refitted too, once the layers before it have changed.
                if layer >= changed[0].layer:
                    name = origin.twin(group).name
                    counts = [
                        weights[call.batch].get(
                            name, torch.ones_like(call.held, dtype=torch.float32)
                        )
                        for call in ours
                    ]
                    place = _Place(origin, group, ours, junction, target, counts)
                    # Before the first cut the stream is the dense one.
                    place.refit(inlets and group is not changed[0] and origin.knows(group))
                bar.update()
            advance(origin.pruned, stack.layers, ours, layer)


def _targets(
    dense: PreTrainedModel,
    layers: str,
    groups: Sequence[Group],
    junctions: Sequence[Junction],
    calls: Sequence[LayerCall],
    index: int,
    inlets: bool = False,
) -> list[_Target]:
    """What the dense layer gives, and with `inlets` what these read, for each group; the calls
    advance to the next layer.
    """
    layer = dense.base_model.get_submodule(f"{layers}.{index}")
    targets = [_Target() for _ in groups]
    for call in calls:
        with ExitStack() as stack:
            watched = [
                stack.enter_context(watch(dense, group, junction, call))
                for group, junction in zip(groups, junctions, strict=True)
            ]
            if inlets:
                for group, target in zip(groups, targets, strict=True):
                    target.read.append(stack.enter_context(reading(dense, group, call)))
            output = call.run(layer, index)
        call.go_on(output, index)
        for target, junction, [seen] in zip(targets, junctions, watched, strict=True):
            target.sums.append(seen.sum)
            if junction.scaling is not None:
                gain = (seen.joined / seen.output).nan_to_num(0.0, 0.0, 0.0)
                spared = _SPARED * gain.square().mean(dim=1, keepdim=True)
                unscaled = gain / (gain.square() + spared).clamp(min=torch.finfo(gain.dtype).tiny)
                target.unscaled.append(unscaled)
                target.outputs.append(seen.output - seen.joined * unscaled)
    return targets


@dataclass(frozen=True)
class _Place:
    """Where a group of the pruned model is refitted.

    Attributes:
        origin: of the model.
        group: of the pruned model.
        calls: of its layer.
        junction: its outlet's way to the stream.
        target: what outlet and inlets should give.
        counts: per call, (positions,) what each counts.
    """

    origin: Origin
    group: Group
    calls: Sequence[LayerCall]
    junction: Junction
    target: _Target
    counts: Sequence[torch.Tensor]

    def refit(self, inlets: bool) -> None:
        """Set the outlet to the best fit; and the inlets, if they take part and the stream behind
        the outlet is nearer to the dense one with them. It may not be: attention that is fitted to
        noisy states is blurred.
        """
        self._warn_if_few()
        rows, error = self._best_outlet()
        if inlets:
            restore = put_back(inlets_of(self.origin.pruned, self.group).values())
            refit_inlets(self.origin, self.group, self.calls, self.target.read, self.counts)
            with_them, then = self._best_outlet()
            if then < error:
                rows = with_them
            else:
                restore()
        write_rows(outlet_of(self.origin.pruned, self.group), rows)

    def _warn_if_few(self) -> None:
        """Warn where there are fewer positions than columns."""
        columns = self.group.units * self.group.columns
        positions = sum(map(len, self.counts))
        if positions <= columns:
            logger.warning(
                "%s has %d columns and only %d calibration tokens: give more examples.",
                self.group.outlet,
                columns,
                positions,
            )

    def _best_outlet(self) -> tuple[torch.Tensor, float]:
        """The best fit to what the outlet reads now, (columns + 1, outputs), and how far such a fit
        is from its target on held-out positions.
        """
        group, pruned = self.group, self.origin.pruned
        outlet = outlet_of(pruned, group)
        current = as_rows(outlet)
        fit, held = NormalEquations.like(current), NormalEquations.like(current)
        for number, call in enumerate(self.calls):
            watching = watch(pruned, group, self.junction, call, stop=True)
            with watching as found, suppress(Reached):
                call.run(layer_of(pruned, group), group.layer)
            [seen] = found
            wanted = self.target.wanted(number, seen.sum - seen.joined)
            for equations, where in ((fit, ~call.held), (held, call.held)):
                equations.add(seen.input[where], wanted[where], self.counts[number][where])
            if not (fit.is_finite() and held.is_finite()):
                raise DataError(
                    f"{group.outlet}: its inputs, or what it should give, are not finite in"
                    f" calibration batch {call.batch}."
                )
        chosen = best_fit(fit, held, current, group.units, has_bias(outlet))
        error = held.error(chosen(fit))
        fit.absorb(held)
        solution = chosen(fit)
        return (solution if fit.error(solution) < fit.error(current) else current), error
