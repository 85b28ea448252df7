"""A model's layers one at a time, each called as the whole model calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hfprune.importance.losses import Batch, examples_in, padding_mask

HELD_OUT = 5
"""One example in so many is held out to judge fits."""


@dataclass
class LayerCall:
    """How the layers of a stack are called in one batch.

    Attributes:
        hidden: the hidden state that goes into the next layer.
        rest: per layer, its arguments after the hidden state, and those by name.
        mask: (batch, tokens), which positions are not padding; None for all.
        held: (positions,) of those that are not padding, which belong to held-out examples.
    """

    hidden: torch.Tensor
    rest: list[tuple[tuple[object, ...], dict[str, object]]]
    mask: torch.Tensor | None
    held: torch.Tensor

    def run(self, layer: nn.Module, index: int) -> torch.Tensor:
        """The output hidden state of a layer that takes the place of the index-th."""
        args, kwargs = self.rest[index]
        output = layer(self.hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def real_rows(self, states: torch.Tensor) -> torch.Tensor:
        """(positions, features), without padding."""
        rows = states.flatten(0, -2)
        return rows if self.mask is None else rows[self.mask.flatten()]


class Reached(Exception):
    """All that is wanted of a forward pass is known; what comes after need not run."""


def layer_calls(
    model: PreTrainedModel, layers: str, batches: Sequence[Batch], decoder: bool
) -> list[LayerCall]:
    """Run the model up to its last layer in every batch and keep how each of its layers is called.

    Args:
        model: dense or pruned.
        layers: name of the list of layers in the base model.
        batches: what the model is called with.
        decoder: whether they are the decoder of an encoder-decoder.
    """
    modules = list(model.base_model.get_submodule(layers).children())

    def stop(module: nn.Module, args: object, output: object) -> None:
        raise Reached

    calls: list[LayerCall] = []
    examples = 0
    for batch in batches:
        seen: list[tuple[tuple[object, ...], dict[str, object]]] = []

        def see(
            module: nn.Module,
            args: tuple[object, ...],
            kwargs: dict[str, object],
            seen: list = seen,
        ) -> None:
            seen.append((args, kwargs))

        hooks = [m.register_forward_pre_hook(see, with_kwargs=True) for m in modules]
        hooks.append(modules[-1].register_forward_hook(stop))
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        try:
            model(**inputs, **({"use_cache": False} if model.can_generate() else {}))
        except Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        rest = [(args[1:], kwargs) for args, kwargs in seen]
        hidden = seen[0][0][0]
        assert isinstance(hidden, torch.Tensor)
        here = examples_in(batch)
        held = _held_out(hidden[..., 0].flatten(), here, examples)
        if (mask := padding_mask(inputs, hidden, decoder)) is not None:
            mask = mask.bool()
            held = held[mask.flatten()]
        calls.append(LayerCall(hidden, rest, mask, held))
        examples += here
    return calls


def _held_out(positions: torch.Tensor, examples: int, before: int) -> torch.Tensor:
    """Which of a batch's positions belong to every fifth example, counted over all batches."""
    numbers = torch.arange(len(positions), device=positions.device)
    example = before + numbers * examples // len(positions)
    return example % HELD_OUT == HELD_OUT - 1


def advance(model: PreTrainedModel, layers: str, calls: Sequence[LayerCall], index: int) -> None:
    """Take the hidden states through one layer."""
    layer = model.base_model.get_submodule(f"{layers}.{index}")
    for call in calls:
        call.hidden = call.run(layer, index)
