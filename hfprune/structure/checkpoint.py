"""Pruned checkpoints: what goes into config.json, and how the model comes back."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import (
    AmbiguousGlobalPerLayerAttributeError,
)
from transformers.utils.hub import cached_file, extract_commit_hash

from hfprune.errors import CheckpointError, HfpruneError, expect
from hfprune.structure.anatomy import Anatomy, Group
from hfprune.structure.architectures import Stack, row_of
from hfprune.structure.modeling_hfprune import (
    ATTRIBUTES,
    EMPTY,
    KEY,
    PATCH,
    VERSION,
    ConfigView,
    StructureError,
    auto_mappings,
    checked,
    help_forward,
    pruned,
    sub_configs_of,
    tensors_of,
    write_labels,
)
from hfprune.structure.slices import config_of, ffn_of, inputs_of, layer_of, stack_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def own_config(model: PreTrainedModel) -> None:
    """Give a model a config of its own, so that surgery changes no other model's."""
    shared, model.config = model.config, copy.deepcopy(model.config)
    mine = sub_configs_of(model.config)
    parts = {id(part): mine[name] for name, part in sub_configs_of(shared).items()}
    parts[id(shared)] = model.config
    for module in model.modules():  # inner models and layers share the outer config objects
        config = getattr(module, "config", None)
        if isinstance(config, ConfigView):
            vars(config)["config"] = parts.get(id(vars(config)["config"]), vars(config)["config"])
        elif id(config) in parts:
            module.config = parts[id(config)]


def adopt(model: PreTrainedModel, plan_summary: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Make a model whose tensors were cut an instance of the pruned class, structure in its config.

    Args:
        model: the model after surgery.
        plan_summary: a few plain values about the plan, appended to the config's lineage.
    """
    earlier = getattr(model.config, KEY, None) or {}
    base = earlier.get("base") or _hub_origin(model)
    lineage = [*earlier.get("lineage", []), *([dict(plan_summary)] if plan_summary else [])]
    modules = difference_to_stock(model)
    structure: dict[str, Any] = {"version": VERSION, "modules": modules}
    structure |= {"base": base} if base else {}
    structure |= {"lineage": lineage} if lineage else {}
    per_layer = _per_layer(model) if modules else {}
    structure |= {"per_layer": per_layer} if per_layer else {}
    setattr(model.config, KEY, structure)
    for name, part in model.base_model.named_children():  # one tower of a folder loads alone
        if isinstance(part, PreTrainedModel) and part.config is not model.config:
            inside = {p[len(name) + 1 :]: e for p, e in modules.items() if p.startswith(f"{name}.")}
            setattr(part.config, KEY, {"version": VERSION, "modules": inside})
    model.__class__ = pruned(type(model))
    return model


def _per_layer(model: PreTrainedModel) -> dict[str, dict[str, dict[str, int]]]:
    """The structure in upstream's `per_layer_config` schema: {sub-config or "": {layer: {setting:
    n}}}.

    Only what the schema can say and AutoConfig reads back: head counts only where the config has a
    head size of its own and no attention is empty.
    """
    said: dict[str, dict[str, dict[str, int]]] = {}
    for part, settings in _settings(model).items():
        config = _config_of(model, part)
        depth = 1 + max(layer for layer, _ in settings)
        for unsaid in ((), HEAD_SETTINGS, (*HEAD_SETTINGS, "decoder_ffn_dim")):
            layers: dict[str, dict[str, int]] = {}
            for (layer, name), value in sorted(settings.items()):
                if value != getattr(config, name) and name not in unsaid:
                    layers.setdefault(str(layer).zfill(len(str(depth - 1))), {})[name] = value
            if not layers:
                continue
            try:
                type(config).from_dict({**config.to_dict(), "per_layer_config": layers})
            except Exception:  # every family has its own way of saying no
                continue
            said[part] = layers
            break
    return said


HEAD_SETTINGS = ("num_attention_heads", "num_key_value_heads")
EXPERT_SETTINGS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _settings(model: PreTrainedModel) -> dict[str, dict[tuple[int, str], int]]:
    """What the config would have to say: {sub-config or "": {(layer, setting): value}}."""
    found: dict[str, dict[tuple[int, str], int]] = {}
    anatomy = Anatomy.of(model)
    emptied = {g.stack for g in anatomy if g.kind == "head" and not g.units}
    for group in anatomy:
        if group.kind == "head" and group.stack in emptied:
            continue
        for name, value in stock_settings(model, group).items():
            found.setdefault(_part(stack_of(model, group)), {})[group.layer, name] = value
    return found


def stock_settings(model: PreTrainedModel, group: Group) -> dict[str, int]:
    """How the family's own config says the size of a group: {setting: value}, {} if it cannot."""
    stack = stack_of(model, group)
    known = config_of(model.config, stack).to_dict()
    values: dict[str, int] = {}
    if group.kind == "neuron":
        values[ffn_of(layer_of(model, group), stack).setting] = group.units
    elif "head_dim" in known:
        values = dict(zip(HEAD_SETTINGS, (group.units, group.kv_groups), strict=True))
    return {name: value for name, value in values.items() if name in known}


