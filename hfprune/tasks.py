"""What the tasks of recipes are: one row of one table each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfprune import examples
from hfprune.data import Batches, Collate, Row
from hfprune.errors import HfpruneError, RecipeError, unknown
from hfprune.evaluation.evaluate import (
    Quality,
    evaluate_classification,
    evaluate_perplexity,
)
from hfprune.evaluation.extraction import evaluate_answers, evaluate_entities
from hfprune.importance.batches import IGNORED
from hfprune.recipe import Data

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel

Processor = Any
"""A model's tokenizer, or its image processor."""

Config = Callable[[], "PreTrainedConfig"]
"""Loads a model's config; of a GGUF file that takes as long as to read all of it."""


@dataclass(frozen=True)
class Task:
    """What a task is, besides its name, which is the Hub's tag for models that do it.

    Attributes:
        auto_class: name of the transformers class that loads its models.
        examples: the splits as loaded, the processor and the recipe's data -> the splits as
            examples, rows of what a model is called with and of what it is judged by.
        collate: the processor and what loads the model's config -> a function from examples to a
            padded batch.
        judge: a model, batches and a seed -> its quality, by the task's metric.
        chosen_by: the metric on the dev split that chooses the best checkpoint; "loss" for the
            model's own.
        metric: computes it of a Trainer's predictions.
        classes: the labels are classes, and the head has an output for each.
        reads: "text" or "images".
        needs: settings of the recipe's data that other tasks do without.
    """

    auto_class: str
    examples: Callable[[Mapping[str, Dataset], Processor, Data], dict[str, Dataset]]
    collate: Callable[[Processor, Config], Callable[[list[dict]], Mapping[str, Any]]]
    judge: Callable[[PreTrainedModel, Batches, int], Quality]
    chosen_by: str = "loss"
    metric: Callable[[Any], float] | None = None
    classes: bool = False
    reads: str = "text"
    needs: tuple[str, ...] = ()

    def load_processor(self, model: str, **options: Any) -> Processor:
        """The tokenizer, which pads, or the image processor of a model."""
        from transformers import AutoImageProcessor, AutoTokenizer

        if self.reads == "images":
            return AutoImageProcessor.from_pretrained(model, **options)
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load(self, model: str, **options: Any) -> PreTrainedModel:
        """A model with the task's head.

        Raises:
            RecipeError: there is none for models of its family.
        """
        import transformers

        try:
            loaded: PreTrainedModel = getattr(transformers, self.auto_class).from_pretrained(
                model, **options
            )
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise RecipeError(
                f"{model} is of a family that {self.auto_class} does not load, which the task asks"
                " for: give another model, or the task that this one does."
            ) from error
        return loaded

    def collator(self, processor: Processor, config: Config) -> Collate:
        """What makes batches of examples: padded tensors, of nothing but the model's inputs."""
        pad = self.collate(processor, config)

        def collate(rows: Sequence[Row]) -> dict[str, Any]:
            inputs = [{k: v for k, v in row.items() if k not in examples.BESIDE} for row in rows]
            return dict(pad(inputs))

        return collate

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """The metric that chooses, as a Trainer asks for it."""
        assert self.metric is not None
        return {self.chosen_by: self.metric(prediction)}


_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "spiece.model"),
    *("vocab.json", "vocab.txt"),
)


