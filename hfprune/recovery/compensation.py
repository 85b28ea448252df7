"""Compensation: the kept units take over what the removed ones did, by least squares and without
training.

Removing units changes what an outlet hands to the residual stream. Its remaining columns are
refitted so that the stream on calibration data is again what the dense model's was: ridge
regression in float64, layer by layer in forward order, each on the inputs that the already pruned
and refitted layers before it really give. The closed form is that of layer-wise reconstruction (He
et al. 2017, arXiv:1707.06168). The target is the dense model's residual stream after the outlet,
not the outlet's own output: so each outlet also takes back the error that earlier layers left in
the stream, through a norm that lies between, too. What is still missing there the next inlets read
off the rest of the stream (see inlets.py). Tokens on which a classifier's answer depends count more
(see token_weights.py).

Fits are judged on held-out examples. They choose the ridge, which pulls to the weights as they are,
or one scale for each unit (Kwon et al. 2022, arXiv:2204.09656), or leave a matrix alone where no
fit is better there than what it has.

Scores that hold the second moments of the dense outlets' inputs do without any data: each outlet is
refitted by itself to its own dense output, which is what `reconstruction` ranks units by.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfprune.errors import DataError, HfpruneError, expect
from hfprune.importance.batches import Batch, check_batch, check_batches, examples_in
from hfprune.importance.gates import evaluating, outlet_of
from hfprune.importance.scores import Scores
from hfprune.recovery.inlets import inlets_of
from hfprune.recovery.layer_calls import HELD_OUT
from hfprune.recovery.least_squares import UNJUDGED, NormalEquations, ridge
from hfprune.recovery.origin import Origin
from hfprune.recovery.rows import as_rows, has_bias, put_back, write_rows
from hfprune.recovery.sweep import sweep
from hfprune.recovery.token_weights import token_weights
from hfprune.structure.cost import Selection

logger = logging.getLogger(__name__)


def compensate(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    calibration: Iterable[Batch] | Scores,
    kept: Selection | None = None,
) -> PreTrainedModel:
    """Refit the outlets and inlets of a pruned model, in place, to the dense model's residual
    stream; or, by scores, each outlet to its own output in the dense model.

    If it raises, the pruned model is as it was before.

    Memory: the hidden states of all batches twice and what else their layers are called with, the
    residual sums of one layer and what its inlets read, a copy of the refitted matrices, and about
    eight (columns x columns) matrices in float64 for the widest outlet, one outlet at a time; of a
    classifier, where inlets are refitted, four of (2 x features + 1)^2 for the inlets' pairs of
    streams if that is more, and the activations of one batch. Time: about five forward passes over
    the layers, in families whose layers hand on more than hidden states seven, and for a classifier
    a forward and a backward pass more. By scores: no pass, and four matrices.

    Args:
        dense: the model before removal.
        pruned: the model after removal.
        calibration: batches, whose labels are not read; or the scores of the dense model with
            moments (`score(..., moments=True)`).
        kept: what stayed, `PruningPlan.keep`. Needed by scores, where whole layers went, and for
            inlets, which else stay as they are. On batches the layer before those that went takes
            over their work: its last outlet is refitted to the sum that they leave.

    Returns:
        The pruned model.

    Raises:
        DataError: there are no batches, one is none (it names it), all are padding or leave a tower
            out, or an outlet's inputs or target are not finite in one (it names both).
        HfpruneError: the pruned model is not of the dense one; layers went, or units are refitted
            by scores, and `kept` does not say which, or says what cannot be; scores of a model of
            another structure, or without moments.
    """
    check_compensation(calibration)
    expect(kept or {}, Mapping, "kept", "the `keep` of a plan")
    origin = Origin.of(dense, pruned, kept or {})
    if isinstance(calibration, Scores):
        _by_moments(origin, calibration)
    else:
        _on_batches(origin, list(calibration))
    return pruned


def check_compensation(calibration: object) -> None:
    """Refuse what is neither batches nor scores.

    Raises:
        DataError: says what was given.
    """
    if not isinstance(calibration, Scores):
        check_batches(calibration, "What to compensate on, unless it is scores with moments,")


def _on_batches(origin: Origin, batches: Sequence[Batch]) -> None:
    """Refit all that is linear, sweeping through the layers."""
    for index, batch in enumerate(batches):
        check_batch(batch, index)
    if not batches:
        raise DataError("There are no calibration batches to compensate on; give at least one.")
    if sum(map(examples_in, batches)) < HELD_OUT:
        logger.warning(
            "Fits are judged on every %dth example, and there are fewer: give more.", HELD_OUT
        )
    pruned, groups = origin.pruned, origin.after.groups
    weights = token_weights(origin.dense, batches)
    refitted = [m for g in groups for m in (outlet_of(pruned, g), *inlets_of(pruned, g).values())]
    bar = tqdm(total=len(groups), desc="compensating", delay=2, leave=False)
    modes = evaluating(origin.dense), evaluating(pruned)
    with torch.no_grad(), modes[0], modes[1], _all_or_nothing(refitted), bar:
        sweep(origin, batches, weights, bar)


def _by_moments(origin: Origin, scores: Scores) -> None:
    """Refit each outlet by itself to what it gave in the dense model."""
    scores.check_model(origin.dense, origin.before)
    if not scores.moments:
        raise HfpruneError(
            "These scores hold no moments to compensate by: score(..., moments=True), or give"
            " calibration batches."
        )
    units = {group.name: origin.units(group) for group in origin.after}
    outlets = [outlet_of(origin.pruned, group) for group in origin.after]
    with torch.no_grad(), _all_or_nothing(outlets):
        for group, outlet in zip(origin.after, outlets, strict=True):
            twin, current = origin.twin(group), as_rows(outlet)
            if group.units == twin.units:
                continue
            columns = torch.arange(twin.units * twin.columns + 1, device=current.device)
            of_units = columns[:-1].unflatten(0, (twin.units, twin.columns))
            stay = torch.cat([of_units[units[group.name]].flatten(), columns[-1:]])
            inputs = scores.moments[twin.name].to(current)[stay]
            wanted = NormalEquations(
                inputs[:, stay], inputs @ as_rows(outlet_of(origin.dense, twin))
            )
            write_rows(outlet, ridge(wanted, current, UNJUDGED, has_bias(outlet)))


@contextmanager
def _all_or_nothing(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Give modules the weights back that they had, if something is raised."""
    restore = put_back(modules)
    try:
        yield
    except BaseException:
        restore()
        raise