def sizes_heads(model: PreTrainedModel, group: Group) -> bool:
    """Whether the family builds its attention by the config's settings for a group of heads: some
    read a size of their heads, and take the width of the hidden states for that of all (helium).

    Found by building the stock model with one KV group, on the meta device.
    """
    one = dict(zip(HEAD_SETTINGS, (group.heads_per_kv, 1), strict=True))
    other = _stock_with(model, group, {"head_dim": group.columns, **one})
    outlet = other.base_model.get_submodule(group.outlet)
    return inputs_of(outlet) == group.heads_per_kv * group.columns


def _stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Transformers' own class of a model that may be pruned."""
    return getattr(type(model), "_stock", type(model))


def _stock_with(
    model: PreTrainedModel, group: Group, settings: Mapping[str, int]
) -> PreTrainedModel:
    """The stock model with other settings for the stack of a group, on the meta device."""
    config = copy.deepcopy(model.config)
    sized = config_of(config, stack_of(model, group))
    for name, value in settings.items():
        setattr(sized, name, value)
    with torch.device("meta"):
        return _stock_class(model)(config)


def also_sized(model: PreTrainedModel, group: Group) -> str:
    """Path of a module outside the layers that the config's setting for a group of neurons sizes
    too, "" if there is none.

    Found by building the stock model with another value, on the meta device.
    """
    settings = stock_settings(model, group)
    other = _stock_with(model, group, {name: value + 8 for name, value in settings.items()})
    known = dict(model.base_model.named_modules())
    return next(
        (
            path
            for path, module in other.base_model.named_modules()
            if not any(map(str.isdecimal, path.split(".")))
            and path in known
            and _describe(module) != _describe(known[path])
        ),
        "",
    )


def _part(stack: Stack) -> str:
    """Name of the sub-config that a stack is configured in, "" if it is the config itself."""
    return stack.depth.split(".")[0] if "." in stack.depth else ""


def _config_of(model: PreTrainedModel, part: str) -> PreTrainedConfig:
    return getattr(model.config, part) if part else model.config


