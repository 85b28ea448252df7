"""Whether a model can be cut at all: its tensors all there, its own, and as its row says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from hfprune.errors import UnsupportedModelError
from hfprune.structure.architectures import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def forget_gguf(model: PreTrainedModel) -> None:
    """Make a model that was read from a GGUF file one like any other, in place: its weights are
    plain tensors by then, and what is left of the loader only forbids saving.
    """
    vars(model).update(hf_quantizer=None, is_quantized=False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def check_plain(model: PreTrainedModel) -> None:
    """Refuse, before any change, a model whose tensors are not all there and its own.

    Raises:
        UnsupportedModelError: says what is in the way and what to do.
    """
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        inside = (getattr(model, name, None) for name in ("module", "_orig_mod", "base_model"))
        wrapped = next((module for module in inside if module is not None), None)
        hint = (
            f"it wraps a {type(wrapped).__name__}: give the model inside (merged, if it is PEFT's)"
            if wrapped is not None
            else "load one with AutoModel...from_pretrained"
        )
        raise UnsupportedModelError(f"A {name} is not a transformers model; {hint}.")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None or any(map(_is_quantized, model.parameters())):
        raise UnsupportedModelError(
            f"This {name} is quantized: its weights cannot be cut. Load it unquantized, prune, "
            "then quantize."
        )
    check_unadapted(model)
    modules = list(model.modules())
    if any("FullyShardedDataParallel" in type(m).__name__ for m in modules):
        raise UnsupportedModelError(
            f"This {name} is flattened by FSDP 1: prune the whole model first, then wrap it."
        )
    if any(p.is_meta for m in modules if not is_offloaded(m) for p in m.parameters(recurse=False)):
        raise UnsupportedModelError(
            f"This {name} has parameters on the meta device, without values: load its weights, "
            "then prune."
        )


def check_unadapted(model: nn.Module) -> None:
    """Refuse a model with PEFT adapters.

    Raises:
        UnsupportedModelError: says what to do.
    """
    loaded = getattr(model, "_hf_peft_config_loaded", False)
    if loaded or any(type(m).__module__.startswith("peft.") for m in model.modules()):
        raise UnsupportedModelError(
            f"This {type(model).__name__} has PEFT adapters inside: merge them (merge_and_unload),"
            " then prune."
        )


def _is_quantized(weight: nn.Parameter) -> bool:
    """Whether a weight is packed: in less than 16 bits, or in a tensor of another kind."""
    plain = type(weight.data) is torch.Tensor or is_sharded(weight)
    return not plain or weight.element_size() < 2


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether FSDP keeps parts of a tensor in other processes."""
    return type(tensor).__name__ == "DTensor"


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a module's weights elsewhere and brings them when it is called."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def check_whole(model: PreTrainedModel) -> None:
    """Refuse to cut a model whose weights are not all in the memory of this process.

    Raises:
        UnsupportedModelError: it is sharded or offloaded; it can be scored and planned for.
    """
    sharded = any(map(is_sharded, model.parameters()))
    if sharded or any(map(is_offloaded, model.modules())):
        raise UnsupportedModelError(
            f"This {type(model).__name__} is {'sharded by FSDP' if sharded else 'offloaded'}: it "
            "can be scored and planned for, but not cut; cut one that is loaded whole."
        )


def check_variant(model: PreTrainedModel, row: Row) -> None:
    """Refuse a variant of the family that its row does not describe.

    Raises:
        UnsupportedModelError: names the flag, the module or the tensors.
    """
    name = type(model).__name__
    for flag in row.unless:
        name_of, unset = flag.removeprefix("!"), flag.startswith("!")
        if bool(getattr(model.config, name_of, None)) != unset:
            raise UnsupportedModelError(
                f"This {name} has {name_of} {'unset' if unset else 'set'}; the row for "
                f"{row.model_type!r} does not cover that."
            )
    names: dict[int, list[str]] = {}
    for path, parameter in model.base_model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(path)
    for stack in row.stacks:
        shared = [
            paths
            for paths in names.values()
            if len(paths) > 1 and any(path.startswith(f"{stack.layers}.") for path in paths)
        ]
        if shared:
            raise UnsupportedModelError(
                f"This {name} shares one tensor between {' and '.join(shared[0])}; cutting one "
                "would cut the other."
            )
        try:
            layers = model.base_model.get_submodule(stack.layers)
            for layer in layers.children():
                for attention in stack.attentions:
                    layer.get_submodule(attention.o)
                if stack.ffn is not None and stack.moe is None:
                    layer.get_submodule(stack.ffn.down)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"This {name} is not built as the row for {row.model_type!r} says: {error}."
            ) from error
