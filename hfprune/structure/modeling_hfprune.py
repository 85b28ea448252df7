"""Rebuilds structurally pruned transformers models from their config; needs torch and transformers,
nothing else.

This file is copied into every pruned checkpoint, so that `AutoModel...from_pretrained(folder,
trust_remote_code=True)` works where hfprune is not installed. `config.hfprune` holds the difference
to the stock model of the same config:

    {"version": 1, "modules": {path in the base model: {"shapes": {parameter: shape},
     "attrs": {name: int}, "empty": child that remains, "patch": {"name": ..., "heads": [...]}}},
     "base": {"id", "revision"}, "lineage": [plan summaries], "per_layer": upstream's schema}

All values are absolute, lie inside of numbered layers and may only shrink what the stock model has:
a tensor along one axis, and the attributes that count units. Anything else is refused before it is
built.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.pytorch_utils import Conv1D

KEY = "hfprune"
VERSION = 1
EMPTY = "_hfprune_empty"
NUMBERS = ("layer_idx", "layer_id")  # under which a layer knows its place
ATTRIBUTES = {
    *("num_attention_heads", "num_heads", "n_heads", "num_key_value_heads", "num_kv_heads"),
    *("kv_heads", "num_key_value_groups", "all_head_size", "split_size", "embed_dim"),
    *("inner_dim", "dim", "intermediate_size", "num_experts"),
}
"""The attributes in which modules count what surgery cuts; no other is ever set."""
DERIVED = ("nx", "nf", "num_embeddings", "embedding_dim")
"""Attributes that follow from the shapes; the first checkpoints of version 1 say them too."""
STACKS = ("encoder", "decoder", "text_model", "vision_model")  # a model may have only one of these
logger = logging.getLogger(__name__)


class StructureError(ValueError):
    """The structure in config.json is not one that this version can build."""


class ConfigView:
    """The live config with another head count, for an attention that reads its count there."""

    def __init__(self, config: Any, heads: int) -> None:
        vars(self).update(config=config, num_attention_heads=heads)

    def __getattr__(self, name: str) -> Any:
        if name == "config" or name.startswith("__"):  # half built while it is copied or unpickled
            raise AttributeError(name)
        return getattr(vars(self)["config"], name)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _clear_bias(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """t5: the bias that layer 0 hands on has its own heads; without it a layer computes one."""
    return args, {**kwargs, "position_bias": None}


def _slice_bias(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """mpnet: the encoder computes one bias (1, heads, tokens, tokens) for the original heads."""
    return (*args[:2], args[2][:, vars(module)[PATCH]["heads"]], *args[3:]), kwargs


def _slice_alibi(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """bloom: the slopes come as (batch * original heads, 1, tokens)."""
    alibi = kwargs["alibi"].unflatten(0, (args[0].shape[0], -1))
    return args, {**kwargs, "alibi": alibi[:, vars(module)[PATCH]["heads"]].flatten(0, 1)}


def _slice_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """beit: the mask is of position biases (1, heads, tokens, tokens) for the original heads."""
    mask = kwargs["attention_mask"]
    heads = vars(module)[PATCH]["heads"]
    return args, kwargs if mask is None else {**kwargs, "attention_mask": mask[:, heads]}


PATCH = "_hfprune_patch"
_HOOKS = {
    "own_bias": _clear_bias,
    "no_bias": _clear_bias,
    "slice_bias": _slice_bias,
    "slice_alibi": _slice_alibi,
    "slice_mask": _slice_mask,
}
PATCHES = {
    "own_bias": ("key_value_states", "position_bias"),
    "no_bias": ("key_value_states", "position_bias"),
    "slice_bias": ("attention_mask", "position_bias"),
    "slice_alibi": ("residual", "alibi"),
    "slice_mask": ("attention_mask",),
    "config_view": (),
    "bare": ("cu_seqlens",),
}
"""Help for attentions whose forward takes something that was made for the original heads, or whose
output is of another form; each with arguments by which the forward is known.
"""


def help_forward(module: nn.Module, name: str, heads: list[int]) -> None:
    """Apply a patch to an attention that keeps the given ones of the stock model's heads."""
    known = PATCH in vars(module)
    vars(module)[PATCH] = {"name": name, "heads": heads}
    if name == "config_view":
        config = vars(module.config)["config"] if known else module.config
        module.config = ConfigView(config, len(heads))  # type: ignore[assignment]
    if name not in _HOOKS:
        return
    if name == "own_bias" and not hasattr(module, "relative_attention_bias"):
        rows = int(module.relative_attention_num_buckets)  # type: ignore[arg-type]
        module.relative_attention_bias = nn.Embedding(rows, int(module.n_heads))  # type: ignore[arg-type]
        module.has_relative_attention_bias = True  # type: ignore[assignment]
    if not known:
        module.register_forward_pre_hook(_HOOKS[name], with_kwargs=True)


