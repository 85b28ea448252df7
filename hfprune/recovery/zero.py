"""Optimizer states that DeepSpeed's ZeRO shards, as those of one process.

ZeRO 1 and 2 leave the weights whole in every process. Each process has a part of one flat vector
of moments, made of all parameters of a group, and updates that part of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.errors import RecipeError


def refuse_unflattened(optimizer: Any) -> None:
    """Refuse what ZeRO's flat vectors would change.

    Args:
        optimizer: the one that DeepSpeed is to shard.

    Raises:
        RecipeError: it is not AdamW, or a weight is not in float32.
    """
    if type(optimizer) is not torch.optim.AdamW:
        raise RecipeError(
            f"DeepSpeed was asked for, and the optimizer is {type(optimizer).__name__}; only AdamW"
            " (optim: adamw_torch) is supported with it."
        )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.dtype != torch.float32:
                raise RecipeError(
                    f"DeepSpeed was asked for, and a weight is in {parameter.dtype}; only"
                    " torch.float32 is supported with it. Load the model in float32, or use FSDP2."
                )


def whole_state(zero: Any, keep: bool) -> dict[str, Any]:
    """The optimizer's `state_dict` as it would be in one process, on the CPU.

    Args:
        zero: DeepSpeed's optimizer, in every process.
        keep: whether this process wants it; else there is None for each tensor.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    flat_state = zero.optimizer.state_dict()
    if flat_state["state"]:
        _link(zero)
    state: dict[int, dict[str, Any]] = {}
    groups = []
    for index, parameters in _numbered_groups(zero):
        group = flat_state["param_groups"][index]
        groups.append({**group, "params": list(parameters)})
        for number, parameter in parameters.items():
            for name, value in flat_state["state"].get(index, {}).items():
                whole = value
                if _is_moment(value):
                    whole = safe_get_full_optimizer_state(parameter, name)  # all take part
                # Copies: the parameters of a group have one count of steps, which each would move.
                state.setdefault(number, {})[name] = _on_cpu(whole) if keep else None
    return {"state": state, "param_groups": groups}


def deal_state(state: Mapping[str, Any], zero: Any) -> None:
    """Load the optimizer's state of one process, of which each process takes its own part."""
    from deepspeed.utils import safe_set_full_optimizer_state

    moments: Mapping[int, Mapping[str, Any]] = state["state"]
    flat_state = {}
    for index, parameters in _numbered_groups(zero):
        flat = zero.single_partition_of_fp32_groups[index]
        # What never had a gradient has no state in one process, and zeros here.
        some = next((moments[number] for number in parameters if number in moments), {})
        flat_state[index] = {
            name: torch.zeros_like(flat) if _is_moment(value) else value
            for name, value in some.items()
        }
    groups = [{**group, "params": [i]} for i, group in enumerate(state["param_groups"])]
    zero.optimizer.load_state_dict({"state": flat_state, "param_groups": groups})
    _link(zero)
    for _, parameters in _numbered_groups(zero):
        for number, parameter in parameters.items():
            for name, value in moments.get(number, {}).items():
                if _is_moment(value):
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)


def _link(zero: Any) -> None:
    """Let each parameter find its part of the moments.

    DeepSpeed 0.19 does so once, after the step of the first group, when the others have none.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for parameters, flat in zip(
        zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True
    ):
        lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)


def _numbered_groups(zero: Any) -> Iterator[tuple[int, dict[int, nn.Parameter]]]:
    """(index of a group, its parameters by the numbers that torch's state has for them)."""
    first = 0
    for index, group in enumerate(zero.bit16_groups):
        yield index, dict(enumerate(group, start=first))
        first += len(group)


def _on_cpu(value: Any) -> Any:
    return value.to("cpu", copy=True) if torch.is_tensor(value) else value


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
