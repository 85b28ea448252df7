"""Second moments at outlets: of what goes in, and of the loss's gradient at what comes out.

Together they say what an error at the outlet costs: output directions count by the second moment of
the loss's gradient there, tokens by its squared norm. That is the Kronecker-factored curvature of
Martens and Grosse 2015, arXiv:1503.05671, with each token's own weight left in the inputs' factor.

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

from hfprune.importance.batches import Batch, by_example, padding_mask, reads
from hfprune.structure.anatomy import Group

TOKENS_PER_COLUMN = 1.5
"""From how many calibration tokens the second moments of an outlet's inputs are taken."""

_LEAST_TOKENS = 128
"""Of a narrow outlet; so few tokens cost nothing."""

_ROWS_AT_ONCE = 192
"""So many make a product of matrices fast; fewer wait for others."""

_BLOCK = 256
"""Columns of a second moment that are multiplied, and held, with those that follow them only."""

_ALIGNED = 16
"""Rows begin at multiples of so many numbers: products of others take half as long again."""

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


class _Gram:
    """A sum of rows^T rows, of rows that come a few at a time: little more than half of it."""

    def __init__(self, side: int, dtype: torch.dtype, device: torch.device) -> None:
        self._side, self._padding = side, -side % _ALIGNED
        padded = side + self._padding
        self._blocks = {
            first: torch.zeros(
                min(_BLOCK, padded - first), padded - first, dtype=dtype, device=device
            )
            for first in range(0, padded, _BLOCK)
        }
        self._waiting: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor) -> None:
        """Count rows in, (any number, side)."""
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= _ROWS_AT_ONCE:
            self._multiply()

    def _multiply(self) -> None:
        if not self._waiting:
            return
        rows = torch.nn.functional.pad(torch.cat(self._waiting), (0, self._padding))
        self._waiting.clear()
        for first, block in self._blocks.items():
            block.addmm_(rows[:, first : first + _BLOCK].T, rows[:, first:])

    def reduce(self) -> None:
        """Add up the sums of all processes."""
        self._multiply()
        for block in self._blocks.values():
            dist.all_reduce(block)

    def total(self) -> torch.Tensor:
        """The sum so far, (side, side)."""
        self._multiply()
        whole = self._blocks[0].new_empty(self._side, self._side)
        for first, padded in self._blocks.items():
            block = padded[: self._side - first, : self._side - first]
            whole[first:, first : first + _BLOCK] = block.T
            whole[first : first + _BLOCK, first:] = block
        return whole


class MomentSums:
    """Running moments of every group, one batch after another.

    Args:
        model: whose outlets they are.
        batches: how many there will be, of all processes, if that is known: then tokens are drawn.
    """

    def __init__(self, model: PreTrainedModel, batches: int | None = None) -> None:
        self._sums: dict[str, tuple[_Gram, _Gram]] = {}
        self._model = model
        self._batches = batches
        self._dtype = torch.promote_types(model.dtype, torch.float32)
        self._batch: Batch = {}

    def least_bytes(self, groups: Iterable[Group]) -> int:
        """What the moments of these groups' inputs will hold at least, all at once."""
        squares = sum((group.units * group.columns) ** 2 for group in groups)
        return squares // 2 * self._dtype.itemsize

    def start(self, batch: Batch) -> None:
        """Tell which batch the coming gradients belong to."""
        self._batch = batch

    def receive(
        self, group: Group, size: torch.Tensor, inputs: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        """Add one outlet's input and the gradient of its output, (batch, tokens, features), with
        the output's size, (batch, tokens); or each without a dimension for the batch.
        """
        inputs, gradient = (by_example(self._model, self._batch, t) for t in (inputs, gradient))
        weight = torch.linalg.vector_norm(gradient, dim=-1, dtype=self._dtype)  # (batch, tokens)
        size = size.reshape(weight.shape).to(self._dtype)
        weight = weight.mul_(size).square_()
        mask = padding_mask(self._model, self._batch, inputs, reads(self._model, group.name))
        real = torch.ones_like(weight) if mask is None else mask.to(weight)
        mean = weight.sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp(min=1)
        weight = weight.lerp(mean * real, 0.5).where(size > 0, 0.0).flatten()
        wanted = self._tokens_wanted(inputs.shape[-1], len(weight))
        drawn, share = drawn_tokens(weight, wanted)
        size = size.flatten()[drawn]
        x = inputs.flatten(0, 1).index_select(0, drawn).to(share)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        x *= (share.sqrt() / size.clamp(min=_TINY))[:, None]
        # Drawn by its weight, a token stands for so many that are like it.
        times = share / weight[drawn].clamp(min=_TINY)
        g = gradient.flatten(0, 1).index_select(0, drawn).to(share)
        g *= (size * times.sqrt())[:, None]
        of_inputs, of_gradients = self._of(group, inputs.shape[-1], g.shape[-1], g.device)
        of_inputs.add(x)
        of_gradients.add(g)

    def _of(
        self, group: Group, columns: int, outputs: int, device: torch.device
    ) -> tuple[_Gram, _Gram]:
        """The sums of a group's inputs and gradients, which begin at zero."""
        if group.name not in self._sums:
            of_inputs, of_gradients = (
                _Gram(side, self._dtype, device) for side in (columns + 1, outputs)
            )
            self._sums[group.name] = of_inputs, of_gradients
        return self._sums[group.name]

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
            for gram in self._of(group, columns, outputs, device):
                gram.reduce()

    def take(self, group: Group) -> Moments:
        """The moments of a group, which are not held here any longer."""
        return Moments(*(gram.total() for gram in self._sums.pop(group.name)))


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
