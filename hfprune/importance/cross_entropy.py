"""Cross-entropy that keeps no more than the logits: over a large vocabulary nothing else counts.

torch keeps the log-probabilities besides and makes two gradients as large; of Gemma 3's 262,144
words each is more than all activations of all layers together. Here the probabilities are made
when the gradient is asked for, in the gradient's own memory, as in Liger Kernel (Hsu et al. 2024,
arXiv:2410.10989).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx

_ROWS = 32
"""Rows whose exponentials are made at a time."""


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy`; lean for (rows, classes) float32 or float64 logits and
    (rows,) class numbers, and torch's own for all else.
    """
    # The two old names of a reduction overrule the new one.
    unset = weight is None and size_average is None and reduce is None and not label_smoothing
    plain = unset and reduction in ("mean", "sum")
    classes = target.dim() == 1 and not target.is_floating_point()
    if not (plain and classes and logits.dtype in (torch.float32, torch.float64)):
        return F.cross_entropy(
            logits,
            target,
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
            label_smoothing,
        )
    total: torch.Tensor = _Summed.apply(logits, target, ignore_index)
    return total / (target != ignore_index).sum() if reduction == "mean" else total


class _Summed(torch.autograd.Function):
    """The sum over rows of log sum exp(logits) - logits[target]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: torch.Tensor, target: torch.Tensor, ignored: int
    ) -> torch.Tensor:
        counted = target != ignored
        norms = torch.cat([rows.logsumexp(dim=1) for rows in logits.split(_ROWS)])
        ctx.save_for_backward(logits, norms, target.where(counted, 0), counted)
        missed = F.nll_loss(logits, target, ignore_index=ignored, reduction="none")
        return (norms.where(counted, 0.0) + missed).sum()

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, norms, hit, counted = ctx.saved_tensors  # type: ignore[attr-defined]
        scale = (gradient * counted)[:, None]
        made = (logits - norms[:, None]).exp_().mul_(scale)
        return made.scatter_add_(1, hit[:, None], -scale.to(made)), None, None
