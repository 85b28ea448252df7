"""Training that keeps zeros at zero, and training that makes them little by little."""

from __future__ import annotations

from typing import Any

from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hfprune.errors import HfpruneError
from hfprune.importance.sparsity import Scope, Sparsity, sparsify
from hfprune.recovery.schedule import Schedule, cubic


class KeepSparse(TrainerCallback):
    """Set weights back to zero after every step of the optimizer.

    For any transformers.Trainer on one process or with data parallelism: momentum and weight decay
    may move a zero within a step, but no forward pass, evaluation or checkpoint sees it.

    Args:
        sparsity: which weights stay; by default those that are not zero when training begins.
    """

    def __init__(self, sparsity: Sparsity | None = None) -> None:
        self._given = sparsity
        self._kept: Sparsity | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Begin with the zeros in place.

        Raises:
            HfpruneError: the masks are of another model.
            UnsupportedModelError: the model is sharded or quantized, or has adapters, whose own
                zeros would never learn.
        """
        self._kept = self._given or Sparsity.of(kwargs["model"])
        self._kept.apply(kwargs["model"])

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Undo what the step did to the zeros."""
        assert self._kept is not None, "training has begun"
        self._kept.apply(kwargs["model"])


class GradualSparsity(TrainerCallback):
    """Set ever more of the smallest weights to zero while a model trains.

    The share of zeros rises fast at first and slowly at the end, 1 - (1 - t)^3 of the target (Zhu
    and Gupta 2017, "To prune, or not to prune", arXiv:1710.01878). What is zero stays zero, and a
    resumed run goes on where it was. With `load_best_model_at_end`, only checkpoints from the last
    rise on compete: those before have fewer zeros.

    Attributes:
        sparsity: which weights stay; None before the first rise.
    """

    def __init__(
        self, target: float, *, scope: Scope = "layer", schedule: Schedule | None = None
    ) -> None:
        """
        Args:
            target: share of zeros at the end, between 0 and 1.
            scope: which weights compete, as for `hfprune.sparsify`.
            schedule: when the share rises.

        Raises:
            HfpruneError: the target is no share.
        """
        if not 0 < target < 1:
            raise HfpruneError(f"target is {target}; give a share between 0 and 1, e.g. 0.8.")
        self.sparsity: Sparsity | None = None
        self._target, self._scope = target, scope
        self._schedule = schedule or Schedule()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Find the zeros of a run that is resumed: they are the smallest weights there are."""
        self.sparsity = None
        rises = (
            step
            for step in range(state.global_step, 0, -1)
            if self._schedule.due(step, state.max_steps)
        )
        if last := next(rises, None):
            self._rise(kwargs["model"], last, state.max_steps)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Undo what the step did to the zeros, and add some where they are due."""
        if self.sparsity is not None:
            self.sparsity.apply(kwargs["model"])
        step = state.global_step + 1  # the Trainer counts the step after this event
        if self._schedule.due(step, state.max_steps):
            self._rise(kwargs["model"], step, state.max_steps)
        if step == self._schedule.last(state.max_steps):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _rise(self, model: PreTrainedModel, step: int, steps: int) -> None:
        share = cubic(self._schedule.progress(step, steps), 0.0, self._target)
        self.sparsity = sparsify(model, share, scope=self._scope)
