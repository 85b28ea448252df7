"""Compensation: the kept units take over what the removed ones did, by least squares and without
training.

Removing units changes what an outlet hands to the residual stream. Its remaining columns are
refitted so that the stream on calibration data is again what the dense model's was: ridge
regression in float64, layer by layer in forward order, each on the inputs that the already pruned
and refitted layers before it really give. The closed form is that of layer-wise reconstruction (He
et al. 2017, arXiv:1707.06168). The target is the dense model's residual stream after the outlet,
not the outlet's own output: so each outlet also takes back the error that earlier layers left in
the stream, through a norm that lies between, too. Tokens on which a classifier's answer depends
count more (see token_weights.py).

Scores that hold the second moments of the dense outlets' inputs do without any data: each outlet is
refitted by itself to its own dense output, which is what `reconstruction` ranks units by.

Fits are judged on held-out examples. They choose the ridge, which pulls to the weights as they are,
or one scale for each unit (Kwon et al. 2022, arXiv:2204.09656), or leave an outlet alone where no
fit is better there than what it has.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfprune.errors import DataError, HfpruneError
from hfprune.importance.gates import evaluating, outlet_of
from hfprune.importance.losses import Batch, examples_in, is_decoder
from hfprune.importance.scores import Scores
from hfprune.recovery.inlets import Read, inlets_of, reading, refit_inlets
from hfprune.recovery.junctions import Junction, junction_of, watch
from hfprune.recovery.layer_calls import HELD_OUT, LayerCall, Reached, advance, layer_calls
from hfprune.recovery.least_squares import UNJUDGED, Moments, best_fit, ridge
from hfprune.recovery.rows import as_rows, has_bias, write_rows
from hfprune.recovery.token_weights import token_weights
from hfprune.structure.anatomy import Anatomy, Block, Group, layer_of
from hfprune.structure.architectures import row_of
from hfprune.structure.cost import Selection

logger = logging.getLogger(__name__)

_SPARED = 0.01
"""How little a scaling between an outlet and the stream may give a feature, in mean squares of all
features, before the outlet is spared the stream's error there: it would grow out of proportion.
"""


@dataclass
class _Target:
    """What an outlet should give, one tensor (positions, outputs) for every batch.

    Attributes:
        sums: the dense model's residual stream after the outlet.
        outputs: of the dense outlet, less `unscaled` times what joined the stream.
        unscaled: what one unit of the stream's error is at the outlet's output; empty where its
            output joins the stream as it is.
        read: by the dense inlets.
    """

    read: list[Read] = field(default_factory=list)
    sums: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    unscaled: list[torch.Tensor] = field(default_factory=list)

    def wanted(self, batch: int, stream: torch.Tensor) -> torch.Tensor:
        """The output that would give the dense sum with the pruned model's own stream."""
        joining = self.sums[batch] - stream
        if not self.unscaled:
            return joining
        return self.outputs[batch] + joining * self.unscaled[batch]


def compensate(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    calibration: Sequence[Batch] | Scores,
    kept: Selection | None = None,
) -> PreTrainedModel:
    """Refit every outlet of a pruned model, in place, to the dense model's residual stream; or, by
    scores, to its own output in the dense model.

    If it raises, the pruned model is as it was before.

    Memory: the hidden states of all batches twice and what else their layers are called with, the
    residual sums of one layer, a copy of the outlets, and six (columns x columns) matrices in
    float64 for the widest of them; of a classifier also the activations of one batch. Time: about
    three forward passes over the layers, in families whose layers hand on more than hidden states
    five, and for a classifier a forward and a backward pass more. By scores: no pass, and four
    matrices.

    Args:
        dense: the model before removal.
        pruned: the model after removal.
        calibration: batches, whose labels are not read; or the scores of the dense model with
            moments (`score(..., moments=True)`).
        kept: what stayed, `PruningPlan.keep`; needed by scores, and where whole layers went. On
            batches the layer before them takes over their work: its last outlet is refitted to the
            sum that they leave.

    Returns:
        The pruned model.

    Raises:
        DataError: there are no batches, or an outlet's inputs or target are not finite in one (it
            names both).
        HfpruneError: layers went, or units are refitted by scores, and `kept` does not say which;
            scores of another model, or without moments.
    """
    if isinstance(calibration, Scores):
        return _by_moments(dense, pruned, calibration, kept or {})
    return _on_batches(dense, pruned, calibration, kept or {})


