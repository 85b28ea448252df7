"""Ridge regression from normal equations: what is fitted may be any number of positions long."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates for the ridge, relative to the mean squared input; held-out examples choose among
them, or to leave the outlet as it is.
"""

UNJUDGED = 1e-1
"""The ridge where there are too few examples to hold one out."""


@dataclass
class NormalEquations:
    """Weighted sums over positions of products of inputs (with a one appended for the bias) and
    targets.

    Attributes:
        inputs: (columns + 1, columns + 1) float64.
        cross: (columns + 1, outputs) float64.
        targets: of their squares.
        count: of positions.
    """

    inputs: torch.Tensor
    cross: torch.Tensor
    targets: float = 0.0
    count: int = 0

    @staticmethod
    def like(weights: torch.Tensor) -> NormalEquations:
        """Of no position yet, for weights (columns + 1, outputs) float64."""
        return NormalEquations(
            weights.new_zeros(len(weights), len(weights)), torch.zeros_like(weights)
        )

    def add(self, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
        """Count positions in, (positions, columns) and (positions, outputs), each by its weight,
        (positions,): products in at least float32.
        """
        wide = torch.promote_types(inputs.dtype, torch.float32)
        each = weights.to(wide).sqrt()[:, None]
        x = torch.cat([inputs.to(wide) * each, each], dim=1)
        y = targets.to(wide) * each
        with torch.autocast(x.device.type, enabled=False):
            self.inputs += x.T @ x
            self.cross += x.T @ y
        self.targets += float(y.double().square().sum())
        self.count += len(x)

    def absorb(self, other: NormalEquations) -> None:
        """Count in what another has counted."""
        self.inputs += other.inputs
        self.cross += other.cross
        self.targets += other.targets
        self.count += other.count

    def is_finite(self) -> bool:
        """Whether all inputs and targets were: on the diagonal are the inputs' squares."""
        return math.isfinite(self.targets) and bool(self.inputs.diagonal().isfinite().all())

    def error(self, weights: torch.Tensor) -> float:
        """Mean squared error over positions of weights (columns + 1, outputs)."""
        fitted = (weights * (self.inputs @ weights)).sum() - 2 * (weights * self.cross).sum()
        return (float(fitted) + self.targets) / max(1, self.count)


Fit = Callable[[NormalEquations], torch.Tensor]
"""From normal equations to weights (columns + 1, outputs), the bias last."""


def best_fit(
    fit: NormalEquations, held: NormalEquations, current: torch.Tensor, units: int, bias: bool
) -> Fit:
    """What does best on held-out positions: a ridge towards the current weights, one scale for each
    unit, or the current weights as they are.

    Args:
        fit: what candidates are fitted to.
        held: what they are judged on; of no position, if there are too few examples.
        current: (columns + 1, outputs) float64, the bias last.
        units: how many, of equally many consecutive columns each.
        bias: whether there is one to fit.
    """
    if not held.count:
        return partial(ridge, current=current, size=UNJUDGED, bias=bias)
    ridges: list[Fit] = [partial(ridge, current=current, size=r, bias=bias) for r in RIDGES]
    by_unit: Fit = partial(scaled, current=current, units=units)
    as_it_is: Fit = partial(_unchanged, current=current)
    candidates = [as_it_is, *ridges, by_unit]
    return min(candidates, key=lambda candidate: held.error(candidate(fit)))


def ridge(
    equations: NormalEquations, current: torch.Tensor, size: float, bias: bool
) -> torch.Tensor:
    """Ridge regression towards the current weights; these, where inputs are too much alike."""
    columns = len(equations.inputs) - 1
    used = columns + 1 if bias else columns
    pull = size * _scale(equations.inputs.diagonal()[:columns])
    gram = equations.inputs[:used, :used].clone()
    gram.diagonal()[:columns] += pull
    cross = equations.cross[:used].clone()
    cross[:columns] += pull * current[:columns]
    if bias:  # free, but for what makes it one solution
        slight = 1e-9 * gram[-1, -1].clamp(min=1.0)
        gram[-1, -1] += slight
        cross[-1] += slight * current[-1]
    solution = _solved(gram, cross)
    return current if solution is None else torch.cat([solution, current[used:]])


def scaled(equations: NormalEquations, current: torch.Tensor, units: int) -> torch.Tensor:
    """The current weights, the columns of every unit times one number, by least squares.

    Kwon et al. 2022, arXiv:2204.09656, section 3.4: fewer numbers than a regression has, for when
    there is little to fit them to. The current weights, where inputs are too much alike.
    """
    columns = len(current) - 1
    rows = current[:columns]
    by_unit = (units, columns // units if units else 0)
    gram = (rows @ rows.T).mul_(equations.inputs[:columns, :columns])
    if units < columns:
        gram = gram.unflatten(1, by_unit).sum(2).unflatten(0, by_unit).sum(1)
    wanted = equations.cross[:columns] - torch.outer(equations.inputs[:columns, -1], current[-1])
    cross = (rows * wanted).sum(dim=1).unflatten(0, by_unit).sum(dim=1)
    pull = RIDGES[0] * _scale(gram.diagonal())
    gram.diagonal().add_(pull)
    scales = _solved(gram, (cross + pull)[:, None])
    if scales is None:
        return current
    return torch.cat([rows * scales.repeat_interleave(by_unit[1], dim=0), current[columns:]])


def _solved(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor | None:
    """gram^-1 cross; None where gram is singular up to the rounding of its float32 products."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    return None if failed else torch.cholesky_solve(cross, factor)


def _unchanged(equations: NormalEquations, current: torch.Tensor) -> torch.Tensor:
    return current


def _scale(squares: torch.Tensor) -> torch.Tensor:
    """Their mean, or next to nothing where there are none or all are 0."""
    return squares.sum().div(max(1, len(squares))).clamp(min=1e-30)
