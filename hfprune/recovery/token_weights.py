"""Which tokens a refit minds most: those whose outputs the model's answer depends on.

A classifier reads the first token of its last layer, and of the layers before what that token
attends to. Errors elsewhere cost nothing, yet plain least squares spends its freedom on all tokens
alike. So a token's error counts by the squared gradient of the answer at the outlet's output, as
tokens do in `reconstruction` (Martens and Grosse 2015, arXiv:1503.05671). The answer is a random
projection of the logits, which needs no labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfprune.errors import DataError
from hfprune.importance.batches import Batch, by_example, padding_mask, placed, reads
from hfprune.importance.gates import output_gradients, towards_activations
from hfprune.importance.losses import is_token_level, logits_loss
from hfprune.structure.anatomy import Anatomy, Group

_FLOOR = 0.1
"""What every token counts at least, where the tokens of an example count 1 in the mean."""

Weights = dict[str, torch.Tensor]
"""{group: (positions,) without padding, 1 in the mean of every example}, of one batch."""


def token_weights(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Weights]:
    """What each position counts at each outlet, for every batch; nothing of an outlet where all
    count alike: where the model answers for every token, or has no logits.

    The cost is that of scoring: a forward pass and a backward pass over activations. What is kept
    is one number for each position and outlet.
    """
    nothing: list[Weights] = [{} for _ in batches]
    if is_token_level(model, {}):
        return nothing
    weights: list[Weights] = []
    batch: Batch = {}

    def receive(
        group: Group, size: torch.Tensor, inputs: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        gradient = by_example(model, batch, gradient)
        squares = gradient.float().square().sum(dim=-1)  # (batch, tokens)
        mask = padding_mask(model, batch, squares, reads(model, group.name))
        weights[-1][group.name] = _shared_out(squares, mask)

    watching = output_gradients(model, Anatomy.of(model), receive)
    with towards_activations(model), watching:
        for index, given in enumerate(tqdm(batches, "weighing tokens", delay=2, leave=False)):
            batch = placed(given, index, model.device)
            weights.append({})
            try:
                logits_loss(model, batch).backward()
            except DataError:  # no logits
                return nothing
    return weights


def _shared_out(squares: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(batch, tokens) squared gradients as (positions,) weights."""
    real = torch.ones_like(squares) if mask is None else mask.to(squares)
    mean = (squares * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp(min=1)
    shares = squares / mean
    # An example without a gradient, or with one that is not finite, says nothing of its tokens.
    known = (mean > 0) & mean.isfinite()
    return (_FLOOR + (1 - _FLOOR) * shares).where(known, 1.0)[real.bool()]
