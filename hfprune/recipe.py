"""A recipe: one dataclass tree is one YAML file is one run. It is checked whole before anything is
loaded.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from hfprune.errors import CheckpointError, RecipeError, expect, unknown

if TYPE_CHECKING:
    from hfprune.planning.budget import Budget

_WEIGHTS = ("task_weight", "logits_weight", "hidden_weight")
_MAY_BE_ZERO = {
    "seed", "threads", "weight_decay", "warmup", "min_heads", "min_neurons", "stride", *_WEIGHTS,
}  # fmt: skip
_LARGEST_SEED = 2**32 - 1  # that NumPy takes

FREE = ("magnitude", "random")
"""The criteria that are always measured: they read no data, and others are compared with them."""

SPLITS = ("train", "dev", "test")
"""The names of the splits, which are fields of `Data`."""


@dataclass(frozen=True)
class Data:
    """Where the examples come from.

    Attributes:
        train, dev, test: a JSON-lines, CSV or Parquet file each, a folder that a dataset was saved
            to, or one with a folder of images per class; with `dataset`, the name of a split each.
        dataset: Hub id of a dataset; None for files.
        config: configuration of the Hub dataset.
        revision: commit, tag or branch of the Hub dataset.
        text: column with the text; for token classification, with its list of words.
        text_pair: column with the second text of a pair; for question answering, with the context;
            None for single texts.
        image: column with the image, or its path.
        label: column with what is right: the number of the class, or of that of every word; the
            text to write; or the answers, as in SQuAD. Not used for text generation.
        prefix: comes before every text that is to be summarized or translated.
        max_length: tokens per example at most; for text generation, tokens per block.
        max_target_length: tokens of a text to write at most.
        stride: tokens that two windows of a long context share, for question answering.
    """

    train: str
    dev: str
    test: str
    dataset: str | None = None
    config: str | None = None
    revision: str | None = None
    text: str = "text"
    text_pair: str | None = None
    image: str = "image"
    label: str = "label"
    prefix: str = ""
    max_length: int = 128
    max_target_length: int = 128
    stride: int = 128


@dataclass(frozen=True)
class Finetune:
    """How the dense model learns the task, where it has not yet.

    Attributes:
        epochs, learning_rate, batch_size, weight_decay: of AdamW with a linear schedule.
        warmup: share of the steps in which the learning rate rises.
        freeze_embeddings: leave the embeddings as they are; on a CPU their update costs as much as
            a small encoder.
    """

    epochs: float = 3.0
    learning_rate: float = 5.0e-5
    batch_size: int = 32
    weight_decay: float = 0.01
    warmup: float = 0.1
    freeze_embeddings: bool = True


@dataclass(frozen=True)
class Score:
    """How importance is measured.

    Attributes:
        examples: calibration examples (blocks, for text generation) from the training split.
        batch_size: examples per batch.
        loss: "labels", the model's own loss; "sampled", that on labels drawn from the model's own
            predictions; or "logits", how far its logits move.
        criteria: what is measured, `prune.criterion` among it; empty for all. `reconstruction`
            takes much time and memory where layers are wide. `magnitude` and `random`, which cost
            nothing, always are.
        checkpointing: keep only what goes into each layer and compute it again in the backward
            pass: a third more time, and much less memory.
        moments: keep the second moments of the outlets' inputs with the scores, so that any plan's
            model can be compensated without data (`hfprune remove --scores`): (columns + 1)^2
            float32 numbers an outlet.
    """

    examples: int = 1024
    batch_size: int = 32
    loss: Literal["labels", "logits", "sampled"] = "labels"
    criteria: tuple[str, ...] = ()
    checkpointing: bool = False
    moments: bool = False


@dataclass(frozen=True)
class Prune:
    """What may stay.

    Attributes:
        budget: "macs=50%" or "params=0.6", of the layers, "memory=400MB@1x128" or
            "latency=8ms@1x128", of the whole model; several limits with commas. A list is for
            rounds: each prunes what the round before left to a smaller share of the dense layers,
            and recovers.
        latency_table: file that `hfprune latency` wrote, on the machine that latency is planned
            for; None to measure here, once, and keep it in the run's folder.
        criterion: name in the registry of the importance by which units are chosen.
        min_heads, min_neurons: that every layer keeps at least.
        round_to: FFN widths are multiples of this.
        uniform: the layers of a stack keep equally many heads and neurons, so that plain
            transformers loads the pruned model.
        protect: names of groups, layers or stacks whose units all stay, such as "encoder.layer.0".
        layers: how many layers of every stack stay; null for all.
        experts: how many routed experts of every layer stay; null for all.
        compensate: refit the outlets by least squares after removal.
    """

    budget: str | tuple[str, ...] = "macs=50%"
    latency_table: str | None = None
    criterion: str = "reconstruction"
    min_heads: int = 1
    min_neurons: int = 1
    round_to: int = 1
    uniform: bool = False
    protect: tuple[str, ...] = ()
    layers: int | None = None
    experts: int | None = None
    compensate: bool = True

    @property
    def budgets(self) -> tuple[str, ...]:
        """One budget per round."""
        return (self.budget,) if isinstance(self.budget, str) else self.budget


@dataclass(frozen=True)
class Distill:
    """How the pruned model learns from the dense one.

    Attributes:
        epochs, learning_rate, batch_size, weight_decay, warmup: as for fine-tuning.
        task_weight, logits_weight, hidden_weight: weights of the task loss, the KL on logits and
            the hidden-state MSE.
        temperature: of the KL.
        divergence: of the logits, "forward", "reverse" (for generation) or "skewed", between them.
        skew: the dense model's share of the mixture, when skewed.
        freeze_embeddings: leave the embeddings as they are.
    """

    epochs: float = 3.0
    learning_rate: float = 1.0e-4
    batch_size: int = 32
    weight_decay: float = 0.01
    warmup: float = 0.1
    task_weight: float = 0.5
    logits_weight: float = 1.0
    hidden_weight: float = 1.0
    temperature: float = 2.0
    divergence: Literal["forward", "reverse", "skewed"] = "forward"
    skew: float = 0.1
    freeze_embeddings: bool = True


@dataclass(frozen=True)
class Measure:
    """What is timed.

    Attributes:
        batch_sizes: batch sizes whose latency is measured.
        lengths: tokens per example at which it is measured besides, at every batch size.
        repeats: timed runs of each model, interleaved.
        threads: CPU threads; 0 leaves torch's default.
        curve: budgets at which plans by the recipe's criterion, by magnitude and at random are
            judged on the test split, before any recovery, for the report's curve.
        also: {name: file} of other test data, read as `data.test` is; with `data.dataset`, {name:
            split}. Every model is judged on them besides: what was not calibrated on suffers most.
        carbon_intensity: grams of CO2 equivalent per kWh of the electricity here, from which the
            card tells the run's emissions where its energy can be read; null to tell none.
    """

    batch_sizes: tuple[int, ...] = (1, 32)
    lengths: tuple[int, ...] = ()
    repeats: int = 30
    threads: int = 0
    curve: tuple[str, ...] = ()
    also: dict[str, str] = field(default_factory=dict)
    carbon_intensity: float | None = None


@dataclass(frozen=True)
class Recipe:
    """One run.

    Attributes:
        model: folder or Hub id of the dense model.
        output: folder of the run; every step leaves its artefact there.
        data: the examples.
        task: "text-classification", "token-classification", "question-answering",
            "text-generation", "summarization", "translation" or "image-classification".
        revision: commit, tag or branch of the Hub model.
        gguf_file: GGUF file in the model's folder, for models that come as one.
        seed: of every random draw, less than 2**32.
        finetune: teach the dense model the task first; None where it knows it.
        score, prune, measure: the steps' settings.
        distill: learn from the dense model after removal; None to stop at compensation.
    """

    model: str
    output: str
    data: Data
    task: str = "text-classification"
    revision: str | None = None
    gguf_file: str | None = None
    seed: int = 0
    finetune: Finetune | None = None
    score: Score = field(default_factory=Score)
    prune: Prune = field(default_factory=Prune)
    distill: Distill | None = None
    measure: Measure = field(default_factory=Measure)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Recipe:
        """Read and check a YAML file.

        Raises:
            RecipeError: not there, not YAML, a key that is unknown (with the nearest) or there
                twice, a value of the wrong type or out of range, a budget or criterion that does
                not exist, or data files that are missing.
        """
        expect(path, (str, os.PathLike), "A recipe", "a file, or a Recipe for hfprune.run")
        try:
            text = Path(path).read_text(encoding="utf-8")
            values = yaml.load(text, Loader=_Loader)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error
        except OSError as error:
            raise RecipeError(f"Cannot read the recipe {path}: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is not YAML: {error}") from error
        recipe = Recipe.from_dict(values)
        recipe.check()
        return recipe

    @staticmethod
    def from_dict(values: Any) -> Recipe:
        """Build a recipe from plain values; see `load`."""
        from hfprune.publishing.secrets import refuse_secrets

        refuse_secrets(values, "recipe")  # before an error message could repeat one
        return _build(Recipe, values, "recipe")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        """What the types cannot say, checked without loading a model.

        Raises:
            RecipeError: names the field, what it holds and what it may hold.
        """
        from hfprune.importance.criteria import criterion_named
        from hfprune.planning.budget import Budget
        from hfprune.structure.checkpoint import refuse_nowhere
        from hfprune.tasks import task_named

        task = task_named(self.task)
        try:
            refuse_nowhere(self.model)
        except CheckpointError as error:
            raise RecipeError(f"model: {error}") from error
        rounds = [Budget.parse(budget) for budget in self.prune.budgets]
        if not rounds:
            raise RecipeError("prune.budget must hold one budget at least.")
        for before, after in itertools.pairwise(rounds):
            _check_falls(before, after)
        self._check_latency(rounds)
        for budget in self.measure.curve:
            Budget.parse(budget)
        measured = self.score.criteria
        for criterion in (self.prune.criterion, *measured):
            criterion_named(criterion)
        if measured and self.prune.criterion not in (*measured, *FREE):
            raise RecipeError(
                f"score.criteria are {', '.join(measured)}: add {self.prune.criterion}, by which"
                " prune.criterion chooses."
            )
        for name, value in self._numbers():
            setting = name.rpartition(".")[2]
            if not (0 < value < math.inf or (value == 0 and setting in _MAY_BE_ZERO)):
                least = "0 or more" if setting in _MAY_BE_ZERO else "more than 0"
                raise RecipeError(f"{name} must be {least}, not {value}.")
            if setting in ("warmup", "skew") and value >= 1:
                raise RecipeError(f"{name} must be a share, below 1, not {value}.")
        if self.seed > _LARGEST_SEED:
            raise RecipeError(f"seed must be at most {_LARGEST_SEED}, not {self.seed}.")
        if self.distill and not any(getattr(self.distill, name) for name in _WEIGHTS):
            raise RecipeError(
                f"distill: {', '.join(_WEIGHTS)} are all 0, so that nothing would be learnt; give"
                " one of them more than 0, or leave distill out."
            )
        if self.prune.uniform and not (self.prune.min_heads and self.prune.min_neurons):
            raise RecipeError(
                "prune.uniform needs prune.min_heads and prune.min_neurons of 1 or more: a stock"
                " config cannot hold a layer without heads or neurons."
            )
        if not self.measure.batch_sizes:
            raise RecipeError("measure.batch_sizes must hold one batch size at least.")
        for setting in task.needs:
            if getattr(self.data, setting) is None:
                raise RecipeError(f"data.{setting} is missing: every {self.task} needs it.")
        if self.measure.lengths and task.reads != "text":
            raise RecipeError(f"measure.lengths are of texts, and {self.task} reads {task.reads}.")
        if not self.data.dataset:
            named = {f"data.{split}": getattr(self.data, split) for split in SPLITS}
            named |= {f"measure.also.{name}": file for name, file in self.measure.also.items()}
            for name, file in named.items():
                if not file or not Path(file).exists():  # "" would be the current folder
                    raise RecipeError(
                        f"{name}: there is no file {file}. Give a JSON-lines, CSV or Parquet"
                        " file, a folder, or a `dataset` with split names."
                    )
        if not self.output.strip():  # "" would be the current folder
            raise RecipeError("output has no name: give the folder of the run.")
        parent = next(
            p
            for p in (Path(self.output).absolute(), *Path(self.output).absolute().parents)
            if p.exists()
        )
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise RecipeError(f"output: cannot write below {parent}; choose another folder.")

    def _check_latency(self, rounds: Sequence[Budget]) -> None:
        """Refuse what one table, or no table of a round before, can say."""
        shapes = [
            [limit.shape for limit in budget.limits if limit.resource == "latency"]
            for budget in rounds
        ]
        if any(len(of_round) > 1 for of_round in shapes):
            raise RecipeError("prune.budget: a run plans for the latency of one batch only.")
        table = self.prune.latency_table
        if table is None:
            return
        if not any(shapes):
            raise RecipeError("prune.latency_table needs a prune.budget of latency.")
        if len(rounds) > 1:
            raise RecipeError(
                "prune.latency_table is of the dense model, and later rounds prune others: leave it"
                " out, and every round measures its own."
            )
        if not Path(table).is_file():
            raise RecipeError(f"prune.latency_table: there is no file {table}.")

    def _numbers(self) -> list[tuple[str, float]]:
        """Every number of the recipe, by name."""
        found: list[tuple[str, float]] = []
        for name, part in (
            ("", self),
            *((f.name + ".", getattr(self, f.name)) for f in dataclasses.fields(self)),
        ):
            if dataclasses.is_dataclass(part):
                for f in dataclasses.fields(part):
                    value = getattr(part, f.name)
                    numbers = value if isinstance(value, tuple) else (value,)
                    found += [(name + f.name, n) for n in numbers if type(n) in (int, float)]
        return found


def _check_falls(before: Budget, after: Budget) -> None:
    """Refuse a round that need not remove anything."""
    earlier = {(limit.resource, limit.absolute): limit for limit in before.limits}
    for limit in after.limits:
        if not limit.absolute and limit.resource not in ("macs", "params"):
            raise RecipeError(
                f"prune.budget: after the first round, {limit} has no meaning: write the"
                f" {limit.resource} as an amount, or a share of macs or params."
            )
        other = earlier.get((limit.resource, limit.absolute))
        if other is None or not limit.amount < other.amount:
            raise RecipeError(
                f"prune.budget: the round to {after} must leave less than the round to {before}"
                " before it, of the same resources and in the same units."
            )


class _Loader(yaml.SafeLoader):
    """Plain values of YAML; of a key that is there twice the last would win without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it is written: before what it is merged with is among its keys."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise RecipeError(
                    f"The key {name!r} is there twice, in line {seen[name]} and in line {line}:"
                    " leave one of them."
                )
            seen[name] = line
        return node


