"""The loss whose gradient is importance, as a sum over what it averages.

A sum, not a mean: the gradient of an example's own term must not depend on which batch the example
    happens to be in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from hfprune.errors import DataError
from hfprune.structure.anatomy import Group

Batch = Mapping[str, torch.Tensor]
Loss = Callable[[PreTrainedModel, Batch], torch.Tensor]

IGNORED = -100  # label of a position without a loss, in all of transformers


def labels_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The model's own loss on the batch's labels, summed over examples or labelled tokens.

    Raises:
        DataError: the batch has no labels, or the model returns no loss.
    """
    if "labels" not in batch and "start_positions" not in batch:
        raise DataError(
            f"The batch has no 'labels' (it has {', '.join(batch)}); gradient importance needs a"
            " loss. Give labels, or pass loss=... to score."
        )
    outputs = model(**batch)
    if getattr(outputs, "loss", None) is None:
        raise DataError(
            f"{type(model).__name__} returns no loss for labels; load the model with its task head."
        )
    return outputs.loss * terms(model, batch)


def terms(model: PreTrainedModel, batch: Batch) -> int:
    """How many terms the model's loss is the mean of: examples, or labelled tokens."""
    labels = batch.get("labels")
    if labels is None or not is_token_level(batch):
        return next(iter(batch.values())).shape[0]
    if shifts_labels(model):
        labels = labels[:, 1:]  # the first token is predicted by nothing
    return int((labels != IGNORED).sum())


def is_token_level(batch: Batch) -> bool:
    """Whether the labels name a class for every token (language models, token classification)."""
    labels = batch.get("labels")
    return labels is not None and labels.dim() == 2 and not labels.is_floating_point()


def is_decoder(model: PreTrainedModel, group: Group) -> bool:
    """Whether a group of units lies in the decoder of an encoder-decoder."""
    return model.config.is_encoder_decoder and group.stack == 1


def padding_mask(batch: Batch, states: torch.Tensor, decoder: bool) -> torch.Tensor | None:
    """The batch's (batch, tokens) mask of real tokens, where it has one that fits the states."""
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    return mask if mask is not None and mask.shape == states.shape[:2] else None


def shifts_labels(model: PreTrainedModel) -> bool:
    """Whether the loss compares each position with the next label, as decoders' losses do."""
    if model.config.is_encoder_decoder:
        return False
    # GPT2LMHeadModel and its like carry no loss_type; transformers then falls back to the causal
    # loss.
    return model.loss_type == "ForCausalLM" or (model.loss_type is None and model.can_generate())
