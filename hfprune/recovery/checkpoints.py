"""What distillation keeps on disk while it trains: what it resumes from, and the best of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from hfprune.errors import CheckpointError, DataError, RecipeError
from hfprune.files import why_unwritable

if TYPE_CHECKING:
    from hfprune.recovery.arguments import DistillationArguments

logger = logging.getLogger(__name__)

ABSENT = object()
_STATE_FILE = "trainer_state.json"  # the last file the Trainer writes into a checkpoint


class StartCompetes(TrainerCallback):
    """The model as it came is a checkpoint like those of training: checkpoint-0, before step 1.

    The Trainer chooses the best among the checkpoints that training made, which may all be worse
    than what it began with. With this one among them, training cannot make the model worse on the
    held-out data; of equals the earlier stays.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Evaluate and save the model; or find the best of a run that goes on where its folder is
        now, which may have moved.
        """
        trainer = self._trainer
        if state.global_step or state.best_metric is not None:
            best = _checkpoint(args.output_dir, state.best_global_step)
            if best.is_dir():
                state.best_model_checkpoint = str(best)
        elif trainer._determine_best_metric(trainer.evaluate(), trial=None):
            state.best_model_checkpoint = str(_checkpoint(args.output_dir, 0))
            trainer._save_checkpoint(trainer.model_wrapped, trial=None)

    def on_train_end(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Say which checkpoint's weights the model ends with."""
        best = state.best_model_checkpoint
        if best is None:
            return
        found = f"{args.metric_for_best_model} {state.best_metric:.4g} on the held-out data"
        if step_of(best):
            logger.info("Kept the weights of step %d: %s.", step_of(best), found)
        else:
            logger.info(
                "Kept the model as it was before training (%s): no checkpoint beat it.", found
            )


def _checkpoint(output_dir: str | None, step: int | None) -> Path:
    return Path(output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def step_of(checkpoint: str | Path) -> int:
    """The step a checkpoint's folder is named after."""
    return int(Path(checkpoint).name.rpartition("-")[2])


def keeping_the_best(args: DistillationArguments) -> DistillationArguments:
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


def last_complete_checkpoint(output_dir: str | None) -> Path | None:
    """The newest checkpoint written to its end: a run may have been killed while saving, or the
    disk was full. Copies that were set aside under other names are none.
    """
    states = Path(output_dir or ".").glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_STATE_FILE}")
    found = (s.parent for s in states if _is_of_a_step(s.parent) and _is_json(s))
    return max(found, key=step_of, default=None)


def warn_without_optimizer(checkpoint: str | Path) -> None:
    """Warn of a checkpoint of weights alone: what goes on from it does not end as it would have."""
    if not Path(checkpoint, OPTIMIZER_NAME).is_file():
        warnings.warn(
            f"{checkpoint} has no {OPTIMIZER_NAME} (save_only_model?): training goes on with a new"
            " optimizer and another learning rate, and ends with other weights. To go on exactly,"
            " train with save_only_model=False.",
            stacklevel=2,
        )


def _is_of_a_step(folder: Path) -> bool:
    return folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdecimal()


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def removed_unless_whole(output_dir: Path, step: int) -> Iterator[None]:
    """Within, a checkpoint is written; if it cannot be, what there is of it goes: on a full disk
    that is room for the next one.

    Raises:
        CheckpointError: a file could not be written; says why.
    """
    try:
        yield
    except Exception as error:
        why = why_unwritable(error, output_dir)
        if why is None:
            raise
        shutil.rmtree(output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}", ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint of step {step} cannot be written in {output_dir}: {why}. Those before"
            " it are intact; make room or rights, and go on from them."
        ) from error


def refuse_spoilt(model: nn.Module, step: int, output_dir: str | None) -> None:
    """Refuse to save weights that are not finite: the checkpoints before them are the good ones.

    Raises:
        DataError: names the first such tensor and the step.
    """
    for name, parameter in model.named_parameters():
        here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.requires_grad and not here.isfinite().all():
            raise DataError(
                f"{name} is not finite after global step {step}, so no checkpoint was written; "
                f"earlier checkpoints in {output_dir} are intact. Lower learning_rate, or set "
                "max_grad_norm."
            )


@contextlib.contextmanager
def use_cache(model: PreTrainedModel, value: Any) -> Iterator[None]:
    """Within, `model.config.use_cache` is the value, or gone if that is ABSENT; then as before.

    By the model, not its config: surgery within the context gives the model another config.
    """

    def put(value: Any) -> None:
        if value is not ABSENT:
            model.config.use_cache = value
        elif "use_cache" in vars(model.config):
            del model.config.use_cache

    earlier = vars(model.config).get("use_cache", ABSENT)
    put(value)
    try:
        yield
    finally:
        put(earlier)


@contextlib.contextmanager
def training_format(model: nn.Module) -> Iterator[None]:
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