def no_heads(
    module: nn.Module, *args: Any, **kwargs: Any
) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
    """Forward of an attention without heads: the outlet's bias where the outlet is inside, else 0
    columns.

    The cache is told how many tokens went by, because layer 0's length is the position of the next
    token.
    """
    hidden_states = args[0] if args else kwargs["hidden_states"]
    output = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
    cache = next((c for c in (*args, *kwargs.values()) if isinstance(c, Cache)), None)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    source = kwargs.get("key_value_states", kwargs.get("encoder_hidden_states"))
    if cache is not None and source is None:
        batch, tokens = hidden_states.shape[:2]
        placeholder = hidden_states.new_zeros(batch, 1, tokens, 1)
        number = next(vars(module)[name] for name in NUMBERS if name in vars(module))
        cache.update(placeholder, placeholder, number)
    outlet = next(iter(module.children()), None)
    if outlet is not None:
        output = outlet(output)
    maps = None
    if getattr(vars(module).get("config"), "_attn_implementation", "eager") == "eager":
        # Without a map of its own the maps of later layers would take its place in `attentions`.
        keys = (hidden_states if source is None else source).shape[-2]
        maps = output.new_zeros(*output.shape[:-2], 0, output.shape[-2], keys)
    match vars(module).get(PATCH, {}).get("name"):
        case "own_bias" | "no_bias":  # t5 also returns the bias
            return output, None, maps
        case "slice_alibi":  # bloom adds the residual itself
            return output + args[1], None
        case "bare":  # qwen2_vl's towers return the output alone
            return output
    return output, maps


def empty_attention(module: nn.Module, remains: str, patch: str = "") -> None:
    """Turn an attention into one without heads.

    Args:
        module: the attention.
        remains: the only child that stays, the outlet; "" for none.
        patch: the family's patch, by which `no_heads` knows what the attention returns.
    """
    for name in [name for name, _ in module.named_children() if name != remains]:
        delattr(module, name)
    for name in [name for name, _ in module.named_parameters(recurse=False)]:
        delattr(module, name)
    # functools.partial, unlike a bound method, survives deepcopy and pickle; the class stays stock.
    module.forward = functools.partial(no_heads, module)
    vars(module)[EMPTY] = remains
    module._forward_pre_hooks.clear()
    vars(module).pop(PATCH, None)
    if patch:
        vars(module)[PATCH] = {"name": patch, "heads": []}


def bias_only(module: Conv1D, x: torch.Tensor) -> torch.Tensor:
    """Forward of a Conv1D without inputs."""
    return module.bias.expand(*x.shape[:-1], -1)