def _by_moments(
    dense: PreTrainedModel, pruned: PreTrainedModel, scores: Scores, kept: Selection
) -> PreTrainedModel:
    """Refit each outlet by itself to what it gave in the dense model."""
    anatomy, before = Anatomy.of(pruned), Anatomy.of(dense)
    if scores.fingerprint != before.fingerprint:
        raise HfpruneError("These scores are not of the dense model; score it.")
    if not scores.moments:
        raise HfpruneError(
            "These scores hold no moments to compensate by: score(..., moments=True), or give"
            " calibration batches."
        )
    twins = _twins(anatomy, before, _layers_of(anatomy, before, kept))
    for group in anatomy:
        twin = twins[group.name]
        if len(kept.get(twin.name, range(twin.units))) != group.units:
            raise HfpruneError(
                f"{twin.name} keeps {group.units} of its {twin.units} {twin.kind}s; say which of"
                " them, compensate(..., kept=plan.keep)."
            )
    outlets = [outlet_of(pruned, group) for group in anatomy]
    with torch.no_grad(), _all_or_nothing(outlets):
        for group, outlet in zip(anatomy, outlets, strict=True):
            twin = twins[group.name]
            if group.units == twin.units:
                continue
            columns = torch.arange(twin.units * twin.columns + 1, device=pruned.device)
            units = columns[:-1].unflatten(0, (twin.units, twin.columns))
            stay = torch.cat([units[sorted(kept[twin.name])].flatten(), columns[-1:]])
            inputs = scores.moments[twin.name].to(pruned.device, torch.float64)[stay]
            wanted = Moments(inputs[:, stay], inputs @ as_rows(outlet_of(dense, twin)))
            write_rows(outlet, ridge(wanted, as_rows(outlet), UNJUDGED, has_bias(outlet)))
    return pruned


def _on_batches(
    dense: PreTrainedModel, pruned: PreTrainedModel, batches: Sequence[Batch], kept: Selection
) -> PreTrainedModel:
    """Refit outlet after outlet on what the layers before it really give."""
    if not len(batches):
        raise DataError("There are no calibration batches to compensate on; give at least one.")
    if sum(map(examples_in, batches)) < HELD_OUT:
        logger.warning(
            "Fits are judged on every %dth example, and there are fewer: give more.", HELD_OUT
        )
    anatomy, before = Anatomy.of(pruned), Anatomy.of(dense)
    layers = _layers_of(anatomy, before, kept)
    twins = _twins(anatomy, before, layers)
    dense_groups = {(g.stack, g.layer, g.kind, g.part): g for g in before}
    experts = {(b.stack, b.layer): b.units for b in before.experts}
    fewer_experts = {
        (b.stack, b.layer)
        for b in anatomy.experts
        if b.units < experts[b.stack, layers[b.stack][b.layer][0]]
    }
    weights = token_weights(dense, batches)
    bar = tqdm(total=len(anatomy.groups), desc="compensating", delay=2, leave=False)
    refitted = [m for g in anatomy for m in (outlet_of(pruned, g), *inlets_of(pruned, g).values())]
    whole = _all_or_nothing(refitted)
    with torch.no_grad(), evaluating(dense), evaluating(pruned), bar, whole:
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
            ours = layer_calls(pruned, stack.layers, batches, decoder)
            theirs = layer_calls(dense, stack.layers, batches, decoder)
            for before_first in range(layers[index][0][0]):
                advance(dense, stack.layers, theirs, before_first)
            for layer, (own, last) in enumerate(layers[index]):
                here = [g for g in groups if g.layer == layer]
                same = [twins[g.name] for g in here]
                junctions = [junction_of(dense, g, theirs[0], own) for g in same]
                targets = _targets(dense, stack.layers, same, junctions, theirs, own)
                for gone in range(own + 1, last + 1):
                    end = dense_groups.get((index, gone, same[-1].kind, same[-1].part))
                    # Where experts come after the last outlet, its sum is not the layer's.
                    if end is None or junctions[-1].sum is None or end.kind != "neuron":
                        advance(dense, stack.layers, theirs, gone)
                    else:
                        (further,) = _targets(
                            dense, stack.layers, [end], junctions[-1:], theirs, gone
                        )
                        targets[-1].sums = further.sums
                for group, junction, target in zip(here, junctions, targets, strict=True):
                    # An outlet that lost nothing is refitted too, once the layers before it have
                    # changed.
                    if layer >= changed[0].layer:
                        twin = twins[group.name]
                        counts = [
                            weight.get(twin.name, torch.ones_like(call.held, dtype=torch.float32))
                            for weight, call in zip(weights, ours, strict=True)
                        ]
                        units = kept.get(twin.name, range(twin.units))
                        if group is not changed[0] and 0 < group.units == len(units):
                            refit_inlets(
                                dense, twin, pruned, group, ours, layer, target.read, units, counts
                            )
                        _refit(pruned, group, ours, layer, junction, target, counts)
                    bar.update()
                advance(pruned, stack.layers, ours, layer)
    return pruned


