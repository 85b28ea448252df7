"""Quality on held-out examples, with a bootstrap interval; and the paired difference of two runs.

A metric is one of the local `evaluate` modules beside this file: nothing is fetched. The metric is
also what the bootstrap computes on every resample, so value and interval cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hfprune.errors import DataError, unknown
from hfprune.importance.batches import IGNORED

if TYPE_CHECKING:
    import torch


class Metric(NamedTuple):
    """Where a metric is computed.

    Attributes:
        folder: of its `evaluate` module in `metrics/`.
        config: the module's configuration.
        given: its input that does not depend on the model: by it two runs know that they saw the
            same examples.
    """

    folder: str
    config: str | None
    given: str


METRICS = {
    "accuracy": Metric("accuracy", None, "references"),
    "answer_f1": Metric("answers", "f1", "question"),
    "entity_f1": Metric("entities", None, "labelled"),
    "exact_match": Metric("answers", "exact_match", "question"),
    "f1_binary": Metric("f1", "binary", "references"),
    "f1_macro": Metric("f1", "macro", "references"),
    "perplexity": Metric("perplexity", None, "tokens"),
}
_OF_CLASSES = {name for name, metric in METRICS.items() if metric.given == "references"}

RESAMPLES = 1000
"""How often the bootstrap draws the examples anew."""

_LARGEST = float(np.log(np.finfo(np.float64).max))  # what an exponential holds

Columns = dict[str, np.ndarray]
"""A metric's inputs by name, each with one row per example."""


@dataclass(frozen=True)
class Quality:
    """What a model scores on held-out examples.

    Attributes:
        metric: A name in `METRICS`.
        value: The metric over all examples; accuracy and F1 as a share from 0 to 1.
        low: Lower end of the 95 % bootstrap interval.
        high: Upper end of it.
        examples: How many examples (sentences, sequences, questions) were scored.
        beside: Other metrics of the same predictions, by name, over all examples.
        per_example: The metric's inputs, one row per example, for `paired_difference`. They stay
            out of the JSON, and are None on a Quality that was read back.
    """

    metric: str
    value: float
    low: float
    high: float
    examples: int
    beside: Mapping[str, float] = field(default_factory=dict)
    per_example: Columns | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The numbers without the examples, ready for JSON."""
        return {
            "metric": self.metric,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "examples": self.examples,
            "beside": dict(self.beside),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Quality:
        """The Quality that `to_dict` wrote."""
        return cls(**data)


@dataclass(frozen=True)
class Difference:
    """How much the second of two runs scores above the first on the same examples.

    Attributes:
        metric: A name in `METRICS`.
        value: Second minus first.
        low: Lower end of the 95 % paired bootstrap interval.
        high: Upper end of it; where the interval leaves out 0 the two runs differ.
        examples: How many examples both runs scored.
    """

    metric: str
    value: float
    low: float
    high: float
    examples: int

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Difference:
        """The Difference that `to_dict` wrote."""
        return cls(**data)


def load_metric(name: str) -> Any:
    """The local `evaluate` module of a metric; `.compute(...)` it as any other.

    Raises:
        DataError: There is no metric of that name.
    """
    if name not in METRICS:
        raise DataError(unknown("metric", name, METRICS))
    import evaluate

    metric = METRICS[name]
    path = Path(__file__).parent / "metrics" / metric.folder
    return evaluate.load(str(path), metric.config, keep_in_memory=True)


def evaluate_classification(
    model: torch.nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    metric: str = "accuracy",
    *,
    progress: bool = True,
    seed: int = 0,
) -> Quality:
    """Score a classifier of whole examples.

    Args:
        model: Called with a batch's tensors; its output has `logits` (batch, classes).
        batches: Dicts of tensors, a DataLoader for one; `labels` (batch,) are class numbers, -100
            where an example is not to count.
        metric: `accuracy`, `f1_macro` or `f1_binary`.
        progress: Show a bar once it takes longer than two seconds.
        seed: Of the bootstrap.

    Raises:
        DataError: No examples, no labels, labels that are not class numbers, logits that are not
            finite, an unknown metric, or `f1_binary` of more than two classes.
    """
    if metric not in _OF_CLASSES:
        raise DataError(unknown("classification metric", metric, _OF_CLASSES))
    predictions: list[np.ndarray] = []
    references: list[np.ndarray] = []
    with inference(model) as device:
        for batch in progress_bar(batches, metric, progress):
            labels = labels_of(batch)
            logits = model(**model_inputs(batch, device)).logits
            if labels.is_floating_point() or labels.shape != logits.shape[:1] or logits.ndim != 2:
                raise DataError(
                    f"Labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit "
                    f"logits of shape {tuple(logits.shape)}: give one whole class number per "
                    "example, and a model with one logit per class."
                )
            if metric == "f1_binary" and logits.shape[1] > 2:
                raise DataError(
                    f"The model knows {logits.shape[1]} classes, and f1_binary is of two: take"
                    " f1_macro or accuracy."
                )
            check_logits(logits)
            labels = labels.cpu()
            counted = labels != IGNORED
            _check_known(labels[counted], logits.shape[1])
            predictions.append(logits.argmax(dim=-1).cpu()[counted].numpy())
            references.append(labels[counted].numpy())
    if sum(map(len, references)) == 0:
        raise DataError(
            "No examples to evaluate on: the batches are empty or already used up, or every label"
            f" is {IGNORED}."
        )
    columns = {
        "predictions": np.concatenate(predictions),
        "references": np.concatenate(references),
    }
    return quality_of(metric, columns, seed)


def _check_known(labels: torch.Tensor, classes: int) -> None:
    """Refuse labels of no class of the model: they would all count as wrong."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"The labels go from {int(labels.min())} to {int(labels.max())}, and the model knows"
            f" the classes 0 to {classes - 1}: a test split whose labels are hidden, or another"
            " model's?"
        )


