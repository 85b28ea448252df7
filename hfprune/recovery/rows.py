"""A linear layer's weights as least squares sees them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import nn

from hfprune.structure.slices import axis_of


def as_rows(linear: nn.Module) -> torch.Tensor:
    """(inputs + 1, outputs) float64 weights, the last row the bias or zeros."""
    weight: torch.Tensor = linear.weight.detach()  # type: ignore[operator]
    rows = (weight if axis_of(linear, 1) == 0 else weight.T).double()
    last = linear.bias.detach().double() if has_bias(linear) else rows.new_zeros(rows.shape[1])  # type: ignore[operator]
    return torch.cat([rows, last[None]])


def write_rows(linear: nn.Module, rows: torch.Tensor) -> None:
    """Set the weights, and the bias if there is one, to what `as_rows` would give."""
    weight: torch.Tensor = linear.weight  # type: ignore[assignment]
    weight.copy_(rows[:-1] if axis_of(linear, 1) == 0 else rows[:-1].T)
    if has_bias(linear):
        linear.bias.copy_(rows[-1])  # type: ignore[operator]
    torch.clear_autocast_cache()  # autocast would go on with the old ones


def put_back(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """What gives modules the weights back that they have now."""
    before = [(module, copy.deepcopy(module.state_dict())) for module in modules]

    def restore() -> None:
        for module, state in before:
            module.load_state_dict(state)
        torch.clear_autocast_cache()

    return restore


def has_bias(linear: nn.Module) -> bool:
    """Whether there is a bias to fit."""
    return getattr(linear, "bias", None) is not None