def as_stock(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a pruned model, in place, into one of its stock class, which plain `AutoModel` loads.

    What the config says of the model's origin and of the plans it went through stays in it.

    Raises:
        CheckpointError: the family's own config cannot hold the structure; names the first module.
            The model stays as it was.
        UnsupportedModelError: it is no transformers model, or not plain.
    """
    anatomy = Anatomy.of(model)
    own_config(model)
    settings_of = _settings(model)
    head_sizes = {_part(stack_of(model, g)): g.columns for g in anatomy if g.kind == "head"}
    for block in anatomy.experts:
        stack = row_of(model.config.model_type).stacks[block.stack]
        known = config_of(model.config, stack).to_dict()
        name = next(name for name in EXPERT_SETTINGS if name in known)
        settings_of.setdefault(_part(stack), {})[block.layer, name] = block.units
    before: list[tuple[PreTrainedConfig, dict[str, Any]]] = []
    for part, settings in settings_of.items():
        config = _config_of(model, part)
        values = {name: value for (_, name), value in settings.items()}
        unsaid = getattr(config, "head_dim", None) is None and "head_dim" in config.to_dict()
        if unsaid and part in head_sizes:
            values["head_dim"] = head_sizes[part]
        before.append((config, {name: getattr(config, name, None) for name in values}))
        for name, value in values.items():
            setattr(config, name, value)
    odd = difference_to_stock(model)
    if odd:
        for config, values in before:
            for name, value in values.items():
                setattr(config, name, value)
        path, entry = next(iter(odd.items()))
        raise CheckpointError(
            f"A stock {model.config.model_type} config cannot hold this structure: {path} differs "
            f"by {entry}. {_way_out(model, path)}"
        )
    history = {k: v for k, v in getattr(model.config, KEY, {}).items() if k in ("base", "lineage")}
    for config in (model.config, *sub_configs_of(model.config).values()):
        for name in (KEY, "auto_map"):
            if hasattr(config, name):
                delattr(config, name)
    if history:
        setattr(model.config, KEY, {"version": VERSION, "modules": {}, **history})
    model.__class__ = _stock_class(model)
    return model


def remember_origin(
    model: PreTrainedModel, revision: str | None = None, file: str = "config.json"
) -> None:
    """Write into the config which commit of which Hub model this is, if it came from there.

    What is saved is no Hub model any more; what is pruned from it later still names its base.

    Args:
        model: as it was loaded.
        revision: with which it was loaded.
        file: one that was read for it.
    """
    _note_commit(model, model.name_or_path or "", file, revision=revision)
    base = _hub_origin(model)
    if base and not hasattr(model.config, KEY):
        setattr(model.config, KEY, {"version": VERSION, "modules": {}, "base": base})


def _note_commit(
    model: PreTrainedModel, model_id: str | os.PathLike[str], file: str, **hub: Any
) -> None:
    """Keep which commit of the Hub a model is; transformers no longer does since 5.24."""
    if model_id and not os.path.exists(model_id):
        path = cached_file(str(model_id), file, **hub)
        model.config._commit_hash = extract_commit_hash(path, None)


def _way_out(model: PreTrainedModel, path: str) -> str:
    """What to do about a module that a stock config would give another size."""
    stacks = row_of(model.config.model_type).stacks
    if any(path.startswith(f"{stack.layers}.") for stack in stacks):
        return "Prune all layers to the same widths, and to head counts it can express."
    return "The same setting sizes this module outside the layers: keep the neurons of its stack."


def _hub_origin(model: PreTrainedModel) -> dict[str, str]:
    """Id and revision of the Hub model that a model was loaded from, {} if it was not."""
    revision = getattr(model.config, "_commit_hash", None)
    name = model.name_or_path
    if not revision or not name or os.path.isabs(name) or os.path.exists(name):
        return {}
    return {"id": name, "revision": revision}


def difference_to_stock(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Where a model differs from the stock model of its config: {module path: entry}.

    An entry has "shapes", "attrs", "empty" and "patch", as far as they differ (see
    `modeling_hfprune`). The stock model is built on the meta device: no memory, milliseconds.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, KEY):
        delattr(config, KEY)
    with torch.device("meta"):
        reference = _stock_class(model)(config)
    stock = dict(reference.base_model.named_modules())
    modules: dict[str, dict[str, Any]] = {}
    for path, module in model.base_model.named_modules():
        entry: dict[str, Any] = {}
        if PATCH in vars(module):
            entry["patch"] = vars(module)[PATCH]
            if EMPTY not in vars(module):
                with torch.device("meta"):
                    help_forward(stock[path], **entry["patch"])
                stock.update({f"{path}.{n}": m for n, m in stock[path].named_modules() if n})
        if path not in stock:
            raise CheckpointError(
                f"{path}: a {model.config.model_type} config does not say so of this layer, as it"
                " is numbered now. Keep the layers that are of more than one kind."
            )
        shapes, attrs = _describe(module)
        stock_shapes, stock_attrs = _describe(stock[path])
        entry["shapes"] = {k: v for k, v in shapes.items() if stock_shapes.get(k) != v}
        entry["attrs"] = {k: v for k, v in attrs.items() if stock_attrs.get(k) != v}
        entry = {part: values for part, values in entry.items() if values}
        if EMPTY in vars(module):
            entry["empty"] = vars(module)[EMPTY]
        if entry:
            modules[path] = entry
    return modules


def _describe(module: nn.Module) -> tuple[dict[str, list[int]], dict[str, int]]:
    shapes = {name: list(tensor.shape) for name, tensor in tensors_of(module).items()}
    attrs = {name: value for name, value in vars(module).items() if name in ATTRIBUTES}
    attrs = {name: value for name, value in attrs.items() if type(value) is int}
    return shapes, attrs


def refuse_nowhere(model_id: str | os.PathLike[str]) -> None:
    """Refuse what is no folder and cannot be a Hub id: the Hub's client speaks of the id alone.

    Raises:
        CheckpointError: says so.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if os.path.exists(model_id):
        return
    try:
        validate_repo_id(os.fspath(model_id))
    except HFValidationError as error:
        raise CheckpointError(
            f"There is no folder {model_id}, and it is no Hub id. Give the folder of a model, or an"
            " id such as owner/name."
        ) from error


def from_pretrained(
    model_id: str | os.PathLike[str],
    auto_class: type | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a model, pruned or not, from a folder or the Hub, in eval mode.

    Args:
        model_id: a folder or a Hub id.
        auto_class: the class to load, an `AutoModel...` or a model class; by default the class it
            was saved from.
        **kwargs: as in transformers' `AutoModel.from_pretrained`: where the files are (`revision`,
            `subfolder`, `token`, ...), values in place of the config's (`num_labels`, ...) and how
            to load (`dtype`, `device_map`, ...); without `config` and `output_loading_info`.

    Raises:
        CheckpointError: the name is of no folder and no Hub id; the files are damaged, or the
            structure is from a newer version; tensors are missing or left over; or
            `ignore_mismatched_sizes` was asked for, which would fill pruned layers with random
            weights.
        HfpruneError: an argument that this function does not take.
        OSError: there is no such model, or a file of it is missing.
    """
    if kwargs.pop("ignore_mismatched_sizes", False):
        raise CheckpointError(
            "ignore_mismatched_sizes would fill the pruned layers with random weights; load "
            "without it."
        )
    for name, instead in NOT_TAKEN.items():
        if name in kwargs:
            raise HfpruneError(f"from_pretrained does not take {name}: {instead}.")
    expect(model_id, (str, os.PathLike), "model_id", "a folder or a Hub id")
    refuse_nowhere(model_id)
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    config, options = _read_config(model_id, kwargs)
    try:
        modules = checked(getattr(config, KEY, None))
    except StructureError as error:
        raise CheckpointError(f"{model_id}: {error}") from error
    cls = _class_to_load(config, auto_class, model_id)
    _check_files(Path(model_id, where.get("subfolder", "")), config)
    model, info = _load(pruned(cls) if modules else cls, model_id, config, **where, **options)
    _note_commit(model, model_id, "config.json", **where | {"force_download": False})
    odd = {k: sorted(map(str, info[k])) for k in ("missing_keys", "unexpected_keys") if info[k]}
    inside = f"{model.base_model_prefix}."
    lost = [
        key
        for key in odd.get("missing_keys", [])
        if key.removeprefix(inside).rpartition(".")[0] in modules
    ]
    if modules and odd and (lost or not auto_class):
        raise CheckpointError(f"{model_id} did not come back whole: {odd}.")
    return model.eval()


def save_with_processor(
    model: PreTrainedModel, processor: Any, folder: str | os.PathLike[str]
) -> None:
    """Write a model, and what makes its inputs if that is not None, into a folder.

    Raises:
        CheckpointError: a pruned model did not come back as it is.
    """
    try:
        model.save_pretrained(folder)
    except StructureError as error:
        raise CheckpointError(f"The model cannot be saved: {error}") from error
    write_labels(Path(folder, "config.json"), model.config)
    if processor is not None:
        processor.save_pretrained(folder)


WHERE = (
    *("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download"),
    "proxies",
)
"""Arguments that say where a model's files are."""
NOT_OF_THE_CONFIG = (
    *("dtype", "torch_dtype", "quantization_config", "attn_implementation"),
    *("experts_implementation", "trust_remote_code"),
)
"""Arguments that the model takes itself, although a config has them or takes them too."""
NOT_TAKEN = {
    "config": "the structure is in the model's own config; pass what should differ from it by name,"
    " as in num_labels=2",
    "output_loading_info": "it returns the model alone; tensors of a pruned model that are missing"
    " or left over are an error",
}


def _read_config(
    model_id: str | os.PathLike[str], given: Mapping[str, Any]
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config with what was given in place of its values, and the arguments that are left."""
    own = {name: given[name] for name in NOT_OF_THE_CONFIG if name in given}
    others = {name: value for name, value in given.items() if name not in own}
    if "trust_remote_code" in own:
        others["trust_remote_code"] = own["trust_remote_code"]
    try:
        config, left = AutoConfig.from_pretrained(model_id, return_unused_kwargs=True, **others)
    except (OSError, ImportError) as error:  # what is not there is no damage
        if not isinstance(error.__context__, json.JSONDecodeError | UnicodeDecodeError):
            raise
        raise CheckpointError(f"{model_id}: its config.json is not JSON.") from error
    except Exception as error:  # every family has its own way of saying no
        raise CheckpointError(f"{model_id}: {_first_words(error)}") from error
    return config, left | own


def _check_files(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse weights outside of a folder: an index of them may name any file.

    What the index of a Hub model names, the Hub's own client looks at.
    """
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        _check_file("config.transformers_weights", named)
    for path in folder.glob("*.index*.json"):
        try:
            index = json.loads(path.read_bytes())
            files = {*index["weight_map"].values()}
            index["metadata"].items()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is no index of weights, which has a weight_map and metadata:"
                f" {_first_words(error)}"
            ) from error
        for file in files:
            _check_file(path, file)


def _check_file(where: object, file: object) -> None:
    path = PureWindowsPath(file) if isinstance(file, str) else None  # it knows both separators
    if path is None or path.name != file or not path.suffix:
        raise CheckpointError(
            f"{where} names {file!r}; weights must be files of the same folder, without a"
            " directory before their names."
        )


def _load(
    cls: Any, model_id: str | os.PathLike[str], config: PreTrainedConfig, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and which tensors were missing or left over."""
    try:
        model, info = cls.from_pretrained(
            model_id, config=config, output_loading_info=True, **options
        )
    except StructureError as error:
        raise CheckpointError(f"{model_id}: {error}") from error
    except AmbiguousGlobalPerLayerAttributeError as error:
        raise CheckpointError(
            f"{model_id}: per_layer_config says that its layers differ, and hfprune has no"
            f" structure for them in config.{KEY}."
        ) from error
    except SafetensorError as error:
        raise CheckpointError(f"{model_id}: its weights are damaged: {error}") from error
    except (OSError, ImportError):  # what is not there is no damage
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
            raise CheckpointError(
                f"{model_id}: its weights are not of the shapes that its config says."
            ) from error
        if _gives_a_model(cls, config):
            raise  # the options are to blame, or the machine
        raise CheckpointError(
            f"{model_id}: its config gives no {cls.__name__}: {_first_words(error)}"
        ) from error
    return model, info


def _gives_a_model(cls: Any, config: PreTrainedConfig) -> bool:
    """Whether a class can be built from a config at all; tried on the meta device."""
    try:
        with torch.device("meta"):
            cls._from_config(copy.deepcopy(config))
    except Exception:  # every family has its own way of saying no
        return False
    return True


def _first_words(error: Exception) -> str:
    """What an error says in its first paragraph, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".partition("\n\n")[0].split())


def _takes(cls: Any, config: PreTrainedConfig) -> bool:
    """Whether a value is a model class for a config: its own, or one that it borrows (exaone)."""
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel) or not cls.config_class:
        return False
    return isinstance(config, cls.config_class) or any(
        mapping[type(config)] is cls
        for mapping in auto_mappings().values()
        if type(config) in mapping
    )


def _class_to_load(
    config: PreTrainedConfig, auto_class: type | None, model_id: str | os.PathLike[str]
) -> type[PreTrainedModel]:
    if auto_class is None:
        names = config.architectures
        name = names[0] if names and isinstance(names, list) else None
        cls = getattr(transformers, name, None) if isinstance(name, str) else None
        if not _takes(cls, config):
            raise CheckpointError(
                f"{model_id} names the classes {names}; the first is none that transformers has"
                f" for {config.model_type} models. Pass auto_class=AutoModel... to say which to"
                " load."
            )
        return cast(type[PreTrainedModel], cls)
    if isinstance(auto_class, type) and issubclass(auto_class, PreTrainedModel):
        return auto_class
    mapping = getattr(auto_class, "_model_mapping", None)
    if mapping is None:
        raise HfpruneError(
            f"auto_class is {auto_class!r}; pass a class of transformers, as in"
            " auto_class=transformers.AutoModel."
        )
    if type(config) not in mapping:
        raise CheckpointError(f"{auto_class.__name__} has no class for {config.model_type} models.")
    cls = mapping[type(config)]
    return cls[0] if isinstance(cls, tuple) else cls
