"""How a run trains its models: by transformers' Trainer, in an order of examples that neither the
number of processes nor an interruption changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hfprune.data import Collate, lengths_of
from hfprune.errors import RecipeError
from hfprune.processes import Processes
from hfprune.recipe import Distill, Finetune, Recipe
from hfprune.recovery.checkpoints import last_complete_checkpoint
from hfprune.recovery.distillation import DistillationArguments, DistillationTrainer
from hfprune.recovery.sharding import ShardableTrainer, spread
from hfprune.tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback

_POOL = 50  # batches whose examples are sorted by length together


class ByLength(Sampler[int]):
    """Examples in batches of like length, in an order drawn from the seed and the epoch alone.

    transformers' own sampler draws from the global generator, which dropout and a restart move on
    differently in every process.

    Args:
        lengths: of the examples.
        batch_size: examples per optimizer step, of all processes together.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; Accelerate's loaders call it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(len(self), generator=generator)
        batches: list[tuple[int, ...]] = []
        for pool in order.split(_POOL * self._batch_size):
            ordered = torch.tensor(sorted(pool.tolist(), key=self._lengths.__getitem__))
            batches += [tuple(batch.tolist()) for batch in ordered.split(self._batch_size)]
        full = len(self) // self._batch_size  # an incomplete batch is the last of all
        for place in [*torch.randperm(full, generator=generator).tolist(), full][: len(batches)]:
            yield from batches[place]


class _InOrder:
    """A Trainer's examples come by `ByLength`."""

    train_dataset: Any
    args: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return ByLength(lengths_of(dataset), self.args.train_batch_size, self.args.seed)


class _Trainer(_InOrder, ShardableTrainer):
    pass


class _DistillationTrainer(_InOrder, DistillationTrainer):
    pass


@dataclass(frozen=True)
class Training:
    """What the trainings of a run share.

    Attributes:
        recipe: with the settings.
        task: the recipe's.
        splits: examples: "train", and "dev", by which the best checkpoint is chosen.
        collate: makes batches of them.
        processes: those that train together.
    """

    recipe: Recipe
    task: Task
    splits: Mapping[str, Dataset]
    collate: Collate
    processes: Processes

    def finetune(self, model: PreTrainedModel, checkpoints: Path) -> None:
        """Teach a model the task, in place."""
        settings = self.recipe.finetune
        assert settings is not None
        args = TrainingArguments(**self._arguments(settings, checkpoints))
        self._train(model, settings, args, partial(_Trainer, args=args, **self._data()))

    def distil(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        layer_map: Sequence[int] | None,
        checkpoints: Path,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """Let the student learn from the teacher, in place, with further callbacks if any."""
        settings = self.recipe.distill
        assert settings is not None
        args = DistillationArguments(
            **self._arguments(settings, checkpoints),
            task_weight=settings.task_weight,
            logits_weight=settings.logits_weight,
            hidden_weight=settings.hidden_weight,
            temperature=settings.temperature,
            divergence=settings.divergence,
            skew=settings.skew,
        )
        make = partial(
            _DistillationTrainer,
            teacher=teacher,
            args=args,
            layer_map=layer_map,
            callbacks=list(callbacks),
            **self._data(),
        )
        self._train(student, settings, args, make)

    def _train(
        self,
        model: PreTrainedModel,
        settings: Finetune | Distill,
        args: TrainingArguments,
        make: Callable[[PreTrainedModel], Trainer],
    ) -> None:
        """Train, from the last checkpoint if there is one; the model is trainable after as before,
        in eval mode and on the CPU.
        """
        checkpoint = last_complete_checkpoint(args.output_dir)
        with spread(model, args) as trained:
            embeddings = trained.get_input_embeddings()  # of images, a module without `weight`
            embeddings.requires_grad_(not settings.freeze_embeddings)
            trainer = make(trained)
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                embeddings.requires_grad_(True)
                trained.eval()
            self.processes.gather()  # every process has read the best checkpoint
        torch.nn.Module.to(model, "cpu")

    def _data(self) -> dict[str, Any]:
        """The Trainer's arguments about data."""
        return {
            "train_dataset": self.splits["train"],
            "eval_dataset": self.splits["dev"],
            "data_collator": self.collate,
            "compute_metrics": self.task.compute_metrics if self.task.metric else None,
            "preprocess_logits_for_metrics": _what_is_labelled,
        }

    def _arguments(self, settings: Finetune | Distill, checkpoints: Path) -> dict[str, Any]:
        """TrainingArguments that every training has; one checkpoint an epoch, the best by the dev
        split at the end.

        Raises:
            RecipeError: the processes cannot share a batch evenly.
        """
        if settings.batch_size % self.processes.count:
            raise RecipeError(
                f"A batch of {settings.batch_size} examples cannot be shared by"
                f" {self.processes.count} processes; set batch_size to a multiple of their number."
            )
        return {
            "output_dir": str(checkpoints),
            "num_train_epochs": settings.epochs,
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "warmup_steps": settings.warmup,
            "per_device_train_batch_size": settings.batch_size,
            "per_device_eval_batch_size": settings.batch_size,
            # A batch is one for all processes: the recipe says how many examples make a step.
            "accelerator_config": {"split_batches": True},
            "use_cpu": self.processes.cpu and self.processes.count > 1,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": self.task.chosen_by,
            "remove_unused_columns": False,  # the collator does, and images are columns till then
            "logging_steps": 50,
            "seed": self.recipe.seed,
            "report_to": "none",
            "dataloader_pin_memory": False,
        }


def _what_is_labelled(outputs: Any, labels: Any) -> Any:
    """Of a model's outputs, those that have labels: an encoder-decoder's hidden states follow."""
    if isinstance(labels, tuple):
        return outputs[: len(labels)]
    return outputs[0] if isinstance(outputs, tuple) else outputs