Layers = list[list[tuple[int, int]]]
"""For each layer of each pruned stack: which dense layer it is, and the last it stands for."""


def _layers_of(pruned: Anatomy, dense: Anatomy, kept: Selection) -> Layers:
    return [_layers(dense.stacks[stack.stack], stack, kept) for stack in pruned.stacks]


def _twins(pruned: Anatomy, dense: Anatomy, layers: Layers) -> dict[str, Group]:
    """The dense group that each pruned one is left of."""
    groups = {(g.stack, g.layer, g.kind, g.part): g for g in dense}
    return {g.name: groups[g.stack, layers[g.stack][g.layer][0], g.kind, g.part] for g in pruned}


def _layers(dense: Block, pruned: Block, kept: Selection) -> list[tuple[int, int]]:
    stayed = sorted(kept.get(dense.name, range(dense.units)))
    if len(stayed) != pruned.units:
        raise HfpruneError(
            f"{dense.name}: the pruned model has {pruned.units} layers and the dense one"
            f" {dense.units}; say which of them stayed, compensate(..., kept=plan.keep)."
        )
    return list(zip(stayed, dense.stands_for(stayed), strict=True))


@contextmanager
def _all_or_nothing(outlets: Sequence[nn.Module]) -> Iterator[None]:
    """Give outlets the weights back that they had, if something is raised."""
    before = [copy.deepcopy(outlet.state_dict()) for outlet in outlets]
    try:
        yield
    except BaseException:
        for outlet, state in zip(outlets, before, strict=True):
            outlet.load_state_dict(state)
        raise


def _targets(
    dense: PreTrainedModel,
    layers: str,
    groups: Sequence[Group],
    junctions: Sequence[Junction],
    calls: Sequence[LayerCall],
    index: int,
) -> list[_Target]:
    """What the dense layer gives, for each group; the calls advance to the next layer."""
    layer = dense.base_model.get_submodule(f"{layers}.{index}")
    targets = [_Target() for _ in groups]
    for call in calls:
        with ExitStack() as stack:
            watched = [
                stack.enter_context(watch(dense, group, junction, call))
                for group, junction in zip(groups, junctions, strict=True)
            ]
            read = [stack.enter_context(reading(dense, group, call)) for group in groups]
            output = call.run(layer, index)
        call.go_on(output, index)
        for target, junction, (seen,), own in zip(targets, junctions, watched, read, strict=True):
            target.read += own or [{}]
            target.sums.append(seen.sum)
            if junction.scaling is not None:
                gain = (seen.joined / seen.output).nan_to_num(0.0, 0.0, 0.0)
                spared = _SPARED * gain.square().mean(dim=1, keepdim=True)
                unscaled = gain / (gain.square() + spared).clamp(min=torch.finfo(gain.dtype).tiny)
                target.unscaled.append(unscaled)
                target.outputs.append(seen.output - seen.joined * unscaled)
    return targets


def _refit(
    pruned: PreTrainedModel,
    group: Group,
    calls: Sequence[LayerCall],
    index: int,
    junction: Junction,
    target: _Target,
    counts: Sequence[torch.Tensor],
) -> None:
    """Set an outlet's weights, and its bias if it has one, to the best fit; each position of a
    batch counts as `counts` say.
    """
    outlet = outlet_of(pruned, group)
    current = as_rows(outlet)
    fit, held = Moments.like(current), Moments.like(current)
    for batch, call in enumerate(calls):
        with watch(pruned, group, junction, call, stop=True) as found, suppress(Reached):
            call.run(layer_of(pruned, group), index)
        (seen,) = found
        wanted = target.wanted(batch, seen.sum - seen.joined)
        for moments, where in ((fit, ~call.held), (held, call.held)):
            moments.add(seen.input[where], wanted[where], counts[batch][where])
        if not (fit.is_finite() and held.is_finite()):
            raise DataError(
                f"{group.outlet}: its inputs, or what it should give, are not finite in calibration"
                f" batch {batch}."
            )
    chosen = best_fit(fit, held, current, group.units, has_bias(outlet))
    fit.absorb(held)
    if fit.count < len(current):
        logger.warning(
            "%s has %d columns and only %d calibration tokens: give more examples.",
            group.outlet,
            len(current) - 1,
            fit.count,
        )
    solution = chosen(fit)
    if fit.error(solution) < fit.error(current):
        write_rows(outlet, solution)