def processor_of(model: str) -> Processor | None:
    """The processor beside a model, of whatever task: its tokenizer, or what reads images or sound;
    None if there is none, where transformers would make up a tokenizer.

    Args:
        model: a folder or a Hub id.

    Raises:
        HfpruneError: it is there and cannot be loaded.
    """
    from transformers import AutoProcessor

    try:
        if _holds(model, _PROCESSOR_FILES):
            return AutoProcessor.from_pretrained(model, trust_remote_code=False)
        if _holds(model, _TOKENIZER_FILES):
            return TASKS["text-generation"].load_processor(model, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        raise HfpruneError(
            f"The processor of {model} cannot be loaded: {error} Install what it needs, or give a"
            " folder of the model without it."
        ) from error
    return None


def _holds(model: str, names: Sequence[str]) -> bool:
    """Whether one of these files is in a folder, or in a repository as far as it can be reached."""
    from transformers.utils.hub import cached_file

    quiet = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    return any(cached_file(model, name, **quiet) for name in names)


def task_named(name: str) -> Task:
    """The row of a task.

    Raises:
        RecipeError: there is none of that name; the message has the nearest.
    """
    if name not in TASKS:
        raise RecipeError(f"task: {unknown('task', name, TASKS)}")
    return TASKS[name]


def _padded(tokenizer: Processor, config: Config) -> Callable:
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer)


def _padded_with_labels(tokenizer: Processor, config: Config) -> Callable:
    from transformers import DataCollatorForTokenClassification

    return DataCollatorForTokenClassification(tokenizer)


def _padded_both(tokenizer: Processor, config: Config) -> Callable:
    """Encoder's and decoder's inputs: who has no labels has the decoder's inputs all the same."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

    with torch.device("meta"):
        shifts = AutoModelForSeq2SeqLM.from_config(config())
    pad = DataCollatorForSeq2Seq(tokenizer, model=shifts)

    def collate(rows: list[dict]) -> Mapping[str, Any]:
        batch = pad(rows)
        batch["decoder_attention_mask"] = (batch["labels"] != IGNORED).long()
        return batch

    return collate


def _stacked(processor: Processor, config: Config) -> Callable:
    from transformers import default_data_collator

    return default_data_collator


def _classes(model: PreTrainedModel, batches: Batches, seed: int) -> Quality:
    return evaluate_classification(model, batches, seed=seed)


def _perplexity(model: PreTrainedModel, batches: Batches, seed: int) -> Quality:
    return evaluate_perplexity(model, batches, seed=seed)


def _entities(model: PreTrainedModel, batches: Batches, seed: int) -> Quality:
    return evaluate_entities(model, batches, seed=seed)


def _answers(model: PreTrainedModel, batches: Batches, seed: int) -> Quality:
    return evaluate_answers(model, batches.with_rows(), seed=seed)


def _right(prediction: Any) -> float:
    """Share of labels that are predicted: of examples, or of tokens that have one."""
    labels = prediction.label_ids
    counted = labels != IGNORED
    return float((prediction.predictions.argmax(-1) == labels)[counted].mean())


def _right_places(prediction: Any) -> float:
    """Share of windows whose answer is predicted from its first token to its last."""
    pairs = zip(prediction.predictions, prediction.label_ids, strict=True)
    start, end = (logits.argmax(-1) == places for logits, places in pairs)
    return float((start & end).mean())


_WRITING = Task("AutoModelForSeq2SeqLM", examples.rewritten, _padded_both, _perplexity)

TASKS: dict[str, Task] = {
    "text-classification": Task(
        "AutoModelForSequenceClassification",
        examples.labelled,
        _padded,
        _classes,
        "accuracy",
        _right,
        classes=True,
    ),
    "image-classification": Task(
        "AutoModelForImageClassification",
        examples.pictures,
        _stacked,
        _classes,
        "accuracy",
        _right,
        classes=True,
        reads="images",
    ),
    "token-classification": Task(
        "AutoModelForTokenClassification",
        examples.tagged,
        _padded_with_labels,
        _entities,
        "accuracy",
        _right,
        classes=True,
    ),
    "question-answering": Task(
        "AutoModelForQuestionAnswering",
        examples.answered,
        _padded,
        _answers,
        "exact_match",
        _right_places,
        needs=("text_pair",),
    ),
    "text-generation": Task("AutoModelForCausalLM", examples.blocks, _padded, _perplexity),
    "summarization": _WRITING,
    "translation": _WRITING,
}
