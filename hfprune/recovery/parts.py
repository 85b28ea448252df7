"""The parts of the loss, read off what student and teacher give on one batch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.errors import DataError, RecipeError
from hfprune.recovery.losses import Counted, spread_layers, state_loss


def hidden_pairs(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    layer_map: Sequence[int] | None,
    encoder_decoder: bool,
) -> list[tuple[Tensor, str, Tensor]]:
    """Each student layer's output, the mask it is counted by, and the teacher's output."""
    sides = {"hidden_states": "positions"}
    if encoder_decoder:
        sides = {"encoder_hidden_states": "positions", "decoder_hidden_states": "predictions"}
    absent = [name for name in sides if student.get(name) is None or teacher.get(name) is None]
    if absent:
        raise DataError(f"The models return no {absent[0]}; set hidden_weight to 0.")
    # The first entry of each tuple is the embeddings.
    ours = [(state, side) for name, side in sides.items() for state in student[name][1:]]
    theirs = [state for name in sides for state in teacher[name][1:]]
    if layer_map is None:
        layer_map, offset = [], 0
        for name in sides:
            depth = len(teacher[name]) - 1
            spread = spread_layers(len(student[name]) - 1, depth)
            layer_map += [offset + layer for layer in spread]
            offset += depth
    if len(layer_map) != len(ours) or not all(0 <= layer < len(theirs) for layer in layer_map):
        raise RecipeError(
            f"layer_map is {list(layer_map)}; the student has {len(ours)} layers and the "
            f"teacher {len(theirs)}: give {len(ours)} teacher layers, each from 0 to "
            f"{len(theirs) - 1}."
        )
    matched = [theirs[layer] for layer in layer_map]
    return [(*own, state) for own, state in zip(ours, matched, strict=True)]


def described(batch: Mapping[str, Any]) -> str:
    """A batch in a message: what it holds, and in which shapes or how many."""
    parts = []
    for name, value in batch.items():
        if torch.is_tensor(value):
            odd = value.numel() - int(value.isfinite().sum())
            parts.append(f"{name} {tuple(value.shape)}" + (f" with {odd} not finite" * bool(odd)))
    return ", ".join(parts)


def task_loss(outputs: Mapping[str, Any], counted: Counted, *, summed: bool = False) -> Tensor:
    """The model's own loss, a mean unless it is `summed`, as the sum over its targets."""
    if outputs.get("loss") is None:
        raise DataError(
            "The batch gave no loss: it has no labels. Give the dataset a labels column, or set "
            "task_weight to 0."
        )
    if not counted.targets.any():  # a mean over nothing is NaN
        return outputs["logits"].sum() * 0.0
    return outputs["loss"] if summed else outputs["loss"] * counted.targets.sum()


def mean_state_loss(
    part: str, pairs: Sequence[tuple[Tensor, str, Tensor]], counted: Counted, scale: Counted
) -> Tensor:
    """Mean over pairs (student's, name of the mask, teacher's) of the error of their states."""
    losses = [
        state_loss(student, teacher, getattr(counted, side), part) * getattr(scale, side)
        for student, side, teacher in pairs
    ]
    return torch.stack(losses).mean()


@contextlib.contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Within, the list fills with the modules' outputs, in the order of the modules."""
    outputs: list[Any] = [None] * len(modules)

    def keep(at: int, module: nn.Module, given: Any, output: Tensor) -> None:
        outputs[at] = output

    hooks = [
        module.register_forward_hook(functools.partial(keep, at))
        for at, module in enumerate(modules)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


_MASKING = ("_mask_hidden_states", "_mask_input_features")


def _as_heard(features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return features


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within, the model drops nothing in training mode either; then as before.

    Dropout is a module with a probability `p`, or a number that the attention or the layer reads
    by itself, under a name such as `attention_dropout`. Models of sound mask spans of what they
    hear, too, by a method of theirs.
    """
    found: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        found += [
            (module, name, value)
            for name, value in vars(module).items()
            if isinstance(value, float) and ("drop" in name or (is_dropout and name == "p"))
        ]
    masking = [(m, name) for m in model.modules() for name in _MASKING if hasattr(m, name)]
    for module, name, _ in found:
        setattr(module, name, 0.0)
    for module, name in masking:
        setattr(module, name, _as_heard)
    try:
        yield
    finally:
        for module, name in masking:
            delattr(module, name)
        for module, name, value in found:
            setattr(module, name, value)
