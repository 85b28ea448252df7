"""Importance with interactions: what a unit's removal adds to the error that least squares leaves.

What the units that stay can take over (see recovery/compensation.py) is not lost. So units go one
after another, each time the one whose removal adds least to the outlet's output error after the
kept columns are refitted: optimal brain surgeon (Hassibi and Stork 1993) on whole units, as in
Kurtic et al. 2023, "ZipLM", arXiv:2302.04089. The error counts as far as the loss sees it: see
moments.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hfprune.importance.moments import Moments

DAMPING = 0.01
"""Added to the inputs' second moments, relative to their mean; as the ridge of compensation."""

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
        (units,) float64, a sum over calibration tokens; ascending in the order of removal.
    """
    try:
        return _removal_errors(joint, joint.moments.inputs.dtype)
    except torch.linalg.LinAlgError:  # columns of sizes too unlike for float32
        return _removal_errors(joint, torch.float64)


def _removal_errors(joint: Joint, dtype: torch.dtype) -> torch.Tensor:
    moments, units = joint.moments, joint.units
    weight = joint.weight.to(moments.inputs.device, dtype)
    gradients = moments.gradients.to(dtype)
    trace = gradients.trace()
    importance = weight.new_zeros(units, dtype=torch.float64)
    if not units or not trace:
        return importance
    inverse = _damped_inverse(moments.inputs.to(dtype), joint.bias)
    seen, directions = torch.linalg.eigh(gradients / trace)
    rows = weight @ (directions * seen.clamp(min=0).sqrt())
    width, step = len(weight) // units, max(1, units // _STEPS)
    columns = torch.arange(len(weight), device=weight.device).unflatten(0, (units, width))
    own = inverse[columns[:, :, None], columns[:, None, :]]  # (units, width, width)
    left = torch.ones(units, dtype=torch.bool, device=weight.device)
    taken, done = torch.empty_like(inverse), 0  # a column for each that is gone
    most = weight.new_zeros(())
    while done < len(weight):
        errors = _quadratic(rows.unflatten(0, (units, width)), own).where(left, torch.inf)
        going = errors.argsort(stable=True)[: min(step, units - done // width)]
        gone = columns[going].flatten()
        before = taken[:, :done]
        current = torch.addmm(inverse[gone], before[gone], before.T, alpha=-1)
        # A Cholesky factor takes the units of a step one after another.
        factor = torch.linalg.cholesky(current[:, gone])
        added = torch.linalg.solve_triangular(factor, rows[gone], upper=False)
        steps = added.square().sum(dim=1).unflatten(0, (-1, width)).sum(dim=1)
        steps = torch.maximum(steps.cummax(dim=0).values, most)
        importance[going], most, left[going] = steps.double(), steps[-1], False
        now = torch.linalg.solve_triangular(factor, current, upper=False)
        taken[:, done : done + len(gone)], done = now.T, done + len(gone)
        rows.addmm_(now.T, added, alpha=-1)
        by_unit = now.unflatten(1, (units, width))
        own -= torch.einsum("gui,guj->uij", by_unit, by_unit)
        own[going] = torch.eye(width, dtype=dtype, device=weight.device)
    return importance


def _quadratic(pieces: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """(units,) trace of pieces^T own^-1 pieces, of (units, width, outputs) and (units, width,
    width).
    """
    if own.shape[-1] == 1:  # a batched factorization of single numbers takes as long as all else
        return torch.linalg.vector_norm(pieces, dim=(1, 2)).square() / own.flatten()
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(own), pieces, upper=False)
    return whitened.square().sum(dim=(1, 2))


def _damped_inverse(inputs: torch.Tensor, bias: bool) -> torch.Tensor:
    """Inverse second moments of the inputs; about their mean where a bias takes the mean over."""
    gram = inputs[:-1, :-1]
    damping = DAMPING * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    if bias:
        gram = gram - torch.outer(inputs[:-1, -1], inputs[-1, :-1]) / inputs[-1, -1]
    damped = gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
