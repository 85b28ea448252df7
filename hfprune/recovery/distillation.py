"""Distillation: a pruned student learns from the model it was pruned from, with the Trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput

from hfprune.errors import CheckpointError, DataError, RecipeError
from hfprune.importance.losses import shifts_labels
from hfprune.recovery.losses import (
    Counted,
    Divergence,
    DivergenceKind,
    logits_loss,
    spread_layers,
    state_loss,
)

_ABSENT = object()
_STATE_FILE = "trainer_state.json"  # the last file the Trainer writes into a checkpoint


@dataclasses.dataclass
class DistillationArguments(TrainingArguments):
    """TrainingArguments with the weights of the parts of the loss and the divergence on the logits.

    The loss is the sum of weight x part; a part of weight 0 is neither computed nor logged. Parts
    are logged as `loss_task`, `loss_logits`, `loss_hidden` and `loss_attention`, before weighting.

    Raises:
        RecipeError: a weight is negative, all are 0, or the divergence cannot be built.
    """

    task_weight: float = dataclasses.field(
        default=0.5, metadata={"help": "Weight of the model's own loss on the labels."}
    )
    logits_weight: float = dataclasses.field(
        default=1.0, metadata={"help": "Weight of the divergence from the teacher's predictions."}
    )
    hidden_weight: float = dataclasses.field(
        default=1.0, metadata={"help": "Weight of the error of each layer's hidden states."}
    )
    attention_weight: float = dataclasses.field(
        default=0.0, metadata={"help": "Weight of the error of the attention outlets' outputs."}
    )
    temperature: float = dataclasses.field(
        default=2.0, metadata={"help": "Temperature of both distributions; above 0."}
    )
    divergence: DivergenceKind = dataclasses.field(
        default="forward", metadata={"help": "KL direction: forward, reverse or skewed."}
    )
    skew: float = dataclasses.field(
        default=0.1, metadata={"help": "Teacher's share of the mixture when skewed; in (0, 1)."}
    )

    def __post_init__(self) -> None:
        """Validate the added fields, then everything TrainingArguments validates."""
        weights = self.weights()
        if any(weight < 0 for weight in weights.values()) or not any(weights.values()):
            raise RecipeError(
                f"The weights of the loss are {weights}; give numbers of at least 0, one of them "
                "above 0."
            )
        Divergence(self.divergence, self.temperature, self.skew).check()
        super().__post_init__()

    def weights(self) -> dict[str, float]:
        """The weight of every part of the loss, by its name."""
        return {
            "task": self.task_weight,
            "logits": self.logits_weight,
            "hidden": self.hidden_weight,
            "attention": self.attention_weight,
        }


class DistillationTrainer(Trainer):
    """A Trainer whose loss compares the student with a teacher.

    The teacher runs in eval mode under no_grad, in its own dtype, on the student's device; it is
    never wrapped, optimised or saved. In evaluation there is no teacher: `eval_loss` is the model's
    own loss on held-out labels.

    Exactness: every part is a mean over what it counts (labels that are not -100, examples, or
    positions that are not padding) in the whole accumulated batch of all processes. So N
    accumulated batches, or N processes, give the loss and gradients of one batch of the same
    samples, also when they hold unequal numbers of tokens. One exception: question answering counts
    examples, and the model's own loss skips answers outside the window.

    Args:
        model: the student.
        teacher: a model of the same family and vocabulary; it is set to eval mode and moved to the
            device.
        args: what to weigh, and everything the Trainer reads.
        layer_map: the teacher layer whose output each student layer is compared with. Layers count
            from 0; of an encoder-decoder, the encoder's come first and the decoder's indices go on
            from the encoder's count. By default the identity, or evenly spaced with the last layers
            aligned where the counts differ. The last layer's state is taken after the final norm in
            most families: map the last to the last.
        attention_outlets: for `attention_weight`: the path of each attention output projection in
            the student -> its path in the teacher.
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
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        args: DistillationArguments,
        *,
        layer_map: Sequence[int] | None = None,
        attention_outlets: Mapping[str, str] | None = None,
        **trainer_arguments: Any,
    ) -> None:
        student = getattr(model, "get_base_model", lambda: model)()  # under PEFT's wrapper
        _refuse_arguments(args, trainer_arguments)
        if args.logits_weight:
            _refuse_other_classes(student, teacher)
        if args.attention_weight and not attention_outlets:
            raise RecipeError(
                "attention_weight is set but attention_outlets is not: name the attention output "
                "projections, {path in the student: path in the teacher}, or set "
                "attention_weight to 0."
            )
        self._config = student.config
        self._own_use_cache = vars(student.config).get("use_cache", _ABSENT)
        with _use_cache(self._config, self._own_use_cache):  # Trainer.__init__ overwrites it
            super().__init__(model=model, args=args, **trainer_arguments)
        self.teacher = teacher.eval()
        if getattr(teacher, "hf_device_map", None) is None:
            self._move_model_to_device(teacher, args.device)
        self._divergence = Divergence(args.divergence, args.temperature, args.skew)
        self._weights = {part: weight for part, weight in args.weights().items() if weight}
        self._layer_map = layer_map
        outlets = attention_outlets if args.attention_weight and attention_outlets else {}
        self._student_outlets = [_module(student, path, "student") for path in outlets]
        self._teacher_outlets = [_module(teacher, path, "teacher") for path in outlets.values()]
        self._encoder = (
            set(student.get_encoder().modules()) if student.config.is_encoder_decoder else set()
        )
        self._shifted = shifts_labels(student)
        self._reset_parts()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer.train` does; `use_cache` is as before afterwards."""
        self._reset_parts()
        with (
            _use_cache(self._config, self.args.use_cache),
            _use_cache(self.teacher.config, self.args.use_cache),
        ):
            return super().train(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Take the batches of one optimizer step and count what each part will be averaged over.

        Returns:
            The batches, and an int64 tensor (3,): the sizes of `Counted` summed over them and all
            processes.
        """
        if 0 < self.state.max_steps <= self.state.global_step:
            return [], None  # resumed after the last step: the Trainer would take one more
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        sizes = torch.zeros(len(Counted._fields), dtype=torch.int64, device=device)
        for batch in batches:
            sizes += Counted.of(batch, shifted=self._shifted).sizes().to(device)
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
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        counted = Counted.of(inputs, shifted=self._shifted)
        totals = counted.sizes() if num_items_in_batch is None else num_items_in_batch
        # Gradients are averaged over processes, hence the factor.
        scale = Counted(*(self.accelerator.num_processes / totals.clamp(min=1)))  # type: ignore[union-attr]

        states = {"output_hidden_states": True} if self.args.hidden_weight else {}
        with _outputs_of(self._student_outlets) as student_outlets:
            student = model(**inputs, **states)
        with _outputs_of(self._teacher_outlets) as teacher_outlets:
            teacher = self._teacher_outputs(inputs, states)

        parts: dict[str, Tensor] = {}
        if self.args.task_weight:
            parts["task"] = _task_loss(student, counted) * scale.targets
        if self.args.logits_weight:
            problem = getattr(self._config, "problem_type", None)
            loss = logits_loss(student, teacher, counted, self._divergence, problem)
            parts["logits"] = loss * scale.predictions
        if self.args.hidden_weight:
            pairs = self._hidden_pairs(student, teacher)
            parts["hidden"] = _mean_state_loss("hidden", pairs, counted, scale)
        if self.args.attention_weight:
            sides = [
                "predictions" if self._encoder and module not in self._encoder else "positions"
                for module in self._student_outlets
            ]
            pairs = list(zip(student_outlets, sides, teacher_outlets, strict=True))
            parts["attention"] = _mean_state_loss("attention", pairs, counted, scale)
        self._record(parts)
        loss = torch.stack([self._weights[part] * value for part, value in parts.items()]).sum()
        return (loss, student) if return_outputs else loss

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

    def _record(self, parts: Mapping[str, Tensor]) -> None:
        """Add one batch's parts to the running sums, or stop if one is not finite."""
        values = torch.stack([value.detach() for value in parts.values()])
        if not values.isfinite().all():
            given = ", ".join(f"{part} {value:g}" for part, value in parts.items())
            raise DataError(
                f"The loss is not finite at global step {self.state.global_step + 1}: {given}. "
                f"Nothing was updated; earlier checkpoints in {self.args.output_dir} are intact. "
                "Lower learning_rate, check the batch, or set the weight of the part at fault to "
                "0."
            )
        self._part_sums += values

    @torch.no_grad()
    def _teacher_outputs(
        self, inputs: Mapping[str, Any], states: Mapping[str, bool]
    ) -> Mapping[str, Any]:
        """The teacher on the same batch; no labels, unless the decoder's inputs come from them."""
        dropped = () if self.teacher.config.is_encoder_decoder else self.label_names
        given = {name: value for name, value in inputs.items() if name not in dropped}
        for name, value in given.items():
            if torch.is_tensor(value) and value.is_floating_point():
                given[name] = value.to(self.teacher.dtype)
        return self.teacher(**given, **states)

    def _hidden_pairs(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any]
    ) -> list[tuple[Tensor, str, Tensor]]:
        """Each student layer's output, the mask it is counted by, and the teacher's output."""
        sides = {"hidden_states": "positions"}
        if self._encoder:
            sides = {"encoder_hidden_states": "positions", "decoder_hidden_states": "predictions"}
        absent = [name for name in sides if student.get(name) is None or teacher.get(name) is None]
        if absent:
            raise DataError(f"The models return no {absent[0]}; set hidden_weight to 0.")
        # The first entry of each tuple is the embeddings.
        ours = [(state, side) for name, side in sides.items() for state in student[name][1:]]
        theirs = [state for name in sides for state in teacher[name][1:]]
        layer_map = self._layer_map
        if layer_map is None:
            layer_map, offset = [], 0
            for name in sides:
                depth = len(teacher[name]) - 1
                spread = spread_layers(len(student[name]) - 1, depth)
                layer_map += [offset + layer for layer in spread]
                offset += depth
        if len(layer_map) != len(ours) or not all(0 <= layer < len(theirs) for layer in layer_map):
            raise RecipeError(
                f"layer_map is {list(layer_map)}; the student has {len(ours)} layers and the "
                f"teacher {len(theirs)}: give {len(ours)} teacher layers, each from 0 to "
                f"{len(theirs) - 1}."
            )
        matched = [theirs[layer] for layer in layer_map]
        return [(*own, state) for own, state in zip(ours, matched, strict=True)]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint to resume from, whose config has the model's own `use_cache`."""
        saved = self.accelerator.unwrap_model(self.model)
        with _use_cache(self._config, self._own_use_cache), _training_format(saved):
            super()._save_checkpoint(model, trial)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that does not fit; the Trainer would warn and keep old weights."""
        optional = set(getattr(self.model, "all_tied_weights_keys", ()))
        optional.update(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        missing = [name for name in load_result.missing_keys if name not in optional]
        unexpected = list(load_result.unexpected_keys)
        if missing or unexpected:
            raise CheckpointError(
                f"The checkpoint lacks {len(missing)} of the model's tensors {missing[:3]} and has "
                f"{len(unexpected)} it does not know {unexpected[:3]}. Resume from a checkpoint "
                "that DistillationTrainer wrote for this very structure."
            )


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    args: DistillationArguments,
    data_collator: Any = None,
    processing_class: Any = None,
    compute_metrics: Any = None,
    layer_map: Sequence[int] | None = None,
    resume: bool = False,
    **trainer_arguments: Any,
) -> TrainOutput:
    """Train the student, in place, to answer as the teacher does.

    With `eval_dataset` and `compute_metrics` the student ends with the weights of the best
    checkpoint on the held-out data, judged by `args.metric_for_best_model` (a key that
    `compute_metrics` returns; by default the model's own loss, never the distillation loss),
    evaluated whenever a checkpoint is saved.

    Args:
        student: the pruned model; it ends on `args.device`.
        teacher: usually the model before pruning.
        train_dataset: as the Trainer takes it.
        eval_dataset: held-out data for the choice of the checkpoint.
        args: weights, steps, learning rate, output_dir...
        data_collator: as the Trainer takes it.
        processing_class: tokenizer, image processor or feature extractor, saved with each
            checkpoint.
        compute_metrics: EvalPrediction -> {name: value}.
        layer_map: see DistillationTrainer.
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
    checkpoint = _last_complete_checkpoint(args.output_dir)
    if checkpoint is not None and not resume:
        raise RecipeError(
            f"{args.output_dir} holds {checkpoint.name} of an earlier run; pass resume=True to "
            "continue it, or choose another output_dir."
        )
    if eval_dataset is not None and compute_metrics is not None and not args.load_best_model_at_end:
        args = _keeping_the_best(args)
    trainer = DistillationTrainer(
        student,
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


def _keeping_the_best(args: DistillationArguments) -> DistillationArguments:
    """The same arguments, evaluating at every save and loading the best checkpoint at the end."""
    if args.save_strategy == SaveStrategy.NO:
        raise RecipeError(
            "eval_dataset and compute_metrics ask for the best checkpoint, but save_strategy is "
            "'no'; set it to 'epoch' or 'steps', or leave compute_metrics out."
        )
    schedule: dict[str, Any] = {}
    if args.save_strategy != SaveStrategy.BEST:
        schedule = {"eval_strategy": args.save_strategy, "eval_steps": args.save_steps}
    return dataclasses.replace(args, load_best_model_at_end=True, **schedule)


def _last_complete_checkpoint(output_dir: str | None) -> Path | None:
    """The newest checkpoint written to its end: a run may have been killed while saving."""
    states = Path(output_dir or ".").glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_STATE_FILE}")
    checkpoints = [state.parent for state in states]
    return max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _refuse_arguments(args: DistillationArguments, trainer_arguments: Mapping[str, Any]) -> None:
    """Refuse what would be ignored or break the loss."""
    refused = {
        "label_smoothing_factor": "the teacher's distribution is already soft",
        "use_liger_kernel": "its fused loss returns no logits",
    }
    for name, reason in refused.items():
        if getattr(args, name):
            raise RecipeError(f"{name} cannot be used in distillation: {reason}. Leave it unset.")
    if trainer_arguments.get("compute_loss_func") is not None:
        raise RecipeError("compute_loss_func would be ignored; set the weights of args instead.")
    if args.n_gpu > 1:
        raise RecipeError(
            f"One process sees {args.n_gpu} GPUs; start with `accelerate launch` (one process per "
            "GPU), or set CUDA_VISIBLE_DEVICES to one of them."
        )


def _refuse_other_classes(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse models whose predictions are over different classes."""
    ours, theirs = _classes(student), _classes(teacher)
    if ours != theirs:
        raise RecipeError(
            f"The student predicts {ours[1]} {ours[0]}, the teacher {theirs[1]} {theirs[0]}: the "
            "divergence needs the same on both sides. Take the teacher the student was pruned "
            "from, or set logits_weight to 0."
        )
    names, other_names = student.config.id2label or {}, teacher.config.id2label or {}
    same_set = set(names.values()) == set(other_names.values())
    if ours[0] == "labels" and same_set and names != other_names:
        raise RecipeError(
            f"Student and teacher number the labels differently: {names} and {other_names}. Make "
            "the student with the teacher's id2label."
        )


def _classes(model: PreTrainedModel) -> tuple[str, int | None]:
    """What the model predicts one of, and how many there are."""
    head = model.get_output_embeddings()
    if head is not None:
        return "vocabulary entries", head.weight.shape[0]
    return "labels", model.config.num_labels


def _module(model: nn.Module, path: str, role: str) -> nn.Module:
    """The submodule at a path, or an error that names it."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise RecipeError(
            f"attention_outlets names {path!r}, which the {role} {type(model).__name__} does not "
            "have; give paths as in named_modules()."
        ) from None


def _task_loss(outputs: Mapping[str, Any], counted: Counted) -> Tensor:
    """The model's own mean loss, as the sum over its targets."""
    if outputs.get("loss") is None:
        raise DataError(
            "The batch gave no loss: it has no labels. Give the dataset a labels column, or set "
            "task_weight to 0."
        )
    if not counted.targets.any():  # a mean over nothing is NaN
        return outputs["logits"].sum() * 0.0
    return outputs["loss"] * counted.targets.sum()


def _mean_state_loss(
    part: str, pairs: Sequence[tuple[Tensor, str, Tensor]], counted: Counted, scale: Counted
) -> Tensor:
    """Mean over pairs (student's, name of the mask, teacher's) of the error of their states."""
    losses = [
        state_loss(student, teacher, getattr(counted, side), part) * getattr(scale, side)
        for student, side, teacher in pairs
    ]
    return torch.stack(losses).mean()


@contextlib.contextmanager
def _outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Within, the list fills with the modules' outputs, in the order of the modules."""
    outputs: list[Any] = [None] * len(modules)

    def keep(at: int, module: nn.Module, given: Any, output: Tensor) -> None:
        outputs[at] = output

    hooks = [
        module.register_forward_hook(functools.partial(keep, at))
        for at, module in enumerate(modules)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _use_cache(config: PreTrainedConfig, value: Any) -> Iterator[None]:
    """Within, `config.use_cache` is the value, or gone if that is _ABSENT; then it is as before."""

    def put(value: Any) -> None:
        if value is not _ABSENT:
            config.use_cache = value
        elif "use_cache" in vars(config):
            del config.use_cache

    earlier = vars(config).get("use_cache", _ABSENT)
    put(value)
    try:
        yield
    finally:
        put(earlier)


@contextlib.contextmanager
def _training_format(model: nn.Module) -> Iterator[None]:
    """Within, `model.save_pretrained` writes what the Trainer loads back, and does not verify.

    The Trainer loads checkpoints by the names in memory, which differ from the published ones for
    some families (ViT, Mixtral); `from_pretrained` reads both.
    """
    if not isinstance(model, PreTrainedModel):  # adapters of PEFT
        yield
        return
    keywords: dict[str, Any] = {"save_original_format": False}
    if "verify" in inspect.signature(model.save_pretrained).parameters:
        keywords["verify"] = False
    model.save_pretrained = functools.partial(model.save_pretrained, **keywords)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.save_pretrained
