"""Distillation: a pruned student learns from the model it was pruned from, with the Trainer."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.trainer_utils import TrainOutput

from hfprune.errors import DataError, RecipeError
from hfprune.importance.losses import (
    answers_once,
    foretold,
    problem_of,
    shifts_labels,
    sums_examples,
)
from hfprune.recovery.arguments import DistillationArguments
from hfprune.recovery.checkpoints import (
    ABSENT,
    StartCompetes,
    keeping_the_best,
    last_complete_checkpoint,
    step_of,
    use_cache,
)
from hfprune.recovery.compatibility import (
    has_no_head,
    refuse_arguments,
    refuse_missing_head,
    refuse_other_classes,
    refuse_same,
    refuse_uncached,
    refuse_wrapped,
    submodule,
)
from hfprune.recovery.lora import adapted
from hfprune.recovery.losses import (
    Counted,
    Divergence,
    embedding_loss,
    logits_loss,
    only_logits,
    pooled,
)
from hfprune.recovery.parts import (
    hidden_pairs,
    mean_state_loss,
    outputs_of,
    task_loss,
    without_dropout,
)
from hfprune.recovery.sharding import ShardableTrainer, spread
from hfprune.recovery.teacher_cache import ROW, Numbered, TeacherCache, numbered
from hfprune.structure.checkpoint import from_pretrained

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


class DistillationTrainer(ShardableTrainer):
    """A Trainer whose loss compares the student with a teacher.

    The teacher runs in eval mode under no_grad, in its own dtype, on the student's device; it is
    never wrapped, optimised or saved. The student has no dropout while it learns, unless
    `args.dropout`: that costs time and brings it no nearer to the teacher. In evaluation there is
    no teacher: `eval_loss` is the model's own loss on held-out labels. A model without a head, as
    `AutoModel` loads it, has neither labels nor logits: it learns the teacher's sentence embeddings
    (`embedding_weight`), `eval_loss` is their distance on held-out texts, and `compute_metrics` is
    given the embeddings, (examples, width), as predictions. With `args.load_best_model_at_end` the
    student as it came competes, as checkpoint-0.

    Exactness: every part is a mean over what it counts (labels that are not -100, examples, or
    positions that are not padding) in the whole accumulated batch of all processes. So N
    accumulated batches, or N processes, give the loss and gradients of one batch of the same
    samples, also when they hold unequal numbers of tokens. A loss that is a sum over the examples,
    as that of CTC may be, is divided by their number. One exception: question answering counts
    examples, and the model's own loss skips answers outside the window and takes padding for
    tokens, as many as the longest of a batch has.

    Args:
        model: the student, or PEFT's adapters around it.
        teacher: a model of the same family and vocabulary, or its folder or Hub id, which is loaded
            in its own dtype; it is set to eval mode and moved to the device.
        args: what to weigh, and everything the Trainer reads.
        layer_map: the teacher layer whose output each student layer is compared with. Layers count
            from 0; of an encoder-decoder, the encoder's come first and the decoder's indices go on
            from the encoder's count. By default the identity, or evenly spaced with the last layers
            aligned where the counts differ. The last layer's state is taken after the final norm in
            most families: map the last to the last.
        attention_outlets: for `attention_weight`: the path of each attention output projection in
            the student -> its path in the teacher.
        teacher_cache: read the teacher's logits from disk, and write them there once; then they are
            all that the student learns of the teacher.
        **trainer_arguments: as in `transformers.Trainer`: train_dataset, eval_dataset,
            data_collator, processing_class, compute_metrics, callbacks, optimizers...

    Raises:
        RecipeError: student and teacher cannot be compared, or an argument contradicts
            distillation.
    """

    args: DistillationArguments
    loss_is_scaled_for_ga = True  # compute_loss divides by the count of the whole accumulated batch

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        teacher: PreTrainedModel | str | os.PathLike[str],
        args: DistillationArguments,
        *,
        layer_map: Sequence[int] | None = None,
        attention_outlets: Mapping[str, str] | None = None,
        teacher_cache: TeacherCache | None = None,
        **trainer_arguments: Any,
    ) -> None:
        inside = getattr(model, "get_base_model", lambda: model)()  # PEFT wraps it
        student = cast(PreTrainedModel, inside)
        refuse_wrapped(teacher)
        if not isinstance(teacher, PreTrainedModel):
            auto_class = AutoModel if has_no_head(student) else None
            teacher = from_pretrained(teacher, auto_class=auto_class)
        refuse_same(student, teacher)
        refuse_arguments(args, trainer_arguments)
        refuse_missing_head(student, args.weights())
        if teacher_cache is not None:
            refuse_uncached(args.weights(), trainer_arguments.get("train_dataset"))
        if args.logits_weight:
            refuse_other_classes(student, teacher)
        if args.attention_weight and not attention_outlets:
            raise RecipeError(
                "attention_weight is set but attention_outlets is not: name the attention output "
                "projections, {path in the student: path in the teacher}, or set "
                "attention_weight to 0."
            )
        self._student = student
        self._own_use_cache = vars(student.config).get("use_cache", ABSENT)
        with use_cache(student, self._own_use_cache):  # Trainer.__init__ overwrites it
            super().__init__(model=model, args=args, **trainer_arguments)
        if args.load_best_model_at_end:
            self.add_callback(StartCompetes(self))
        self.teacher = teacher.eval()
        self._cache = teacher_cache
        if teacher_cache is not None:
            self.train_dataset = Numbered(self.train_dataset)
            self.data_collator = numbered(self.data_collator)
        elif getattr(teacher, "hf_device_map", None) is None:
            self._move_model_to_device(teacher, args.device)
        self._divergence = Divergence(args.divergence, args.temperature, args.skew)
        self._weights = {part: weight for part, weight in args.weights().items() if weight}
        self._layer_map = layer_map
        outlets = attention_outlets if args.attention_weight and attention_outlets else {}
        self._student_outlets = [submodule(student, path, "student") for path in outlets]
        self._teacher_outlets = [submodule(teacher, path, "teacher") for path in outlets.values()]
        self._wanted: dict[str, Any] = {}
        if args.hidden_weight:
            self._wanted["output_hidden_states"] = True
        if self._weights.keys() <= {"hidden", "attention"} and all(
            map(_can_omit, (model, teacher))
        ):
            # Nobody reads the logits: over a large vocabulary they cost more than all layers.
            self._wanted["logits_to_keep"] = 1
        self._encoder = (
            set(student.get_encoder().modules()) if student.config.is_encoder_decoder else set()
        )
        self._shifted, self._summed = shifts_labels(student), sums_examples(student)
        self._counted = functools.partial(
            Counted.of, shifted=self._shifted, once=answers_once(student)
        )
        self._headless = has_no_head(student)
        # Then evaluation asks compute_loss for a loss although there are no labels.
        self.can_return_loss |= self._headless
        self._reset_parts()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer.train` does; `use_cache` is as before afterwards.

        Where the best checkpoint is kept, the metrics say of which step it is, as `kept_step`: 0
        for the student as it came.
        """
        self._reset_parts()
        if self._cache is not None:
            self._prepare_cache(self._cache)
        whole = contextlib.nullcontext() if self.args.dropout else without_dropout(self._student)
        with (
            whole,
            use_cache(self._student, self.args.use_cache),
            use_cache(self.teacher, self.args.use_cache),
        ):
            output = super().train(*args, **kwargs)
        if self.state.best_model_checkpoint is not None:
            output.metrics["kept_step"] = step_of(self.state.best_model_checkpoint)
        return output

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Take the batches of one optimizer step and count what each part will be averaged over.

        Returns:
            The batches, and an int64 tensor (4,): the sizes of `Counted` summed over them and all
            processes.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        sizes = torch.zeros(len(Counted._fields), dtype=torch.int64, device=device)
        for batch in batches:
            sizes += self._counted(batch).sizes().to(device)
        self._steps_summed += bool(batches)
        return batches, self.accelerator.reduce(sizes, reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the parts in training; the model's own loss in evaluation.

        Args:
            model: the student, as wrapped for training.
            inputs: one batch, on the device.
            return_outputs: return (loss, the student's outputs).
            num_items_in_batch: what `get_batch_samples` counted; None counts this batch alone.

        Raises:
            DataError: a part is not finite or cannot be computed from this batch.
        """
        if not model.training and self._headless:
            return self._held_out_embeddings(model, inputs, return_outputs)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        self._batches_begun += 1
        counted = self._counted(inputs)
        totals = counted.sizes() if num_items_in_batch is None else num_items_in_batch
        # Gradients are averaged over processes, hence the factor.
        scale = Counted(*(self.accelerator.num_processes / totals.clamp(min=1)))  # type: ignore[union-attr]

        rows = inputs.pop(ROW, None)
        if self._shifted and "labels" in inputs:
            inputs = {**inputs, "labels": foretold(inputs)}
        given = inputs if self.args.task_weight else self._unlabelled(inputs)
        with outputs_of(self._student_outlets) as student_outlets:
            student = model(**given, **self._wanted)
        teacher: Mapping[str, Any] = {}
        with outputs_of(self._teacher_outlets) as teacher_outlets:
            if self._cache is not None and rows is not None:
                teacher = {"logits": self._cache.logits(rows, counted.predictions)}
            elif self._weights.keys() != {"task"}:  # which asks nothing of the teacher
                teacher = self._teacher_outputs(inputs, self._wanted)

        parts: dict[str, Tensor] = {}
        if self.args.task_weight:
            parts["task"] = task_loss(student, counted, summed=self._summed) * scale.targets
        if self.args.logits_weight:
            problem = problem_of(self._student, inputs)
            loss = logits_loss(student, teacher, counted, self._divergence, problem)
            parts["logits"] = loss * scale.predictions
        if self.args.hidden_weight:
            pairs = hidden_pairs(student, teacher, self._layer_map, bool(self._encoder))
            parts["hidden"] = mean_state_loss("hidden", pairs, counted, scale)
        if self.args.attention_weight:
            sides = [
                "predictions" if self._encoder and module not in self._encoder else "positions"
                for module in self._student_outlets
            ]
            pairs = list(zip(student_outlets, sides, teacher_outlets, strict=True))
            parts["attention"] = mean_state_loss("attention", pairs, counted, scale)
        if self.args.embedding_weight:
            distance = embedding_loss(student, teacher, counted, self.args.embedding_distance)
            parts["embedding"] = distance * scale.examples
        self._record(parts, inputs)
        loss = torch.stack([self._weights[part] * value for part, value in parts.items()]).sum()
        return (loss, student) if return_outputs else loss

    def _held_out_embeddings(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool
    ) -> Any:
        """The mean distance of a batch's embeddings from the teacher's, and the embeddings."""
        counted = Counted.of(inputs, shifted=False)
        student, teacher = model(**inputs), self._teacher_outputs(inputs, {})
        distance = embedding_loss(student, teacher, counted, self.args.embedding_distance)
        loss = distance / len(counted.examples)
        outputs = {"loss": loss, "embeddings": pooled(student, counted)}
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, with the mean of each part since the last training log."""
        if "loss" in logs and self._steps_summed:
            means = self.accelerator.reduce(self._part_sums, reduction="mean") / self._steps_summed
            for part, value in zip(self._weights, means.tolist(), strict=True):
                logs[f"loss_{part}"] = value
            self._reset_parts()
        super().log(logs, start_time)

    def _reset_parts(self) -> None:
        """Start the means of the parts anew."""
        self._part_sums = torch.zeros(len(self._weights), device=self.args.device)
        self._steps_summed = 0

    def _record(self, parts: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Add one batch's parts to the running sums, or stop if one is not finite."""
        self.refuse_not_finite(parts, batch)
        self._part_sums += torch.stack([value.detach() for value in parts.values()])

    def _prepare_cache(self, cache: TeacherCache) -> None:
        """Find or make the cache; the teacher is on the device only as long as it is asked."""
        placed = getattr(self.teacher, "hf_device_map", None) is not None
        if not placed:
            self._move_model_to_device(self.teacher, self.args.device)
        collate = self._get_collator_with_removed_columns(self.data_collator)
        with use_cache(self.teacher, self.args.use_cache):
            cache.prepare(
                self.teacher,
                cast(Numbered, self.train_dataset),
                collate,
                lambda batch: only_logits(self._teacher_outputs(batch, {})),
                count=self._counted,
                accelerator=self.accelerator,
            )
        if not placed:
            self.teacher.to("cpu")

    def _set_signature_columns_if_needed(self) -> None:
        """Let the numbers of the rows through to the cache."""
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        if self._cache is not None and ROW not in columns:
            columns.append(ROW)

    @torch.no_grad()
    def _teacher_outputs(
        self, inputs: Mapping[str, Any], wanted: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """The teacher on the same batch; no labels, unless the decoder's inputs come from them."""
        given = self._unlabelled(inputs)
        for name, value in given.items():
            if torch.is_tensor(value) and value.is_floating_point():
                given[name] = value.to(self.teacher.dtype)
        return self.teacher(**given, **wanted)

    def _unlabelled(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch without what only the model's own loss reads."""
        dropped = () if self._student.config.is_encoder_decoder else self.label_names
        return {name: value for name, value in inputs.items() if name not in dropped}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint to resume from, whose config has the model's own `use_cache`."""
        with use_cache(self._student, self._own_use_cache):
            super()._save_checkpoint(model, trial)


def _can_omit(model: nn.Module) -> bool:
    """Whether a model computes the logits of as few positions as it is asked for."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel | str | os.PathLike[str],
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    args: DistillationArguments,
    data_collator: Any = None,
    processing_class: Any = None,
    compute_metrics: Any = None,
    layer_map: Sequence[int] | None = None,
    lora: LoraConfig | None = None,
    resume: bool = False,
    **trainer_arguments: Any,
) -> TrainOutput:
    """Train the student, in place, to answer as the teacher does.

    With `eval_dataset` and `compute_metrics` the student ends with the weights of the best
    checkpoint on the held-out data, judged by `args.metric_for_best_model` (a key that
    `compute_metrics` returns; by default the model's own loss, never the distillation loss),
    evaluated before the first step and whenever a checkpoint is saved. The student as it came
    competes: if no checkpoint beats it, its weights come back.

    Args:
        student: the pruned model; it ends on `args.device`.
        teacher: usually the model before pruning; or its folder or Hub id.
        train_dataset: as the Trainer takes it.
        eval_dataset: held-out data for the choice of the checkpoint.
        args: weights, steps, learning rate, output_dir...
        data_collator: as the Trainer takes it.
        processing_class: tokenizer, image processor or feature extractor, saved with each
            checkpoint.
        compute_metrics: EvalPrediction -> {name: value}.
        layer_map: see DistillationTrainer.
        lora: train low-rank adapters of this kind (PEFT's `LoraConfig`) instead of the weights, and
            merge them into the student at the end.
        resume: continue from the last complete checkpoint in `args.output_dir`; without one, start
            afresh.
        **trainer_arguments: anything else DistillationTrainer takes.

    Returns:
        Steps done, mean training loss and timing, as `Trainer.train` does.

    Raises:
        DataError: the training set is empty, or the loss stops being finite.
        RecipeError: student and teacher or the arguments contradict each other, or
            `args.output_dir` holds checkpoints and `resume` is False.
        CheckpointError: the checkpoint to resume from does not fit the student.
    """
    if hasattr(train_dataset, "__len__") and len(train_dataset) == 0:
        raise DataError("train_dataset is empty; give at least one example.")
    checkpoint = last_complete_checkpoint(args.output_dir)
    if checkpoint is not None and not resume:
        raise RecipeError(
            f"{args.output_dir} holds {checkpoint.name} of an earlier run; pass resume=True to "
            "continue it, or choose another output_dir."
        )
    if eval_dataset is not None and compute_metrics is not None and not args.load_best_model_at_end:
        args = keeping_the_best(args)
    with spread(student, args) if lora is None else adapted(student, lora) as model:
        trainer = DistillationTrainer(
            model,
            teacher,
            args,
            layer_map=layer_map,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            **trainer_arguments,
        )
        return trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
