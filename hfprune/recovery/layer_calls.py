"""A model's layers one at a time, each called as the whole model calls it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hfprune.importance.batches import Batch, examples_in, padding_mask, reads
from hfprune.importance.gates import replaced_forward, uncached

HELD_OUT = 5
"""One example in so many is held out to judge fits."""


Arguments = list[tuple[tuple[object, ...], dict[str, object]]]
"""Per layer, those after the hidden state, and those by name."""


@dataclass
class LayerCall:
    """How the layers of a stack are called in one batch.

    Attributes:
        batch: which one.
        hidden: the hidden state that goes into the next layer.
        rest: per layer, its arguments after the hidden state, and those by name.
        added: per layer, what the model adds to the hidden state before it: features of an image in
            the first layers of Qwen3-VL. None where that is nothing.
        mask: (batch, tokens), which positions are not padding; None for all.
        held: (positions,) of those that are not padding, which belong to held-out examples.
    """

    batch: int
    hidden: torch.Tensor
    rest: Arguments
    added: list[torch.Tensor | None]
    mask: torch.Tensor | None
    held: torch.Tensor

    def run(self, layer: nn.Module, index: int) -> torch.Tensor:
        """The output hidden state of a layer that takes the place of the index-th."""
        args, kwargs = self.rest[index]
        output = layer(self.hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def go_on(self, output: torch.Tensor, index: int) -> None:
        """From what the index-th layer gave to what goes into the next."""
        added = self.added[index + 1] if index + 1 < len(self.added) else None
        self.hidden = output if added is None else output + added

    def is_stream(self, states: torch.Tensor, index: int) -> bool:
        """Whether a tensor inside the index-th layer has the positions of the hidden state, and is
        not something else that the layer is called with: what an encoder says, for instance.
        """
        args, kwargs = self.rest[index]
        given = any(states is other for other in (*args, *kwargs.values()))
        return states.shape[:-1] == self.hidden.shape[:-1] and not given

    def real_rows(self, states: torch.Tensor) -> torch.Tensor:
        """(positions, features), without padding."""
        rows = states.flatten(0, -2)
        return rows if self.mask is None else rows[self.mask.flatten()]


class Reached(Exception):
    """All that is wanted of a forward pass is known; what comes after need not run."""


def layer_calls(model: PreTrainedModel, layers: str, batches: Sequence[Batch]) -> list[LayerCall]:
    """How each layer of a stack is called in every batch, before any of them has run; batches that
    do not reach the stack, such as texts the tower of images, are left out.

    Args:
        model: dense or pruned.
        layers: name of the list of layers in the base model.
        batches: what the model is called with.
    """
    modules = list(model.base_model.get_submodule(layers).children())
    idle = False
    calls: list[LayerCall] = []
    examples = 0
    for number, batch in enumerate(batches):
        passed, here = _pass(model, modules, batch, idle), examples_in(batch)
        if passed.entered:
            idle = idle if calls else _may_idle(model, modules, batch, passed)
            hidden = passed.entered[0]
            held = _held_out(hidden[..., 0].flatten(), here, examples)
            if (mask := padding_mask(model, batch, hidden, reads(model, layers))) is not None:
                mask = mask.to(hidden.device).bool()
                held = held[mask.flatten()]
            calls.append(LayerCall(number, hidden, passed.rest, passed.added, mask, held))
        examples += here
    return calls


def _may_idle(
    model: PreTrainedModel, modules: Sequence[nn.Module], batch: Batch, really: _Pass
) -> bool:
    """Whether the layers hand on nothing but hidden states, and what else they are called with does
    not depend on these: then nothing needs to be computed to learn it. So it is in most families.
    """
    if not all(isinstance(output, torch.Tensor) for output in really.left):
        return False
    idle = _pass(model, modules, batch, idle=True)
    return _alike(really.rest, idle.rest) and _alike(really.added, idle.added)


@dataclass
class _Pass:
    """What is seen of the layers in one batch.

    Attributes:
        entered: the hidden state that goes into each layer.
        rest: per layer, its other arguments.
        left: what each layer gives, but for the last, which does not run.
    """

    entered: list[torch.Tensor] = field(default_factory=list)
    rest: Arguments = field(default_factory=list)
    left: list[torch.Tensor | tuple[torch.Tensor, ...]] = field(default_factory=list)

    @property
    def added(self) -> list[torch.Tensor | None]:
        """See `LayerCall`."""
        found: list[torch.Tensor | None] = [None]
        for output, entered in zip(self.left, self.entered[1:], strict=True):
            before = output[0] if isinstance(output, tuple) else output
            found.append(None if torch.equal(before, entered) else entered - before)
        return found


def _pass(
    model: PreTrainedModel, modules: Sequence[nn.Module], batch: Batch, idle: bool = False
) -> _Pass:
    """Run the model up to its last layer; idle, layers hand on what they are given."""
    seen = _Pass()

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, object]) -> None:
        seen.entered.append(args[0])
        seen.rest.append((args[1:], kwargs))
        if module is modules[-1]:
            raise Reached

    def leave(module: nn.Module, args: object, output: torch.Tensor) -> None:
        seen.left.append(output)

    def hand_on(hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return hidden

    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with ExitStack() as stack:
        stack.enter_context(uncached(model))  # a layer that runs again would find its own keys
        for module in modules:
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
            if idle:
                stack.enter_context(replaced_forward(module, hand_on))
        with suppress(Reached):
            model(**inputs)
    return seen


def _alike(one: object, other: object) -> bool:
    """Whether two nests of arguments have the same tensors and the same or equal other things."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[k], other[k]) for k in one)
    return one is other or (isinstance(one, (bool, int, float, str)) and one == other)


def _held_out(positions: torch.Tensor, examples: int, before: int) -> torch.Tensor:
    """Which of a batch's positions belong to every fifth example, counted over all batches."""
    numbers = torch.arange(len(positions), device=positions.device)
    example = before + numbers * examples // len(positions)
    return example % HELD_OUT == HELD_OUT - 1


def advance(model: PreTrainedModel, layers: str, calls: Sequence[LayerCall], index: int) -> None:
    """Take the hidden states through one layer, to the next."""
    layer = model.base_model.get_submodule(f"{layers}.{index}")
    for call in calls:
        call.go_on(call.run(layer, index), index)