def evaluate_perplexity(
    model: torch.nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    progress: bool = True,
    seed: int = 0,
) -> Quality:
    """Perplexity of a causal language model, or of what an encoder-decoder is to write; the
    interval resamples whole sequences.

    Args:
        model: Called with a batch's tensors; its output has `logits` (batch, tokens, vocabulary).
        batches: Dicts of tensors; `labels` (batch, tokens) are the input ids, or the target's of an
            encoder-decoder, which makes its decoder's inputs of them where there are no
            `decoder_input_ids`; -100 where a token is not to be predicted (padding). Sequences that
            predict no token are left out.
        progress: Show a bar once it takes longer than two seconds.
        seed: Of the bootstrap.

    Raises:
        DataError: No token to predict, no labels, or a likelihood or perplexity that is not finite.
    """
    from torch.nn.functional import cross_entropy

    nll: list[float] = []
    tokens: list[int] = []
    # A causal model's position t predicts token t + 1; a decoder's inputs are shifted already.
    config = getattr(model, "config", None)
    ahead = 0 if getattr(config, "is_encoder_decoder", False) else 1
    with inference(model) as device:
        for batch in progress_bar(batches, "perplexity", progress):
            labels = labels_of(batch)
            inputs = model_inputs(batch, device)
            if not ahead and "decoder_input_ids" not in inputs:
                inputs["labels"] = labels.to(device)
            logits = model(**inputs).logits
            # One sequence at a time: a float32 copy of all logits would dwarf the model.
            for predicted, label in zip(logits, labels, strict=True):
                target = label[ahead:].to(device)  # (tokens - ahead,)
                counted = int((target != IGNORED).sum())
                if counted:
                    loss = cross_entropy(
                        predicted[: len(target)].float(),
                        target,
                        ignore_index=IGNORED,
                        reduction="sum",
                    )
                    nll.append(loss.item())
                    tokens.append(counted)
    if not tokens:
        raise DataError(
            "No token to predict: the batches are empty, already used up, or every label is "
            f"{IGNORED}."
        )
    if not np.isfinite(nll).all():
        raise DataError(
            "The model's likelihood of a sequence is NaN or zero: check its weights, or evaluate "
            "in float32."
        )
    columns = {"nll": np.array(nll), "tokens": np.array(tokens)}
    worst = float((columns["nll"] / columns["tokens"]).max())
    if worst > _LARGEST:
        raise DataError(
            f"The model's loss on a sequence is {worst:,.0f} nats a token, and above"
            f" {_LARGEST:.0f} a perplexity is no number: check its weights, or evaluate in float32."
        )
    return quality_of("perplexity", columns, seed)