def resize(module: nn.Module) -> None:
    """Make the size attributes of a module agree with its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):  # stores (in, out)
        module.nx, module.nf = module.weight.shape
        if not module.nx:  # its own forward cannot view a tensor without elements
            module.forward = functools.partial(bias_only, module)  # type: ignore[method-assign]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape


def replay(model: PreTrainedModel) -> None:
    """Give a freshly built stock model the shapes and attributes of the pruned one.

    Raises:
        StructureError: a newer version, an unknown module, or a value that pruning cannot have
            produced.
    """
    base = model.base_model
    for path, entry in checked(getattr(model.config, KEY, None)).items():
        first = path.split(".")[0]
        try:
            module = base.get_submodule(path)
        except AttributeError as error:
            if first in STACKS and not hasattr(base, first):
                continue
            raise StructureError(
                f"config.{KEY} names {path!r}, which this model does not have."
            ) from error
        _rebuild(module, path, entry)


def _rebuild(module: nn.Module, path: str, entry: Mapping[str, Any]) -> None:
    """Give one module of a stock model what its entry says."""
    where = f"config.{KEY}: {path}"
    patch = entry.get("patch", {})
    if (patch or "empty" in entry) and "Attention" not in type(module).__name__:
        raise StructureError(f"{where} is no attention, but a {type(module).__name__}.")
    if patch:
        _check_patch(module, where, **patch)
    if patch and "empty" not in entry:
        help_forward(module, **patch)
    for name, value in entry.get("attrs", {}).items():
        stock = vars(module).get(name)
        known = name in ATTRIBUTES or name in DERIVED
        if not known or type(stock) is not int or value > stock:
            raise StructureError(f"{where}.{name} = {value}, stock has {stock}.")
        if name in ATTRIBUTES:
            setattr(module, name, value)
    tensors = tensors_of(module)
    for name, shape in entry.get("shapes", {}).items():
        stock_shape = tuple(tensors[name].shape) if name in tensors else None
        if (
            stock_shape is None
            or len(shape) != len(stock_shape)
            or any(new > old for new, old in zip(shape, stock_shape, strict=True))
            or sum(new < old for new, old in zip(shape, stock_shape, strict=True)) > 1
        ):
            raise StructureError(f"{where}.{name} has shape {shape}, stock has {stock_shape}.")
        if isinstance(tensors[name], nn.Parameter):
            trained = tensors[name].requires_grad
            setattr(module, name, nn.Parameter(tensors[name].new_empty(shape), trained))
        else:
            setattr(module, name, tensors[name].new_zeros(shape))
    if "empty" in entry:
        remains = entry["empty"]
        if remains and remains not in dict(module.named_children()):
            raise StructureError(f"{where} has no child {remains!r}.")
        empty_attention(module, remains, patch.get("name", ""))
    resize(module)
    # The inner base model has run its own initialisation by now; these parameters are new. An
    # emptied attention has none, and its class's initialisation would look for them.
    module._is_hf_initialized = "empty" in entry  # type: ignore[assignment]


def _check_patch(module: nn.Module, where: str, name: str, heads: list[int]) -> None:
    """Refuse a patch that is for attentions of another kind, or keeps heads that are not there."""
    counts = [vars(module).get(n) for n in ("num_attention_heads", "num_heads", "n_heads")]
    own = next((n for n in counts if n is not None), 0)
    config = getattr(module, "config", None)
    stock = own or getattr(config, "num_attention_heads", 0)
    fits = inspect.signature(module.forward).parameters.keys() >= {*PATCHES[name]}
    if name == "slice_mask":  # most attentions take a mask
        fits = fits and hasattr(config, "use_relative_position_bias")
    if not stock or not fits or (own and name == "config_view"):
        raise StructureError(f"{where}: {name!r} does not help a {type(module).__name__}.")
    if heads and heads[-1] >= stock:
        raise StructureError(f"{where} keeps head {heads[-1]}, stock has {stock}.")


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a module itself keeps in a checkpoint: its parameters and persistent buffers."""
    fleeting = module._non_persistent_buffers_set
    buffers = {n: b for n, b in module.named_buffers(recurse=False) if n not in fleeting}
    return {**dict(module.named_parameters(recurse=False)), **buffers}


def checked(structure: Any) -> dict[str, dict[str, Any]]:
    """The modules of a structure, every value of the right type and in range.

    Raises:
        StructureError: what is wrong and where.
    """
    if structure is None:
        return {}
    version = structure.get("version") if isinstance(structure, Mapping) else None
    if type(version) is not int or version < 1:
        raise StructureError(f"config.{KEY} is not a structure: it has no version number.")
    if version > VERSION:
        raise StructureError(
            f"config.{KEY} has format version {version}; this code reads up to {VERSION}. "
            "Upgrade hfprune."
        )
    for part, kind in (("base", Mapping), ("lineage", list), ("per_layer", Mapping)):
        if part in structure and not isinstance(structure[part], kind):
            raise StructureError(f"config.{KEY}.{part} is a {type(structure[part]).__name__}.")
    modules = structure.get("modules")
    if not isinstance(modules, Mapping):
        raise StructureError(
            f"config.{KEY}.modules must be a mapping, not {type(modules).__name__}."
        )
    for path, entry in modules.items():
        if not isinstance(path, str) or not isinstance(entry, Mapping):
            raise StructureError(f"config.{KEY}.modules: {path!r} must be a path with a mapping.")
        if not any(map(str.isdecimal, path.split("."))):
            raise StructureError(f"config.{KEY}.modules: {path!r} is not inside a layer.")
        for part, value in entry.items():
            if part == "empty" and isinstance(value, str):
                continue
            if part == "patch" and _patch(value):
                continue
            if part == "attrs" and isinstance(value, Mapping) and all(map(_size, value.values())):
                continue
            if part == "shapes" and isinstance(value, Mapping) and all(map(_shape, value.values())):
                continue
            raise StructureError(f"config.{KEY}.modules[{path!r}] has an unusable entry {part!r}.")
    return dict(modules)


