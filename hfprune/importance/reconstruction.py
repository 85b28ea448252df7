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

The second moment of a wide outlet's inputs is what costs: columns^2 multiplications a token, twice
the layer's own. So both moments are taken from as many tokens as that many columns need, drawn by
their weight (importance sampling), and not from all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from hfprune.importance.losses import Batch, by_example, is_decoder, padding_mask
from hfprune.structure.anatomy import Group

DAMPING = 0.01
"""Added to the inputs' second moments, relative to their mean; as the ridge of compensation."""

TOKENS_PER_COLUMN = 2
"""From how many calibration tokens the second moments of an outlet's inputs are taken."""

_LEAST_TOKENS = 128
"""Of a narrow outlet; so few tokens cost nothing."""

_STEPS = 50
"""Units go in so many steps; those of one step in the order of their errors before it."""

_TURNS_HELD = 5
"""After so many steps the columns of the units that went are cut out, which costs a copy."""

_TINY = torch.finfo(torch.float32).tiny


@dataclass
class Moments:
    """Second moments at one outlet, sums over calibration tokens in float32 or wider.

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
    """Running moments of every group, one batch after another.

    Args:
        model: whose outlets they are.
        batches: how many there will be, of all processes, if that is known: then tokens are drawn.
    """

    def __init__(self, model: PreTrainedModel, batches: int | None = None) -> None:
        self.moments: dict[str, Moments] = {}
        self._model = model
        self._batches = batches
        self._dtype = torch.promote_types(model.dtype, torch.float32)
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
        size, g = size.to(self._dtype), gradient.to(self._dtype) * size
        weight = g.square().sum(dim=-1)  # (batch, tokens)
        mask = padding_mask(self._batch, inputs, is_decoder(self._model, group))
        real = torch.ones_like(weight) if mask is None else mask.to(weight)
        mean = weight.sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp(min=1)
        weight = ((weight + mean * real) / 2).where(size.squeeze(-1) > 0, 0.0).flatten()
        wanted = self._tokens_wanted(inputs.shape[-1], len(weight))
        drawn, share = drawn_tokens(weight, wanted)
        x = inputs.flatten(0, 1)[drawn].to(share)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        x = x * (share.sqrt() / size.flatten()[drawn].clamp(min=_TINY))[:, None]
        # Drawn by its weight, a token stands for so many that are like it.
        times = share / weight[drawn].clamp(min=_TINY)
        g = g.flatten(0, 1)[drawn] * times.sqrt()[:, None]
        moments = self._of(group, inputs.shape[-1], g.shape[-1], g.device)
        moments.inputs.addmm_(x.T, x)
        moments.gradients.addmm_(g.T, g)

    def _of(self, group: Group, columns: int, outputs: int, device: torch.device) -> Moments:
        """The sums of a group, which begin at zero."""
        if group.name not in self.moments:
            sides = (columns + 1, outputs)
            empty = (torch.zeros(n, n, dtype=self._dtype, device=device) for n in sides)
            self.moments[group.name] = Moments(*empty)
        return self.moments[group.name]

    def _tokens_wanted(self, columns: int, given: int) -> int:
        """How many of a batch's tokens make up its share."""
        if self._batches is None:
            return given
        wanted = max(TOKENS_PER_COLUMN * columns, _LEAST_TOKENS)
        return min(given, math.ceil(wanted / self._batches))

    def reduce(self, groups: Iterable[tuple[Group, int, int]], device: torch.device) -> None:
        """Add up the sums of all processes, for groups with their numbers of columns and outputs;
        a process may have had no batch.
        """
        for group, columns, outputs in groups:
            moments = self._of(group, columns, outputs, device)
            dist.all_reduce(moments.inputs)
            dist.all_reduce(moments.gradients)


def drawn_tokens(weight: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that stand for all: by systematic sampling, which draws a token as often as its weight
    is met by equal steps through the sum of weights. Nothing is random.

    Args:
        weight: (tokens,), not negative.
        count: how many tokens to draw; all of them are their own sample.

    Returns:
        (count,) indices, repeated where a token is heavy, and (count,) their weights, whose sum is
        that of all.
    """
    if count == len(weight):
        return torch.arange(count, device=weight.device), weight
    reached = weight.double().cumsum(dim=0)
    steps = (torch.arange(count, dtype=torch.float64, device=weight.device) + 0.5) / count
    index = torch.searchsorted(reached, steps * reached[-1]).clamp(max=len(weight) - 1)
    return index, (reached[-1] / count).to(weight).expand(count)


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
    numbers = torch.arange(units, device=weight.device)  # of the units whose columns are held
    left = torch.ones(units, dtype=torch.bool, device=weight.device)
    most = weight.new_zeros(())
    for turn, first in enumerate(range(0, units, step), 1):
        columns = torch.arange(len(rows), device=weight.device).unflatten(0, (-1, width))
        own = inverse[columns[:, :, None], columns[:, None, :]]  # (units held, width, width)
        errors = _quadratic(rows.unflatten(0, (-1, width)), own).where(left, torch.inf)
        going = errors.argsort(stable=True)[: min(step, units - first)]
        gone = columns[going].flatten()
        # A Cholesky factor takes the units of a step one after another.
        factor = torch.linalg.cholesky(inverse[gone[:, None], gone])
        added = torch.linalg.solve_triangular(factor, rows[gone], upper=False)
        steps = added.square().sum(dim=1).unflatten(0, (-1, width)).sum(dim=1)
        steps = torch.maximum(steps.cummax(dim=0).values, most)
        importance[numbers[going]], most, left[going] = steps.double(), steps[-1], False
        shares = torch.linalg.solve_triangular(factor, inverse[gone], upper=False)
        rows.addmm_(shares.T, added, alpha=-1)
        inverse.addmm_(shares.T, shares, alpha=-1)
        if turn % _TURNS_HELD:
            # What is gone has no part in what follows.
            rows[gone], inverse[gone], inverse[:, gone] = 0.0, 0.0, 0.0
            inverse[gone, gone] = 1.0
        else:
            held = columns[left].flatten()
            rows, inverse = rows[held], inverse[held][:, held]
            numbers, left = numbers[left], left[left]
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