def paired_difference(first: Quality, second: Quality, *, seed: int = 0) -> Difference:
    """Second minus first, with an interval from drawing the same examples for both.

    Far narrower than the two runs' own intervals suggest, for both find the same examples hard.

    Raises:
        DataError: The two are not of the same metric on the same examples in the same order, or
            one was read back from JSON and has lost its examples.
    """
    if first.metric != second.metric:
        raise DataError(f"{first.metric} and {second.metric} cannot be compared: use one metric.")
    if first.per_example is None or second.per_example is None:
        raise DataError(
            "A Quality read back from JSON has no results per example: compare the two as they "
            "come from the evaluation."
        )
    before, after = first.per_example, second.per_example
    given = METRICS[first.metric].given
    if not np.array_equal(before[given], after[given]):
        raise DataError(
            f"The two runs saw different examples ({first.examples} and {second.examples}; their "
            f"{given} differ): evaluate both on the same batches in the same order."
        )
    statistic = _statistic(first.metric)

    def difference(drawn: np.ndarray) -> float:
        return statistic(_rows(after, drawn)) - statistic(_rows(before, drawn))

    low, high = _bootstrap(difference, first.examples, seed)
    return Difference(first.metric, second.value - first.value, low, high, first.examples)


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; each module's own mode comes back. Gives the device."""
    import torch

    from hfprune.importance.gates import evaluating

    with evaluating(model), torch.inference_mode():
        yield next(model.parameters()).device


def model_inputs(
    batch: Mapping[str, torch.Tensor], device: torch.device
) -> dict[str, torch.Tensor]:
    """The batch without its right answers (no loss is wanted), on the model's device."""
    from hfprune.importance.batches import ANSWERS

    return {name: tensor.to(device) for name, tensor in batch.items() if name not in ANSWERS}


def check_logits(*logits: torch.Tensor) -> None:
    """Refuse what is no prediction.

    Raises:
        DataError: logits that are not finite.
    """
    if not all(each.isfinite().all() for each in logits):
        raise DataError(
            "The model's logits hold NaN or infinity, so it predicts nothing: check its weights, or"
            " evaluate in float32."
        )


def labels_of(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A batch's labels.

    Raises:
        DataError: it has none, or is no batch.
    """
    from hfprune.importance.batches import check_tensors

    check_tensors(batch, "A batch")
    if "labels" not in batch:
        raise DataError(
            f"A batch without labels: it has {', '.join(sorted(batch)) or 'nothing'}; add the "
            "right answers as 'labels'."
        )
    return batch["labels"]


def progress_bar(batches: Iterable[Any], what: str, progress: bool) -> Iterable[Any]:
    """The batches, with a bar once it takes longer than two seconds."""
    from tqdm import tqdm

    return tqdm(batches, desc=what, unit="batch", delay=2, leave=False, disable=not progress)


def _statistic(metric: str) -> Callable[[Columns], float]:
    module = load_metric(metric)

    def statistic(columns: Columns) -> float:
        # `compute` would write each of a thousand resamples to an Arrow table first.
        (value,) = module._compute(**columns).values()
        return value

    return statistic


def _rows(columns: Columns, drawn: np.ndarray) -> Columns:
    return {name: column[drawn] for name, column in columns.items()}


def quality_of(metric: str, columns: Columns, seed: int, beside: Sequence[str] = ()) -> Quality:
    """A metric of its inputs, with a bootstrap interval, and others of the same inputs without."""
    statistic = _statistic(metric)
    examples = len(next(iter(columns.values())))
    low, high = _bootstrap(lambda drawn: statistic(_rows(columns, drawn)), examples, seed)
    others = {name: _statistic(name)(columns) for name in beside}
    return Quality(metric, statistic(columns), low, high, examples, others, per_example=columns)


def _bootstrap(
    statistic: Callable[[np.ndarray], float], examples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile interval of a statistic of the drawn row numbers, shape (examples,)."""
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(examples, size=examples)) for _ in range(RESAMPLES)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
