"""Ridge regression from second moments: what is fitted may be any number of positions long."""

from __future__ import annotations

from dataclasses import dataclass

import torch

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates for the ridge, relative to the mean squared input; the held-out part chooses among
them, or to leave the outlet as it is.
"""

UNCHOSEN = 1e-1
"""The ridge where there are too few batches to hold one out."""


@dataclass
class Moments:
    """Second moments of inputs (with a one appended for the bias) and targets, in float64."""

    inputs: torch.Tensor  # (columns + 1, columns + 1)
    cross: torch.Tensor  # (columns + 1, outputs)
    targets: float
    count: int

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.inputs + other.inputs,
            self.cross + other.cross,
            self.targets + other.targets,
            self.count + other.count,
        )

    @staticmethod
    def of(inputs: torch.Tensor, targets: torch.Tensor) -> Moments:
        """Products in at least float32, sums in float64."""
        wide = torch.promote_types(inputs.dtype, torch.float32)
        x = torch.cat([inputs.to(wide), inputs.new_ones(len(inputs), 1, dtype=wide)], dim=1)
        y = targets.to(wide)
        return Moments(
            (x.T @ x).double(), (x.T @ y).double(), float(y.double().square().sum()), len(x)
        )

    def error(self, weights: torch.Tensor) -> float:
        """Mean squared error over positions of weights (columns + 1, outputs)."""
        fitted = (weights * (self.inputs @ weights)).sum() - 2 * (weights * self.cross).sum()
        return (float(fitted) + self.targets) / max(1, self.count)


def solve(moments: Moments, current: torch.Tensor, ridge: float, bias: bool) -> torch.Tensor:
    """Ridge regression towards the current weights: (columns + 1, outputs), the bias last."""
    size = len(moments.inputs) if bias else len(moments.inputs) - 1
    gram, cross = moments.inputs[:size, :size], moments.cross[:size]
    scale = gram.diagonal()[: len(moments.inputs) - 1].mean()
    pull = torch.full((size,), ridge, dtype=torch.float64, device=gram.device) * scale
    if bias:
        pull[-1] = 1e-9 * gram[-1, -1]  # the bias is free
    solution = torch.linalg.solve(gram + pull.diag(), cross + pull[:, None] * current[:size])
    return solution if bias else torch.cat([solution, current[size:]])