def _size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _patch(value: Any) -> bool:
    if not isinstance(value, Mapping) or value.keys() != {"name", "heads"}:
        return False
    heads = value["heads"]
    known = isinstance(value["name"], str) and value["name"] in PATCHES
    return known and _shape(heads) and sorted(set(heads)) == heads


def _shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_size, value))


class Pruned:
    """Mixin over a stock class: same behaviour and name, built with the structure in its config."""

    _stock: type[PreTrainedModel]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        # On disk for other readers; in memory it makes every read of the global value raise.
        for part in sub_configs_of(config).values():
            part.per_layer_config = None
        config.per_layer_config = None
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]

    def post_init(self) -> None:
        """Rebuild the structure before the weights are initialised or loaded."""
        replay(self)  # type: ignore[arg-type]
        super().post_init()  # type: ignore[misc]

    @classmethod
    def _shares_names_with(cls, other: Any) -> bool:
        """Whether the other class finds this one's layers: llama's for question answering calls its
        base model otherwise, and would be left with random layers.
        """
        same = getattr(other, "base_model_prefix", None) == cls._stock.base_model_prefix
        return same or other is cls._stock

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: custom code would get no conversion between names on disk and in memory."""
        return False

    def save_pretrained(
        self, save_directory: Any, *args: Any, verify: bool = True, **kwargs: Any
    ) -> None:
        """Save as the stock method does, with the structure and this file; then reload and compare.

        Args:
            save_directory: the folder to write.
            *args: as in the stock method.
            verify: reload the folder on the CPU and compare every tensor and the outputs on a probe
                batch.
            **kwargs: as in the stock method.

        Raises:
            StructureError: what came back differs from what was saved.
        """
        config = self.config  # type: ignore[attr-defined]
        modules = getattr(config, KEY)["modules"]
        if modules and not any("shapes" in entry for entry in modules.values()):
            raise StructureError(
                "No shape differs from the stock model, so a load without the structure would go "
                "unnoticed and give wrong outputs. Prune heads or neurons as well, then save."
            )
        auto = {
            name: mapping[type(config)]
            for name, mapping in auto_mappings().items()
            if type(config) in mapping and self._shares_names_with(mapping[type(config)])
        }
        for part in sub_configs_of(config).values():  # as a load does: a second save is the same
            part.dtype = self.dtype  # type: ignore[attr-defined]
        here = __name__.rsplit(".", 1)[-1]
        config.auto_map = {
            name: f"{here}.{cls.__name__}" for name, cls in auto.items() if isinstance(cls, type)
        }
        # With _auto_class set, the stock method copies this file, and push_to_hub=True uploads it.
        type(self)._auto_class = next(  # type: ignore[attr-defined]
            (name for name, cls in auto.items() if cls is self._stock), "AutoModel"
        )
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            write_per_layer_config(Path(save_directory) / "config.json")
            write_labels(Path(save_directory) / "config.json", config)
        whole = kwargs.get("state_dict") is None and kwargs.get("is_main_process", True)
        if verify and whole and kwargs.get("variant") is None:
            kernel = config._attn_implementation  # the default one may differ in the last bit
            reloaded = type(self).from_pretrained(save_directory, attn_implementation=kernel)  # type: ignore[attr-defined]
            compared = compare(self, reloaded)  # type: ignore[arg-type]
            logger.info("Reloaded %s: %s are equal", save_directory, compared)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Upload as the stock method does; `save_pretrained(push_to_hub=True)` calls it inside the
        stock save, when what this class adds to config.json is not there yet.
        """
        write_per_layer_config(Path(working_dir) / "config.json")
        write_labels(Path(working_dir) / "config.json", self.config)  # type: ignore[attr-defined]
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]


