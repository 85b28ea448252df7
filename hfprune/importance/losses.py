"""The loss whose gradient is importance, as a sum over what it averages.

A sum, not a mean: the gradient of an example's own term must not depend on which batch the example
happens to be in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hfprune.errors import DataError
from hfprune.structure.anatomy import Block, Group

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


def logits_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """How far the logits move, whatever the labels: a random projection of each example's logits.

    Its squared gate gradient is, on average over the projections, the squared change of the
    centred logits when the gate closes (Hutchinson's estimator; the softmax does not see a common
    shift). It needs no labels, and it counts every example alike, where the loss on labels that the
    model has learnt by heart leaves only its few mistakes. For two classes it is the margin.

    Returns:
        The projections, summed over examples, and over real tokens where the logits are per token.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**(batch if model.config.is_encoder_decoder else inputs)).logits
    # Drawn from the inputs, so that a batch has the same projections on whichever process it lands.
    seed = int(sum(tensor.double().sum() for tensor in batch.values())) % 2**31
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(logits.shape, generator=generator).to(logits)
    classes = logits.shape[-1]
    if classes > 1:
        directions = directions - directions.mean(dim=-1, keepdim=True)
    size = max(1, classes - 1) ** 0.5
    projected = (logits * directions).sum(dim=-1) / directions.norm(dim=-1) * size
    mask = padding_mask(batch, logits, model.config.is_encoder_decoder)
    return (projected if mask is None else projected * mask.to(projected)).sum()


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


def is_decoder(model: PreTrainedModel, group: Group | Block) -> bool:
    """Whether a group of units lies in the decoder of an encoder-decoder."""
    return model.config.is_encoder_decoder and group.stack == 1


def padding_mask(batch: Batch, states: torch.Tensor, decoder: bool) -> torch.Tensor | None:
    """The batch's (batch, tokens) mask of real tokens, where it has one that fits the states."""
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    return mask if mask is not None and mask.shape == states.shape[:2] else None


def shifts_labels(model: PreTrainedModel) -> bool:
    """Whether the loss compares each position with the next label, as decoders' losses do."""
    # By the class's name: `loss_type` is None for GPT2LMHeadModel and its like.
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


LOSSES: dict[str, Loss] = {"labels": labels_loss, "logits": logits_loss}
