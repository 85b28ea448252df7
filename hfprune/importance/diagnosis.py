"""What is wrong with a calibration, said so that it can be mended."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hfprune.errors import DataError
from hfprune.importance.losses import Batch, Loss
from hfprune.structure.architectures import row_of

logger = logging.getLogger(__name__)

ALIKE = 0.9
"""Agreement of the calibration's halves below which more examples would change the plan."""


def warn_if_unsettled(agreement: Mapping[str, float], examples: int) -> None:
    """Warn of criteria by which the halves of the calibration examples rank the units unlike.

    Args:
        agreement: {criterion: rank correlation of the halves}.
        examples: of both halves.
    """
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
        for row in row_of(model.config.model_type).stacks:
            layers = model.base_model.get_submodule(row.layers)
            for number, layer in enumerate(layers.children()):

                def look(
                    module: nn.Module, args: Any, output: Any, name: str = f"{row.layers}.{number}"
                ) -> None:
                    hidden = output[0] if isinstance(output, tuple) else output
                    if not torch.isfinite(hidden).all():
                        found.append(name)

                stack.callback(layer.register_forward_hook(look).remove)
        loss(model, batch)
    where = (
        f"{found[0]} is the first layer that gives values that are not finite"
        if found
        else "the layers give finite values, so look at its labels and at the loss"
    )
    raise DataError(f"The loss of calibration batch {index} is {value.item()}: {where}.")
