"""Importance with interactions: what a unit's removal adds to the error that least squares leaves.

What the units that stay can take over (see recovery/compensation.py) is not lost. So units go one
after another, each time the one whose removal adds least to the outlet's output error after the
kept columns are refitted: optimal brain surgeon (Hassibi and Stork 1993) on whole units, as in
Kurtic et al. 2023, "ZipLM", arXiv:2302.04089. The error counts as far as the loss sees it: see
moments.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hfprune.importance.moments import Moments

DAMPING = 0.01
"""Added to the inputs' second moments, relative to their mean; as the ridge of compensation."""

_TIE = 1e-6
"""Relative to an error: equal ones keep the order in which their units went."""

_STEPS = 50
"""Units go in so many steps; those of one step in the order of their errors before it."""


@dataclass(frozen=True)
class Joint:
    """What is known of a group's columns together.

    Attributes:
        moments: of its outlet.
        weight: (columns, outputs), the outlet's.
        units: how many, of equally many consecutive columns each.
        bias: whether the outlet has a bias, which is refitted too.
    """

    moments: Moments
    weight: torch.Tensor
    units: int
    bias: bool


def removal_errors(joint: Joint) -> torch.Tensor:
    """What the removal of each unit adds to the error, once all that matter less are gone.

    Returns:
        (units,) float64, sums over calibration tokens; ascending in the order of removal, and all
        together what the removal of all costs.
    """
    try:
        return _removal_errors(joint, joint.moments.inputs.dtype)
    except torch.linalg.LinAlgError:  # columns of sizes too unlike for float32
        return _removal_errors(joint, torch.float64)


def _removal_errors(joint: Joint, dtype: torch.dtype) -> torch.Tensor:
    moments, units = joint.moments, joint.units
    weight = joint.weight.to(moments.inputs.device, dtype)
    importance = weight.new_zeros(units, dtype=torch.float64)
    if not units or not moments.gradients.trace():
        return importance
    inverse = _damped_inverse(moments.inputs.to(dtype), joint.bias)
    rows = weight @ _square_root(moments.gradients, dtype)
    left, step = torch.arange(units, device=weight.device), max(1, units // _STEPS)
    order, errors = [], []
    while len(left):
        # Half of them at a time: what is left then is a problem of half the size.
        steps = math.ceil(len(left) / (2 * step))
        first = _eliminated(inverse, rows, len(left), min(steps * step, len(left)), step)
        order.append(left[first.order])
        errors.append(first.errors)
        inverse, rows, left = first.inverse, first.rows, left[first.stay]
    importance[torch.cat(order)] = _ascending(torch.cat(errors))
    return importance


def _ascending(errors: torch.Tensor) -> torch.Tensor:
    """The nearest errors that ascend, by isotonic regression.

    Those of one step are not quite in order, nor is one whose twin went just before it. Their
    running maximum would ascend, too, but add up to half as much again as all removals cost, and
    so make neurons look dearer than heads, which go one by one.
    """
    from scipy.optimize import isotonic_regression

    nearest = torch.as_tensor(isotonic_regression(errors.cpu().numpy()).x).to(errors)
    order = torch.linspace(0, _TIE, len(errors), dtype=errors.dtype, device=errors.device)
    return nearest * (1 + order)


class _Elimination(NamedTuple):
    """Some units that went, and the problem that is left.

    Attributes:
        order: their numbers, in the order in which they went.
        errors: what each of them added, float64.
        stay: numbers of the others, ascending.
        inverse: (columns, columns) of the second moments of the columns that stay.
        rows: (columns, directions) of those, refitted.
    """

    order: torch.Tensor
    errors: torch.Tensor
    stay: torch.Tensor
    inverse: torch.Tensor
    rows: torch.Tensor


def _eliminated(
    inverse: torch.Tensor, rows: torch.Tensor, units: int, count: int, step: int
) -> _Elimination:
    """Let `count` of the units go, `step` of them at once; the rows are overwritten."""
    width = len(rows) // units
    columns = torch.arange(len(rows), device=rows.device).unflatten(0, (units, width))
    own = inverse[columns[:, :, None], columns[:, None, :]]  # (units, width, width)
    left = torch.ones(units, dtype=torch.bool, device=rows.device)
    identity = torch.eye(step * width, dtype=rows.dtype, device=rows.device)
    taken, done = inverse.new_empty(count * width, len(rows)), 0  # a row for each that is gone
    order, errors = [], []
    while done < count * width:
        closest = _quadratic(rows.unflatten(0, (units, width)), own).where(left, torch.inf)
        going = closest.argsort(stable=True)[: min(step, count - done // width)]
        gone = columns[going].flatten()
        before = taken[:done]
        current = inverse.index_select(0, gone)
        current.addmm_(before.index_select(1, gone).T, before, alpha=-1)
        # A Cholesky factor takes the units of a step one after another.
        factor = torch.linalg.cholesky(current.index_select(1, gone))
        # Its inverse, because it is small: solving with all columns would take longer.
        one = identity[: len(gone), : len(gone)]
        whiten = torch.linalg.solve_triangular(factor, one, upper=False)
        added = whiten @ rows.index_select(0, gone)
        order.append(going)
        errors.append(added.square().sum(dim=1).unflatten(0, (-1, width)).sum(dim=1).double())
        left[going] = False
        now = torch.mm(whiten, current, out=taken[done : done + len(gone)])
        done += len(gone)
        rows.addmm_(now.T, added, alpha=-1)
        by_unit = now.unflatten(1, (units, width))
        own -= torch.einsum("gui,guj->uij", by_unit, by_unit)
        own[going] = identity[:width, :width]
    rest = columns[left].flatten()
    taken = taken.index_select(1, rest)
    return _Elimination(
        torch.cat(order),
        torch.cat(errors),
        left.nonzero().flatten(),
        inverse.index_select(0, rest).index_select(1, rest).addmm_(taken.T, taken, alpha=-1),
        rows[rest],
    )


def _quadratic(pieces: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """(units,) trace of pieces^T own^-1 pieces, of (units, width, outputs) and (units, width,
    width).
    """
    if own.shape[-1] == 1:  # a batched factorization of single numbers takes as long as all else
        return torch.linalg.vector_norm(pieces, dim=(1, 2)).square() / own.flatten()
    solved = torch.cholesky_solve(pieces @ pieces.mT, torch.linalg.cholesky(own))
    return solved.diagonal(dim1=1, dim2=2).sum(dim=1)


def _damped_inverse(inputs: torch.Tensor, bias: bool) -> torch.Tensor:
    """Inverse second moments of the inputs; about their mean where a bias takes the mean over."""
    gram, sums = inputs[:-1, :-1].clone(), inputs[-1, :-1]
    damping = DAMPING * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    if bias:
        gram.addr_(sums / inputs[-1, -1], sums, alpha=-1)
    gram.diagonal().add_(damping)
    # LAPACK's order is by columns. The inverse is its own transpose, whose rows can be taken fast.
    return torch.cholesky_inverse(torch.linalg.cholesky(gram)).mT


def _square_root(moment: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What times its own transpose is the moment over its trace."""
    relative = (moment / moment.trace()).to(dtype)
    # Of fewer tokens than outputs, it is positive only up to the rounding of its sums.
    rounding = torch.finfo(moment.dtype)
    relative.diagonal().mul_(1 + math.sqrt(rounding.eps)).add_(rounding.tiny)
    return torch.linalg.cholesky(relative)
