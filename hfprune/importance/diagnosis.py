"""What is wrong with a calibration, said so that it can be mended."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from hfprune.errors import DataError
from hfprune.importance.batches import Batch
from hfprune.importance.losses import Loss
from hfprune.structure.architectures import ROWS
from hfprune.structure.slices import lists_of_layers

logger = logging.getLogger(__name__)

ALIKE = 0.9
"""Agreement of the calibration's halves below which more examples would change the plan."""


def warn_if_scarce(needed: int, device: torch.device) -> None:
    """Warn of second moments that memory cannot hold: what runs out of it is killed without a word.

    Args:
        needed: bytes.
        device: that will hold them.
    """
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > free:
        logger.warning(
            "The second moments of this model's outlets, which `reconstruction` reads, take %.1f GB"
            " or more, and %.1f GB are free. Other criteria do without: criteria=['fisher'].",
            needed / 1e9,
            free / 1e9,
        )


def warn_if_unsettled(agreement: Mapping[str, float], examples: int) -> None:
    """Warn of criteria by which the halves of the calibration examples rank the units unlike.

    A single example has no halves, and ranks the units by itself.

    Args:
        agreement: {criterion: rank correlation of the halves}.
        examples: of both halves.
    """
    if examples == 1:
        logger.warning(
            "There is only one calibration example: a criterion that reads data takes what matters"
            " for it alone for what matters. Score some dozens of examples, and see"
            " scores.agreement."
        )
    low = {name: value for name, value in agreement.items() if value < ALIKE}
    if low:
        said = ", ".join(f"{value:.2f} by {name}" for name, value in sorted(low.items()))
        logger.warning(
            "The two halves of the %d calibration examples rank the units alike only to %s (1 is"
            " equal, %.1f is enough): another sample would give another plan. Score %d examples"
            " or more.",
            examples,
            said,
            ALIKE,
            4 * examples,
        )


def loss_of(loss: Loss, model: PreTrainedModel, batch: Batch, index: int) -> torch.Tensor:
    """The loss of a calibration batch, one number.

    Args:
        loss: called with model and batch.
        model: as scored.
        batch: as the loss takes it.
        index: number of the batch.

    Raises:
        DataError: names the batch: the loss refuses it, or gives no number.
    """
    try:
        value = loss(model, batch)
    except DataError as error:
        raise DataError(f"Calibration batch {index}: {error}") from error
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else None
        found = f"a {type(value).__name__}" if shape is None else f"a tensor of shape {shape}"
        raise DataError(
            f"The loss of calibration batch {index} is {found}; it has to be a tensor with one"
            " number, the sum over examples or labelled tokens."
        )
    return value


def check_finite(
    value: torch.Tensor, index: int, model: PreTrainedModel, batch: Batch, loss: Loss
) -> None:
    """Refuse a loss that is not a number.

    Args:
        value: the loss of the batch.
        index: number of the batch.
        model: what gave it; called once more to find the layer.
        batch: what it was called with.
        loss: what called it.

    Raises:
        DataError: names the batch, and the first layer that gives nan or inf.
    """
    if torch.isfinite(value):
        return
    found: list[str] = []
    with ExitStack() as stack, torch.no_grad():
        for path in _stacks(model):
            layers = model.base_model.get_submodule(path)
            for number, layer in enumerate(layers.children()):

                def look(
                    module: nn.Module, args: Any, output: Any, name: str = f"{path}.{number}"
                ) -> None:
                    hidden = output[0] if isinstance(output, tuple) else output
                    if isinstance(hidden, torch.Tensor) and not torch.isfinite(hidden).all():
                        found.append(name)

                stack.callback(layer.register_forward_hook(look).remove)
        loss(model, batch)
    where = (
        f"{found[0]} is the first layer that gives values that are not finite"
        if found
        else "the layers give finite values, so look at its labels and at the loss"
    )
    raise DataError(f"The loss of calibration batch {index} is {value.item()}: {where}.")


def _stacks(model: PreTrainedModel) -> list[str]:
    """Paths of the stacks of layers."""
    row = ROWS.get(model.config.model_type)
    return [stack.layers for stack in row.stacks] if row else lists_of_layers(model)
