"""The walk in single calls, and `prune` for all of it up to compensation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from hfprune.errors import HfpruneError, expect
from hfprune.evaluation.evaluate import Quality, evaluate_classification, evaluate_perplexity
from hfprune.importance import gates
from hfprune.importance.batches import Batch, check_batches
from hfprune.importance.scores import Scores
from hfprune.importance.scoring import score
from hfprune.planning.budget import Budget
from hfprune.planning.constraints import Constraints
from hfprune.planning.plan import PruningPlan
from hfprune.planning.resources import check_budget
from hfprune.planning.solve import plan
from hfprune.recovery.compensation import check_compensation
from hfprune.recovery.compensation import compensate as refit
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.checkpoint import as_stock, from_pretrained
from hfprune.structure.surgery import check_selection, copy_and_cut

Judge = Callable[[PreTrainedModel, Iterable[Batch]], Quality]

_JUDGES: Sequence[tuple[Judge, Sequence[Mapping]]] = (
    (
        evaluate_classification,
        (
            auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        ),
    ),
    (
        evaluate_perplexity,
        (
            auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        ),
    ),
)
"""What judges models, and the classes of those that it judges."""


def inspect(model: PreTrainedModel) -> Anatomy:
    """What a model is made of; prints as a table of layers, kinds, units, parameters and MACs.

    Raises:
        UnsupportedModelError: the family has no row, or the model is not plain (quantized, wrapped,
            on meta).
    """
    return Anatomy.of(model)


@contextmanager
def masked(model: PreTrainedModel, plan: PruningPlan) -> Iterator[PreTrainedModel]:
    """The model as the plan would leave it, through closed gates and skipped layers: nothing is
    removed, and it ends with the context.

    Raises:
        HfpruneError: the plan is for another model.
    """
    _check_plan(model, plan)
    check_selection(plan.anatomy, plan.keep)
    with gates.masked(model, plan.keep):
        yield model


def preview(
    model: PreTrainedModel,
    plan: PruningPlan,
    batches: Iterable[Batch],
    judge: Judge | None = None,
) -> Quality:
    """What a plan would leave of the model's quality, before compensation; nothing is removed.

    Args:
        model: the model that was planned for.
        plan: from `hfprune.plan`.
        batches: held-out, with labels.
        judge: (model, batches) -> quality, by the task's metric; by default accuracy of
            sequence and image classifiers, perplexity of language models.

    Raises:
        HfpruneError: the plan is for another model, or no judge is known for models of its class.
        DataError: batches without labels, or none.
    """
    chosen = judge or _judge_of(model)
    if not callable(chosen):
        raise HfpruneError(f"judge must be a function of a model and batches, not {chosen!r}.")
    check_batches(batches)
    with masked(model, plan):
        return chosen(model, batches)


def _check_plan(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Refuse what is no plan for the model."""
    expect(plan, PruningPlan, "plan", "what hfprune.plan or PruningPlan.load returns")
    plan.check_fits(Anatomy.of(model))


def _judge_of(model: PreTrainedModel) -> Judge:
    name = type(model).__name__
    for judge, mappings in _JUDGES:
        if any(name in mapping.values() for mapping in mappings):
            return judge
    raise HfpruneError(
        f"How is a {name} judged? Say it: preview(..., judge=f) with f(model, batches) -> Quality."
    )


def remove(
    model: PreTrainedModel, plan: PruningPlan, compensate: Iterable[Batch] | Scores | None = None
) -> PreTrainedModel:
    """A smaller model without the units that the plan drops; the given model stays as it is.

    Args:
        model: the model that was planned for.
        plan: from `hfprune.plan`.
        compensate: what the outlets are refitted on by least squares: calibration batches, or the
            model's scores with moments; None to leave the kept weights as they are.

    Returns:
        The smaller model; of a uniform plan, one of its stock class.

    Raises:
        HfpruneError: the plan is for another model, or a uniform one that the family's own config
            cannot hold after all; or as `compensate`.
    """
    _check_plan(model, plan)
    if compensate is not None:
        check_compensation(compensate)
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
    asked, within = Budget.parse(budget), Constraints() if constraints is None else constraints
    expect(within, Constraints, "constraints", "hfprune.Constraints")
    check_batches(batches)
    dense = from_pretrained(model) if isinstance(model, str | os.PathLike) else model
    within.check(dense)
    check_budget(asked, dense, None)
    calibration = list(batches)
    scores = score(dense, calibration, [criterion])
    made = plan(dense, scores, asked, criterion, within)
    return remove(dense, made, compensate=calibration)