def _build(kind: Any, value: Any, where: str) -> Any:
    """A value of an annotated type from plain YAML values."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        several = isinstance(value, list | tuple)
        kinds = [a for a in arguments if a is not type(None)]
        fitting = [a for a in kinds if (typing.get_origin(a) is tuple) == several]
        return _build((fitting or kinds)[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise RecipeError(f"{where}: {unknown('value', str(value), arguments)}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else None
        if items is None:
            raise RecipeError(f"{where} must be a list of {arguments[0].__name__}, not {value!r}.")
        return tuple(_build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where} must be a mapping of names, not {value!r}.")
        return {str(k): _build(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 5e-5 as a string
        except ValueError:
            pass
    if type(value) is not kind:
        raise RecipeError(f"{where} must be of type {kind.__name__}, not {value!r}.")
    return value


def _build_dataclass(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where} must be a mapping of settings, not {values!r}.")
    hints = typing.get_type_hints(kind)
    prefix = "" if where == "recipe" else f"{where}."
    for key in values:
        if key not in hints:
            raise RecipeError(unknown(f"key in {where}", str(key), hints))
    for f in dataclasses.fields(kind):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and values.get(f.name) is None:
            raise RecipeError(f"{prefix}{f.name} is missing: every {where} needs it.")
    return kind(**{key: _build(hints[key], value, prefix + key) for key, value in values.items()})
