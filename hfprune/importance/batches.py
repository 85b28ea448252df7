"""What a batch holds: examples, and the tokens of each; what of it a tower of layers reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from transformers import PreTrainedModel

from hfprune.errors import DataError

Batch = Mapping[str, torch.Tensor]

IGNORED = -100  # label of a position without a loss, in all of transformers
ANSWERS = ("labels", "start_positions", "end_positions")  # what a batch is judged by

_LEAST_DIMENSIONS = {"input_ids": 2, **dict.fromkeys(ANSWERS, 1)}

Reads = Literal["inputs", "decoder inputs", "images"]


def examples_in(batch: Batch) -> int:
    """Number of examples in a batch."""
    first = next(iter(batch.values()))
    return len(batch.get("input_ids", first))  # patches of all images may come in one sequence


def placed(batch: Batch, index: int, device: torch.device) -> Batch:
    """A copy of a calibration batch, checked (see `check_batch`), on a device: no gradient flows
    into what it was computed from, in whichever mode.
    """
    check_batch(batch, index)
    return {name: tensor.detach().to(device, copy=True) for name, tensor in batch.items()}


def check_batches(batches: object, name: str = "batches") -> None:
    """Refuse what no batches can be read of; `check_batch` looks at each.

    Raises:
        DataError: names the argument and what was given.
    """
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise DataError(
            f"{name} must be a list, or another iterable, of dicts {{name: tensor}}, as the model"
            f" is called with, not {batches!r:.80}."
        )


def check_batch(batch: Batch, index: int) -> None:
    """Refuse what is no calibration batch.

    Args:
        batch: {name: tensor}, with at least one example.
        index: number of the batch, for the message.

    Raises:
        DataError: names the batch, and what in it is no tensor, or of one example without its
            dimension; or it has no examples.
    """
    check_tensors(batch, f"Calibration batch {index}")
    for name, tensor in batch.items():
        if tensor.dim() < _LEAST_DIMENSIONS.get(name, 0):
            raise DataError(
                f"{name!r} of calibration batch {index} has the shape {tuple(tensor.shape)}, as if"
                " of one example; put examples together to batches, as a DataLoader does."
            )
    if not batch or not examples_in(batch):
        raise DataError(f"Calibration batch {index} has no examples; leave it out.")


def check_tensors(batch: Batch, which: str) -> None:
    """Refuse what is no mapping of tensors.

    Args:
        batch: {name: tensor}.
        which: names the batch, for the message.

    Raises:
        DataError: names it, and what in it is no tensor.
    """
    if not isinstance(batch, Mapping):
        raise DataError(
            f"{which} is a {type(batch).__name__}; give a list, or another iterable, of dicts"
            " {name: tensor}, as the model is called with."
        )
    for name, tensor in batch.items():
        if not isinstance(tensor, torch.Tensor):
            raise DataError(
                f"{name!r} of {which[0].lower()}{which[1:]} is a {type(tensor).__name__}; every"
                " value has to be a tensor. Leave out what the model does not take, and collate"
                " lists."
            )


def by_example(model: PreTrainedModel, batch: Batch, values: torch.Tensor) -> torch.Tensor:
    """(examples, tokens, features), of values that may have examples and tokens in one dimension,
    or several rows for each example: its choices, the crops of its image.

    Raises:
        DataError: examples have unlike shares, and which is whose cannot be told.
    """
    examples = examples_in(batch)
    if values.dim() == 3 and len(values) == examples:
        return values
    if values.dim() == 3 and values.shape[1] == examples > 1:
        raise DataError(
            "A layer of this model takes tokens before examples (mlcd_vision_model): give batches"
            " of one example."
        )
    positions = values.shape[:-1].numel()
    text = batch.get("input_ids")
    if (text is None or positions != text.numel()) and not _images_alike(model, batch):
        raise DataError(
            "The examples of a batch have unlike numbers of image tokens, and which of the image's"
            " patches belong to which cannot be told: give batches of one example, or of images"
            " of one size."
        )
    if positions % examples:
        raise DataError(
            f"{positions} positions do not belong to {examples} examples alike: give batches of"
            " one example."
        )
    return values.reshape(examples, positions // examples, values.shape[-1])


def _images_alike(model: PreTrainedModel, batch: Batch) -> bool:
    """Whether every example has as many image tokens, and so as many patches, as the others."""
    token, text = getattr(model.config, "image_token_id", None), batch.get("input_ids")
    if token is None or text is None:
        return True
    counts = (text == token).flatten(1).sum(dim=1)
    return bool((counts == counts[0]).all())


def reads(model: PreTrainedModel, path: str) -> Reads:
    """What a module at that path reads, of the towers that its model is made of."""
    if model.config.is_encoder_decoder and "decoder." in f"{path}.":
        return "decoder inputs"
    return "images" if "vision" in path or "visual" in path else "inputs"


def padding_mask(
    model: PreTrainedModel, batch: Batch, states: torch.Tensor, reads: Reads
) -> torch.Tensor | None:
    """The (rows, tokens) mask of real tokens of states (rows, tokens, ...), where the batch has one
    that fits them; of a decoder whose inputs are its labels, those are real that are labelled.
    """
    mask = _mask(batch, reads)
    rows, tokens = states.shape[:2]
    if mask is None or len(mask) > rows:
        return None
    of_signal = getattr(model, "_get_feature_vector_attention_mask", None)
    if of_signal and reads == "inputs" and mask.shape[1] != tokens:  # samples, not their features
        mask = of_signal(tokens, mask)
    # An example may have several rows, its choices.
    return mask.reshape(rows, tokens) if mask.numel() == rows * tokens else None


def _mask(batch: Batch, reads: Reads) -> torch.Tensor | None:
    only_images = "pixel_values" in batch and "input_ids" not in batch
    if reads == "images" or only_images:
        return batch.get("pixel_attention_mask")
    if reads == "inputs":
        return batch.get("attention_mask")
    mask = batch.get("decoder_attention_mask")
    if mask is None and "decoder_input_ids" not in batch and "labels" in batch:
        return batch["labels"] != IGNORED
    return mask
