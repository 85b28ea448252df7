"""Linear layers whose backward pass leaves out the rows that have no gradient.

Nobody reads padding, and a classifier reads one token of its last layer: the gradient of all other
rows is exactly zero there, and so is its product with the weights, which torch computes at full
cost.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx

_GLANCE = 8
"""So many columns nearly always tell that a row is not zero; to look at all takes as long as the
product of a narrow layer."""

_COPIED = 2**24
"""Numbers that are copied at once: the gradients of all words of all tokens are too many."""

_FEW = 0.75
"""The share of rows up to which to gather them is faster than to multiply all."""


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`torch.nn.functional.linear`; lean where only the input has a gradient, and on the CPU: to
    count rows would let another device wait.
    """
    wanted = torch.is_grad_enabled() and input.requires_grad
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    ours = type(weight) in (torch.Tensor, torch.nn.Parameter)
    plain = ours and min(input.dim(), weight.dim()) > 1
    here = input.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if not (wanted and plain and here) or trained:
        return F.linear(input, weight, bias)
    # As a matrix: what a function of autograd gives may be changed in place only if it is no view.
    made: torch.Tensor = _Linear.apply(input.flatten(0, -2), weight, bias)
    return made.view(*input.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    """rows @ weight^T + bias, with a gradient of the rows alone."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return F.linear(rows, weight, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors  # type: ignore[attr-defined]
        read = rows_that_differ_from_zero(gradient)
        if len(read) > _FEW * len(gradient):
            return gradient @ weight, None, None
        made = gradient.new_zeros(len(gradient), weight.shape[1])
        for some in _a_few(read, gradient):
            made.index_copy_(0, some, gradient[some] @ weight)
        return made, None, None


def rows_that_differ_from_zero(matrix: torch.Tensor) -> torch.Tensor:
    """The numbers of a matrix' rows that hold anything but zeros, ascending."""
    differs = matrix[:, :: matrix.shape[1] // _GLANCE + 1].any(dim=1)
    unclear = differs.logical_not().nonzero().flatten()
    for some in _a_few(unclear, matrix):
        differs[some] = matrix[some].any(dim=1)
    return differs.nonzero().flatten()


def _a_few(rows: torch.Tensor, matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Numbers of a matrix' rows, in parts that may be copied."""
    return rows.split(max(1, _COPIED // max(1, matrix.shape[1])))
