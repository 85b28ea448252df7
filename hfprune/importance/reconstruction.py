"""Importance with interactions: what a unit's removal adds to the error that least squares leaves.

What the units that stay can take over (see recovery/compensation.py) is not lost. So units go one
after another, each time the one whose removal adds least to the outlet's output error after the
kept columns are refitted: optimal brain surgeon (Hassibi and Stork 1993) on whole units, as in
Kurtic et al. 2023, "ZipLM", arXiv:2302.04089. The error counts as far as the loss sees it: output
directions by the second moment of the loss's gradient there, tokens by its squared norm. That is
the Kronecker-factored curvature of Martens and Grosse 2015, arXiv:1503.05671, with each token's own
weight left in the inputs' factor.

Errors are taken relative to the size of the outlet's output at each token, and gradients times that
size, which leaves their product as it is. Sizes can differ a thousandfold: where a norm follows the
outlet, as in Gemma 3, the first token's output is tiny and its gradient huge, and without this one
token would decide which directions count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from hfprune.importance.losses import Batch, by_example, is_decoder, padding_mask
from hfprune.structure.anatomy import Group

DAMPING = 0.01
"""Added to the inputs' second moments, relative to their mean; as the ridge of compensation."""

_STEPS = 100
"""Units go in so many steps; those of one step in the order of their errors before it."""


@dataclass
class Moments:
    """Second moments at one outlet, float64 sums over calibration tokens.

    Attributes:
        inputs: (columns + 1, columns + 1) of the inputs and a constant one over the output's size,
            each token weighted by half its own squared gradient and half the mean of its example:
            few tokens of the last layer have a gradient.
        gradients: (outputs, outputs) of the loss's gradient at the outlet's output times its size.
    """

    inputs: torch.Tensor
    gradients: torch.Tensor


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


class MomentSums:
    """Running moments of every group, one batch after another."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.moments: dict[str, Moments] = {}
        self._model = model
        self._batch: Batch = {}

    def start(self, batch: Batch) -> None:
        """Tell which batch the coming gradients belong to."""
        self._batch = batch

    def receive(
        self, group: Group, size: torch.Tensor, inputs: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        """Add one outlet's input and the gradient of its output, (batch, tokens, features), with
        the output's size, (batch, tokens); or each without a dimension for the batch.
        """
        size, inputs, gradient = (
            by_example(self._batch, t) for t in (size[..., None], inputs, gradient)
        )
        wide = torch.promote_types(inputs.dtype, torch.float32)
        x, g = inputs.to(wide), gradient.to(wide) * size
        weight = g.square().sum(dim=-1)  # (batch, tokens)
        mask = padding_mask(self._batch, x, is_decoder(self._model, group))
        real = torch.ones_like(weight) if mask is None else mask.to(wide)
        mean = weight.sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp(min=1)
        size = size.squeeze(-1)
        weight = ((weight + mean * real) / 2 / size.square()).where(size > 0, 0.0)
        x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1).flatten(0, 1)
        g = g.flatten(0, 1)
        found = Moments(((x * weight.flatten()[:, None]).T @ x).double(), (g.T @ g).double())
        if group.name in self.moments:
            self.moments[group.name].inputs += found.inputs
            self.moments[group.name].gradients += found.gradients
        else:
            self.moments[group.name] = found

    def reduce(self, groups: Iterable[tuple[Group, int, int]], device: torch.device) -> None:
        """Add up the sums of all processes, for groups with their numbers of columns and outputs;
        a process may have had no batch.
        """
        for group, columns, outputs in groups:
            empty = Moments(
                torch.zeros(columns + 1, columns + 1, dtype=torch.float64, device=device),
                torch.zeros(outputs, outputs, dtype=torch.float64, device=device),
            )
            moments = self.moments.setdefault(group.name, empty)
            dist.all_reduce(moments.inputs)
            dist.all_reduce(moments.gradients)


def removal_errors(joint: Joint) -> torch.Tensor:
    """What the removal of each unit adds to the error, once all that matter less are gone.

    Returns:
        (units,) float64, a sum over calibration tokens; ascending in the order of removal.
    """
    moments, units = joint.moments, joint.units
    weight = joint.weight.to(moments.inputs.device, torch.float64)
    importance = weight.new_zeros(units)
    trace = moments.gradients.trace()
    if not units or not trace:
        return importance
    inverse = _damped_inverse(moments.inputs, joint.bias)
    seen, directions = torch.linalg.eigh(moments.gradients / trace)
    rows = weight @ (directions * seen.clamp(min=0).sqrt())
    width = len(weight) // units
    left = torch.arange(units, device=weight.device)
    most = weight.new_zeros(())
    while len(left):
        pieces = rows.unflatten(0, (-1, width))  # (units left, width, outputs)
        inside = inverse.unflatten(0, (-1, width)).unflatten(2, (-1, width))
        own = inside.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # (units left, width, width)
        # Of single numbers a batched factorization takes as long as all the rest.
        solved = pieces / own if width == 1 else torch.linalg.solve(own, pieces)
        errors = (pieces * solved).sum(dim=(1, 2))
        going = errors.argsort(stable=True)[: max(1, units // _STEPS)]
        stay = torch.ones_like(left, dtype=torch.bool).index_fill(0, going, False)
        gone = (going[:, None] * width + torch.arange(width, device=going.device)).flatten()
        kept = stay.repeat_interleave(width).nonzero().flatten()
        # A Cholesky factor takes the units of a step one after another.
        factor = torch.linalg.cholesky(inverse[gone[:, None], gone])
        added = torch.linalg.solve_triangular(factor, rows[gone], upper=False)
        steps = added.square().sum(dim=1).unflatten(0, (-1, width)).sum(dim=1)
        steps = torch.maximum(steps.cummax(dim=0).values, most)
        importance[left[going]], most = steps, steps[-1]
        shares = torch.cholesky_solve(inverse[gone[:, None], kept], factor)
        rows = rows[kept] - shares.T @ rows[gone]
        inverse = inverse[kept[:, None], kept] - inverse[kept[:, None], gone] @ shares
        left = left[stay]
    return importance


def _damped_inverse(inputs: torch.Tensor, bias: bool) -> torch.Tensor:
    """Inverse second moments of the inputs; about their mean where a bias takes the mean over."""
    gram = inputs[:-1, :-1]
    damping = DAMPING * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    if bias:
        gram = gram - torch.outer(inputs[:-1, -1], inputs[-1, :-1]) / inputs[-1, -1]
    damped: torch.Tensor = gram + damping * torch.eye(
        len(gram), dtype=gram.dtype, device=gram.device
    )
    return torch.linalg.inv(damped)