def write_per_layer_config(path: Path) -> None:
    """Say in upstream's own schema too what it can say: a stock class then refuses to be built."""
    config = json.loads(path.read_text())
    for part, layers in config[KEY].get("per_layer", {}).items():
        if part == "" or isinstance(config.get(part), dict):
            (config[part] if part else config)["per_layer_config"] = layers
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_labels(path: Path, config: Any) -> None:
    """Say the classes where config.json would come back with others: the stock save leaves out two
    without names, which are the default of all families but bart.
    """
    said = json.loads(path.read_text())
    if type(config).from_dict(dict(said)).num_labels != config.num_labels:
        said |= {"id2label": config.id2label, "label2id": config.label2id}
        path.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")


def compare(saved: PreTrainedModel, reloaded: PreTrainedModel) -> str:
    """Check that a reloaded model is the saved one: every tensor bit for bit, and the outputs on a
    probe batch.

    Returns:
        What was compared.

    Raises:
        StructureError: names the first tensor that differs, or the outputs.
    """
    mine, theirs = saved.state_dict(), reloaded.state_dict()
    if mine.keys() != theirs.keys():
        odd = sorted(mine.keys() ^ theirs.keys())
        raise StructureError(f"The reloaded model has other tensors: {', '.join(odd[:5])}.")
    present = {name: tensor for name, tensor in mine.items() if not tensor.is_meta}
    for name, tensor in present.items():
        if not torch.equal(tensor.cpu(), theirs[name].to(tensor.dtype)):
            raise StructureError(f"The reloaded model differs in {name}.")
    compared = f"{len(present)} of {len(mine)} tensors"
    inputs = probe(saved)
    if inputs is None or saved.device.type != "cpu":
        return compared  # outputs of two devices are not bitwise comparable
    was_training = saved.training
    try:
        expected = _outputs(saved.eval(), inputs)
    except Exception as error:  # a probe that the saved model cannot read proves nothing
        logger.warning("No outputs were compared: the probe batch does not fit (%s)", error)
        return compared
    finally:
        saved.train(was_training)
    if not _alike(expected, _outputs(reloaded.eval(), inputs)):
        raise StructureError("The reloaded model has equal tensors but other outputs.")
    return f"{compared} and the outputs on {', '.join(inputs)}"


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to a few last bits: where a tensor lies in memory may change the order of a sum.

    What overflows in one overflows in the other. A model that was made float64 keeps the tables
    that it had computed in float32.
    """
    precision = max(torch.finfo(one.dtype).eps, torch.finfo(torch.float32).eps)
    bits = 64 * precision * float(one.nan_to_num(0, 0, 0).abs().max())
    return one.shape == other.shape and one.allclose(other, rtol=0, atol=bits, equal_nan=True)


@torch.no_grad()
def _outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    # With a cache the last bit differs, and t5's decoder keeps the setting it was built with.
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    outputs = model(**inputs, **({"use_cache": False} if takes_cache else {}))[0]
    parts = [outputs] if isinstance(outputs, torch.Tensor) else outputs  # of a backbone, its maps
    return torch.cat([part.flatten() for part in parts])


def probe(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """A small batch of what a model reads, by its main input: tokens, images, patches, sound or its
    features; None for another.
    """
    config, text = model.config, model.config.get_text_config()
    images = getattr(config, "vision_config", config)
    generator = torch.Generator().manual_seed(0)
    noise = functools.partial(torch.randn, generator=generator)
    vocabulary, end = getattr(text, "vocab_size", 2), getattr(text, "eos_token_id", -1)
    tokens = torch.randint(vocabulary, (2, 8), generator=generator)
    if config.is_encoder_decoder and end in range(vocabulary):  # where they classify: one in each
        tokens[tokens == end] = 0 if end else 1
        tokens[:, -1] = end
    channels = getattr(images, "num_channels", 3)
    size, patches = getattr(images, "image_size", None), getattr(images, "num_patches", None)
    inputs: dict[str, torch.Tensor] = {}
    if model.main_input_name == "input_ids":
        inputs["input_ids"] = tokens
    if model.main_input_name == "input_values" and hasattr(config, "conv_kernel"):
        samples = 16  # frames after the convolutions
        for kernel, stride in zip(config.conv_kernel[::-1], config.conv_stride[::-1], strict=True):
            samples = (samples - 1) * stride + kernel
        inputs["input_values"] = noise((2, samples))
    if model.main_input_name == "input_values" and hasattr(config, "num_mel_bins"):
        inputs["input_values"] = noise((2, config.max_length, config.num_mel_bins))
    if model.main_input_name == "input_features" and hasattr(config, "max_source_positions"):
        inputs["input_features"] = noise((2, config.num_mel_bins, 2 * config.max_source_positions))
    if model.main_input_name == "pixel_values" or images is not config:
        size = (size, size) if type(size) is int else size
        if isinstance(size, list | tuple):
            frames = (images.num_frames,) if hasattr(images, "num_frames") else ()
            inputs["pixel_values"] = noise((2, *frames, channels, *size))
        elif type(patches) is int:  # siglip2 reads patches, and how many lie in each direction
            inputs["pixel_values"] = noise((2, patches, channels * images.patch_size**2))
            inputs["pixel_attention_mask"] = torch.ones(2, patches, dtype=torch.long)
            inputs["spatial_shapes"] = torch.tensor([[1, patches], [patches, 1]])
    if config.is_encoder_decoder and inputs:
        inputs["decoder_input_ids"] = tokens
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    if images is not config and hasattr(config, "image_token_id"):
        inputs = _with_images(model, tokens, inputs.get("pixel_values"))
    return inputs or None


@torch.no_grad()
def _with_images(
    model: PreTrainedModel, texts: torch.Tensor, pixels: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Two texts and the two images that they show, in the first way of giving them that the model
    takes; the texts alone if it takes none.
    """
    config, tower = model.config, model.config.vision_config
    side = 2 * getattr(tower, "spatial_merge_size", 1)
    if pixels is None:  # qwen2_vl: the patches of all images in one sequence
        numbers = getattr(tower, "in_channels", 3) * tower.patch_size**2
        numbers *= getattr(tower, "temporal_patch_size", 1)
        patches = torch.randn(2 * side**2, numbers, generator=torch.Generator().manual_seed(0))
        grid = torch.tensor([[1, side, side]] * 2)
        ways = [{"pixel_values": patches.to(model.dtype), "image_grid_thw": grid}]
    else:
        sizes = torch.tensor([pixels.shape[-2:]] * 2)
        ways = [{"pixel_values": pixels}, {"pixel_values": pixels, "image_sizes": sizes}]
        ways += [{"pixel_values": pixels[:, None]}]  # idefics3: several images for a text
        parts = pixels[:, None].repeat(1, 5, 1, 1, 1)  # llava_next: the whole and its parts
        ways += [{"pixel_values": parts, "image_sizes": sizes}]
    texts = texts.masked_fill(texts == config.image_token_id, 0)
    for images in ways:
        try:
            seen = model.get_image_features(**images).pooler_output  # type: ignore[operator]
            rows = sum(part.flatten(0, -2).shape[0] for part in seen)
        except Exception:  # every family has its own way of saying no
            continue
        places = texts.new_full((2, rows // 2), config.image_token_id)
        texts = torch.cat([texts, places], dim=1)
        if "image_grid_thw" in images:
            images["mm_token_type_ids"] = (texts == config.image_token_id).long()
        return {"input_ids": texts, **images}
    return {"input_ids": texts}


def sub_configs_of(config: Any) -> dict[str, Any]:
    """The sub-configs that a config really has (esm names one for folding, and mostly has none)."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    return {name: part for name, part in parts.items() if part is not None}


@functools.cache
def auto_mappings() -> dict[str, Any]:
    names = [name for name in dir(transformers) if name.startswith("AutoModel")]
    return {name: getattr(getattr(transformers, name), "_model_mapping", {}) for name in names}


def pruned(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of a pruned `cls`, of the same name: losses, pipelines and Trainer go by it."""
    if issubclass(cls, Pruned):
        return cls
    # One that a folder's own copy of this file made would replay the structure a second time.
    return _subclass(vars(cls).get("_stock", cls))


@functools.cache
def _subclass(cls: Any) -> Any:
    # A name that starts with "transformers." would pass for stock; the file to copy is found
    # through __module__.
    return type(cls.__name__, (Pruned, cls), {"_stock": cls, "__module__": __name__})


def __getattr__(name: str) -> type[PreTrainedModel]:
    """`modeling_hfprune.BertForMaskedLM`, as auto_map and pickle ask for it."""
    cls = getattr(transformers, name, None) if not name.startswith("_") else None
    if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
        return pruned(cls)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
