"""Pruned checkpoints: what goes into config.json, and how the model comes back."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from hfprune.errors import CheckpointError
from hfprune.structure.modeling_hfprune import KEY, VERSION, StructureError, checked, pruned

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NOT_STRUCTURE = ("training", "gradient_checkpointing", "layer_idx", "in_features", "out_features")


def adopt(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model whose tensors were cut an instance of the pruned class, its structure written in its config."""
    model.config = copy.deepcopy(model.config)
    for module in model.modules():  # inner models and layers share the outer config object
        if getattr(module, "config", None).__class__ is model.config.__class__:
            module.config = model.config
    setattr(model.config, KEY, {"version": VERSION, "modules": difference_to_stock(model)})
    model.__class__ = pruned(type(model))
    return model


def difference_to_stock(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Where a model differs from the stock model of its config: {module path: {"shapes", "attrs", "empty"}}.

    The stock model is built on the meta device, so this takes no memory and milliseconds.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, KEY):
        delattr(config, KEY)
    with torch.device("meta"):
        reference = getattr(type(model), "_stock", type(model))(config)
    stock = dict(reference.base_model.named_modules())
    modules: dict[str, dict[str, Any]] = {}
    for path, module in model.base_model.named_modules():
        shapes, attrs = _describe(module)
        stock_shapes, stock_attrs = _describe(stock[path])
        entry: dict[str, Any] = {
            "shapes": {k: v for k, v in shapes.items() if stock_shapes.get(k) != v},
            "attrs": {k: v for k, v in attrs.items() if stock_attrs.get(k) != v},
        }
        entry = {part: values for part, values in entry.items() if values}
        if "_hfprune_empty" in vars(module):
            entry["empty"] = vars(module)["_hfprune_empty"]
        if entry:
            modules[path] = entry
    return modules


def _describe(module: nn.Module) -> tuple[dict[str, list[int]], dict[str, int]]:
    shapes = {name: list(p.shape) for name, p in module.named_parameters(recurse=False)}
    attrs = {
        name: value
        for name, value in vars(module).items()
        if type(value) is int and name[0] != "_" and name not in _NOT_STRUCTURE
    }
    return shapes, attrs


def from_pretrained(
    model_id: str | os.PathLike[str],
    auto_class: type | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a model, pruned or not, from a folder or the Hub, in eval mode.

    Args:
        model_id: a folder or a Hub id.
        auto_class: the class to load, an `AutoModel...` or a model class; by default the class it was saved from.
        **kwargs: as in transformers' `from_pretrained` (`dtype`, `device_map`, `revision`, `token`, ...).

    Raises:
        CheckpointError: the structure is damaged or from a newer version, tensors are missing or left over, or
            `ignore_mismatched_sizes` was asked for, which would fill pruned layers with random weights.
    """
    if kwargs.pop("ignore_mismatched_sizes", False):
        raise CheckpointError(
            "ignore_mismatched_sizes would fill the pruned layers with random weights; load without it."
        )
    hub = {
        k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs
    }
    config = AutoConfig.from_pretrained(model_id, **hub)
    structure = getattr(config, KEY, None)
    try:
        modules = checked(structure)
    except StructureError as error:
        raise CheckpointError(f"{model_id}: {error}") from error
    cls = _class_to_load(config, auto_class, model_id)
    try:
        model, info = (pruned(cls) if modules else cls).from_pretrained(
            model_id, config=config, output_loading_info=True, **kwargs
        )
    except StructureError as error:
        raise CheckpointError(f"{model_id}: {error}") from error
    if modules and not auto_class:
        odd = {k: sorted(map(str, info[k])) for k in ("missing_keys", "unexpected_keys") if info[k]}
        if odd:
            raise CheckpointError(f"{model_id} did not come back whole: {odd}.")
    return model.eval()


def _class_to_load(
    config: PreTrainedConfig, auto_class: type | None, model_id: str | os.PathLike[str]
) -> type[PreTrainedModel]:
    if auto_class is None:
        names = config.architectures or []
        cls = getattr(transformers, names[0], None) if names else None
        if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
            raise CheckpointError(
                f"{model_id} names the classes {names}, none of which transformers has; pass "
                "auto_class=AutoModel... to say which to load."
            )
        return cls
    if issubclass(auto_class, PreTrainedModel):
        return auto_class
    mapping = auto_class._model_mapping  # type: ignore[attr-defined]
    if type(config) not in mapping:
        raise CheckpointError(f"{auto_class.__name__} has no class for {config.model_type} models.")
    cls = mapping[type(config)]
    return cls[0] if isinstance(cls, tuple) else cls
