"""The walk in single calls: inspect, preview, remove, and prune for all up to compensation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel

from hfprune.importance.gates import masked
from hfprune.importance.losses import Batch
from hfprune.importance.scoring import score
from hfprune.planning.budget import Budget
from hfprune.planning.constraints import Constraints
from hfprune.planning.plan import PruningPlan
from hfprune.planning.solve import plan
from hfprune.recovery.compensation import compensate as refit
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.checkpoint import as_stock, from_pretrained
from hfprune.structure.surgery import copy_and_cut


def inspect(model: PreTrainedModel) -> Anatomy:
    """What a model is made of; prints as a table of layers, kinds, units, parameters and MACs.

    Raises:
        UnsupportedModelError: the family has no row, or the model is not plain (quantized, wrapped,
            on meta).
    """
    return Anatomy.of(model)


@contextmanager
def preview(model: PreTrainedModel, plan: PruningPlan) -> Iterator[PreTrainedModel]:
    """The model as the plan would leave it, through closed gates and skipped layers: nothing is
    removed, and it ends with the context.

    Raises:
        HfpruneError: the plan is for another model.
    """
    plan.check_fits(Anatomy.of(model))
    with masked(model, plan.keep):
        yield model


def remove(
    model: PreTrainedModel, plan: PruningPlan, compensate: Sequence[Batch] | None = None
) -> PreTrainedModel:
    """A smaller model without the units that the plan drops; the given model stays as it is.

    Args:
        model: the model that was planned for.
        plan: from `hfprune.plan`.
        compensate: calibration batches on which the outlets are refitted by least squares; None to
            leave the kept weights as they are.

    Returns:
        The smaller model; of a uniform plan, one of its stock class.

    Raises:
        HfpruneError: the plan is for another model, or a uniform one that the family's own config
            cannot hold after all.
    """
    plan.check_fits(Anatomy.of(model))
    pruned = copy_and_cut(model, plan.keep, plan.summary)
    if plan.uniform:
        pruned = as_stock(pruned)
    return pruned if compensate is None else refit(model, pruned, compensate, plan.keep)


def prune(
    model: PreTrainedModel | str | os.PathLike[str],
    batches: Iterable[Batch],
    budget: str | Budget | Sequence[str],
    criterion: str = "reconstruction",
    constraints: Constraints | None = None,
) -> PreTrainedModel:
    """Score, plan, remove and compensate in one call.

    Args:
        model: a transformers model, or the folder or Hub id of one.
        batches: labelled calibration batches, {name: tensor}.
        budget: "macs=50%" or "params=0.6", the share of the layers' cost to keep; or several
            limits. See `plan`.
        criterion: name of the importance criterion.
        constraints: floors, granularity, and what must stay.

    Raises:
        HfpruneError: and its children, as `score`, `plan` and `remove` do.
    """
    dense = model if isinstance(model, PreTrainedModel) else from_pretrained(model)
    calibration = list(batches)
    scores = score(dense, calibration, [criterion])
    made = plan(dense, scores, budget, criterion, constraints)
    return remove(dense, made, compensate=calibration)
