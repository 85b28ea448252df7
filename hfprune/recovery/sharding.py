"""Training that FSDP2 or DeepSpeed shards, and checkpoints that do not show it.

Accelerate shards the weights, their gradients and the optimizer's state. A checkpoint is gathered
tensor by tensor and written by the first process, in the files of one process; what reads it takes
its own shard of each. So a training may go on, and a model may be loaded, on any number of
processes, sharded or not, and no checkpoint holds the weights twice.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from hfprune.errors import CheckpointError, DataError, RecipeError
from hfprune.processes import deepspeed_asked, fsdp_asked, refuse_deepspeed, refuse_fsdp
from hfprune.recovery.checkpoints import (
    refuse_spoilt,
    removed_unless_whole,
    training_format,
    warn_without_optimizer,
)
from hfprune.recovery.parts import described
from hfprune.recovery.zero import deal_state, refuse_unflattened, whole_state


class ShardableTrainer(Trainer):
    """A Trainer whose checkpoints can be loaded back, on any number of processes, and that FSDP2
    or DeepSpeed's ZeRO 1 and 2 may shard.

    Both change modules for good: train the model that `spread` yields, to have one's own back.

    Raises:
        HfpruneError: a setting of FSDP or DeepSpeed is not supported.
        RecipeError: adapters were to be sharded, or DeepSpeed is asked for by the arguments, or to
            shard other than AdamW and float32.
        DataError: the loss or the weights are not finite any more; no checkpoint is written of
            them.
        CheckpointError: the checkpoint to load does not fit the model, or one cannot be written.
    """

    model: nn.Module
    optimizer: Optimizer
    lr_scheduler: Any
    _batches_begun, _batches_of_step = 0, 1

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, one that shards on CPUs too.

        Accelerate 1.15 knows FSDP on accelerators only: on CPUs every process would silently have
        the whole model.
        """
        if self.args.deepspeed:
            raise RecipeError(
                "The training arguments set deepspeed; its settings come from the launcher here:"
                " accelerate launch --config_file recipes/accelerate/deepspeed.yaml."
            )
        if deepspeed_asked():
            refuse_deepspeed(self.args.deepspeed_plugin)
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU and _asked(self.args):
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
            state.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            refuse_fsdp(state.fsdp_plugin)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        if self._shards:
            self._refuse_adapters()
        if self.is_fsdp_enabled:
            self._prepare_sharding()
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        # DeepSpeed takes copies of the weights, and would look for a checkpoint of its own.
        self._load_from_checkpoint(resume_from_checkpoint, self.model)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    @property
    def _shards(self) -> bool:
        """Whether FSDP or DeepSpeed shards what is trained."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _refuse_adapters(self) -> None:
        if not isinstance(self.model, PreTrainedModel):
            raise RecipeError(
                f"FSDP or DeepSpeed was asked for, and the model is a {type(self.model).__name__}: "
                "adapters are not sharded here. Leave lora out, or start without sharding."
            )

    def _prepare_sharding(self) -> None:
        """Say which modules to shard one by one, and leave out what cannot be sharded."""
        for parameter in self.model.parameters():
            if not parameter.numel():  # torch 2.13 cannot scatter gradients without elements
                parameter.requires_grad_(False)
        plugin = self.accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = (
            plugin.transformer_cls_names_to_wrap
            or _layer_classes(cast(PreTrainedModel, self.model))
        )

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Make the optimizer, without the tensors of emptied layers: they have nothing to learn.

        They are not sharded, and its state must be the same with and without FSDP.
        """
        empty = [p for p in self.model.parameters() if p.requires_grad and not p.numel()]
        for parameter in empty:
            parameter.requires_grad_(False)
        try:
            optimizer = super().create_optimizer(model)
        finally:
            for parameter in empty:
                parameter.requires_grad_(True)
        if self.is_deepspeed_enabled:
            refuse_unflattened(optimizer)
        return optimizer

    # Stopping.

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Take the batches of one optimizer step: none after the last, as when a run goes on that
        was stopped at its very end.
        """
        if 0 < self.state.max_steps <= self.state.global_step:
            return [], None
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches_begun, self._batches_of_step = 0, len(batches)
        return batches, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss; stop training if it is not finite."""
        if model.training:
            self._batches_begun += 1
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            loss = found[0] if isinstance(found, tuple) else found
            self.refuse_not_finite({"loss": loss}, inputs)
        return found

    def refuse_not_finite(self, losses: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Stop training if a loss is not finite.

        Args:
            losses: the parts of a batch's loss, by their names.
            batch: what the model was given.

        Raises:
            DataError: names step, batch and process.
        """
        if torch.stack([loss.detach() for loss in losses.values()]).isfinite().all():
            return
        given = ", ".join(f"{part} {value:g}" for part, value in losses.items())
        raise DataError(
            f"The loss is not finite at global step {self.state.global_step + 1}, batch "
            f"{self._batches_begun} of {self._batches_of_step} on process "
            f"{self.accelerator.process_index} ({described(batch)}): {given}. "
            f"Nothing was updated; earlier checkpoints in {self.args.output_dir} are intact. Lower "
            "learning_rate, check the batch, or, in distillation, set the weight of the part at "
            "fault to 0."
        )

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # Of the steps since the last log the Trainer would take this process's share alone.
        self._tr_loss = self.accelerator.reduce(self._tr_loss, reduction="mean")
        return super()._finalize_training(*args, **kwargs)

    # Saving.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        saved = self.accelerator.unwrap_model(self.model)
        refuse_spoilt(saved, self.state.global_step, self.args.output_dir)
        folder = Path(self.args.output_dir or ".")
        with training_format(saved), removed_unless_whole(folder, self.state.global_step):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `Trainer.save_model` does; sharded weights are gathered."""
        if not self._shards:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=_whole_state(self.model, keep=self.args.should_save))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            state = whole_state(self._zero(), keep=self.args.should_save)
        elif self.is_fsdp_enabled:
            gather = partial(_gathered, keep=self.args.should_save)
            state = tree_map(gather, self.optimizer.state_dict())
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Then the first process writes what makes the checkpoint complete.
        self.accelerator.wait_for_everyone()

    # Loading.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            warn_without_optimizer(checkpoint)
        if not self._shards or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        files = [Path(checkpoint, name) for name in (OPTIMIZER_NAME, SCHEDULER_NAME)]
        state, schedule = (torch.load(file, weights_only=True, mmap=True) for file in files)
        if self.is_deepspeed_enabled:
            deal_state(state, self._zero())
        else:
            _deal_states(state, self.optimizer)
            self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(schedule)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.is_fsdp_enabled:
            self._issue_warnings_after_load(_deal_weights(resume_from_checkpoint, self.model))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._shards:
            self._load_from_checkpoint(cast(str, self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _zero(self) -> Any:
        """DeepSpeed's optimizer, which Accelerate has wrapped."""
        return cast(Any, self.optimizer).optimizer

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
                f"that {type(self).__name__} wrote for this very structure."
            )


@contextmanager
def spread(model: PreTrainedModel, args: TrainingArguments) -> Iterator[PreTrainedModel]:
    """Within, the model to train in place of this one, which has its weights again afterwards.

    FSDP and DeepSpeed change modules for good. So they are given a copy that takes the weights
    over, and these come back whole, on the CPU of every process. Without them it is the model
    itself. After an exception the model is without weights: the other processes may be gone.
    """
    if not (_asked(args) or deepspeed_asked()):
        yield model
        return
    taken = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    trained = copy.deepcopy(model, taken)
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    yield trained
    whole = dict(trained.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # A copy: to DeepSpeed a parameter is a view of the vector of all of them.
            parameter.data = _whole(whole[name].detach()).to("cpu", copy=True)
        for name, buffer in trained.named_buffers():
            model.get_buffer(name).data = buffer.detach().cpu()


def _whole_state(model: nn.Module, keep: bool) -> dict[str, Any]:
    """The model's state with whole tensors on the CPU, tied ones as one; None in place of each if
    not kept.
    """
    owner = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    found: dict[int | str, Any] = {}
    state = model.state_dict()
    for name, value in state.items():
        key = owner.get(name, name)
        if key not in found:
            found[key] = _gathered(value, keep)
        state[name] = found[key]
    return state


def _gathered(value: Any, keep: bool) -> Any:
    """A tensor, whole and on the CPU, or None if it is not kept; other values as they are."""
    if not torch.is_tensor(value):
        return value
    whole = _whole(value.detach())  # every process takes part
    return whole.cpu() if keep else None


@torch.no_grad()
def _deal_weights(folder: str | Path, model: nn.Module) -> _IncompatibleKeys:
    """Load the weights of a folder, of which each process takes its own shard.

    Returns:
        The names that the folder lacks, and those that the model does not have.
    """
    own = model.state_dict()
    missing, unexpected = set(own), []
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                if name not in own:
                    unexpected.append(name)
                    continue
                missing.discard(name)
                if own[name].numel():
                    own[name].copy_(_part(tensors.get_tensor(name), own[name]))
    return _IncompatibleKeys(sorted(missing), unexpected)


def _deal_states(state: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Replace the whole tensors of an optimizer's saved state by this process's shards."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        for name, value in values.items():
            if torch.is_tensor(value) and value.shape == parameters[index].shape:
                values[name] = _part(value, parameters[index])


def _layer_classes(model: PreTrainedModel) -> list[str]:
    """Classes of the modules that are sharded one by one: the layers.

    transformers lists the embeddings among them for some families; Accelerate 1.15 shards the word
    embeddings in any case, and fails if a module around them is sharded already.
    """
    names = set(model._no_split_modules or ())
    embeddings = model.get_input_embeddings()
    layers = (m for m in model.modules() if type(m).__name__ in names)
    return sorted({type(m).__name__ for m in layers if embeddings not in m.modules()})


def _whole(value: Tensor) -> Tensor:
    if not isinstance(value, DTensor):
        return value
    if not value.numel():  # as of emptied layers; torch 2.13 cannot gather those
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return value.full_tensor()


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device and in the shards of another."""
    whole = whole.to(like.device)
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _asked(args: TrainingArguments) -> bool:
    return bool(args.fsdp) or fsdp_asked()
