"""Where an outlet's output joins the residual stream, found by looking rather than by a table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hfprune.errors import DataError
from hfprune.importance.gates import outlet_of
from hfprune.recovery.layer_calls import LayerCall, Reached
from hfprune.structure.anatomy import Group, layer_of


@dataclass(frozen=True)
class Junction:
    """The way from an outlet to the residual stream.

    Attributes:
        sum: path in the layer of the module whose input is the sum, "" for the layer's output;
            None where no sum was found.
        scaling: path of the module between, which only scales each feature: an RMS norm, as in
            Gemma 3, or a layer scale. None where there is none.
    """

    sum: str | None
    scaling: str | None = None


def junction_of(model: PreTrainedModel, group: Group, call: LayerCall, index: int) -> Junction:
    """Of a group's outlet: in one batch, the first module input (or the layer's output) that is the
    outlet's output, as it is or scaled, plus a tensor seen before.
    """
    layer, outlet = layer_of(model, group), outlet_of(model, group)
    paths = {module: path for path, module in layer.named_modules()}
    seen: list[torch.Tensor] = [call.hidden]
    after: list[tuple[str, torch.Tensor]] = []
    joining: dict[str | None, torch.Tensor] = {}
    given: list[torch.Tensor] = []

    def look(module: nn.Module, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor) and args[0].shape == call.hidden.shape:
            if joining:
                after.append((paths[module], args[0]))
            else:
                seen.append(args[0])

    def leave(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if module is outlet:
            assert isinstance(output, torch.Tensor)
            joining[None] = _as_stream(output, call, group)
            given.append(output)
        elif given and args and args[0] is given[0] and isinstance(output, torch.Tensor):
            joining[paths[module]] = output

    modules = [m for m in paths if m is not layer]
    hooks = [m.register_forward_pre_hook(look) for m in modules]
    hooks += [m.register_forward_hook(leave) for m in modules]
    try:
        after.append(("", call.run(layer, index)))
    finally:
        for hook in hooks:
            hook.remove()
    for path, tensor in after:
        for between, joined in joining.items():
            rest = (tensor - joined).float()
            scale = rest.abs().max()
            if any((rest - s.float()).abs().max() < 0.01 * scale for s in seen):
                if between is None:
                    return Junction(path)
                if _scales(layer.get_submodule(between), joining[None]):
                    return Junction(path, between)
    return Junction(None)


def _as_stream(output: torch.Tensor, call: LayerCall, group: Group) -> torch.Tensor:
    """An outlet's output in the shape of the stream: some give all tokens in one dimension.

    Raises:
        DataError: it has tokens before examples.
    """
    if output.dim() == 3 and output.shape != call.hidden.shape and len(call.hidden) > 1:
        raise DataError(
            f"{group.outlet} takes tokens before examples: give batches of one example."
        )
    return output.reshape(call.hidden.shape)


def _scales(module: nn.Module, states: torch.Tensor) -> bool:
    """Whether a feature that is zero stays zero whatever the others are: LayerNorm moves it."""
    half = states.shape[-1] // 2
    some = states.clone()
    some[..., half:] = 0
    return not module(some)[..., half:].any()


@dataclass
class Seen:
    """What passed an outlet in one run, each (positions, features) without padding.

    Attributes:
        input: of the outlet.
        output: of the outlet.
        joined: what of the output joins the residual stream: itself, or scaled.
        sum: the residual stream with it; where no sum was found, `joined`.
    """

    input: torch.Tensor
    output: torch.Tensor
    joined: torch.Tensor
    sum: torch.Tensor


@contextmanager
def watch(
    model: PreTrainedModel, group: Group, junction: Junction, call: LayerCall, stop: bool = False
) -> Iterator[list[Seen]]:
    """Collect what passes a group's outlet in the coming run of its layer. With `stop` the run ends
    by `Reached` once all is known.
    """
    found: list[Seen] = []
    layer, outlet = layer_of(model, group), outlet_of(model, group)

    def at_outlet(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        rows = call.real_rows(output)
        if call.mask is None:
            rows = rows.clone()  # falcon adds to its output in place
        found.append(Seen(call.real_rows(args[0]), rows, rows, rows))
        if stop and junction.sum is None:
            raise Reached

    def at_scaling(module: nn.Module, args: object, output: torch.Tensor) -> None:
        found[0].joined = call.real_rows(output)

    def at_sum(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        # A module may be called before the outlet, and again after the sum (xmod's norm).
        if not found or found[0].sum is not found[0].output:
            return
        found[0].sum = call.real_rows(args[0])
        if stop:
            raise Reached

    def at_end(
        module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]
    ) -> None:
        found[0].sum = call.real_rows(output[0] if isinstance(output, tuple) else output)

    hooks = [outlet.register_forward_hook(at_outlet)]
    if junction.scaling is not None:
        hooks.append(layer.get_submodule(junction.scaling).register_forward_hook(at_scaling))
    if junction.sum == "":
        hooks.append(layer.register_forward_hook(at_end))
    elif junction.sum is not None:
        hooks.append(layer.get_submodule(junction.sum).register_forward_pre_hook(at_sum))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
