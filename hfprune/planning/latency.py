"""How long a model takes on this machine, from a table that is measured once: every layer is run at
several widths of its heads and neurons, and what lies between is interpolated.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hfprune.errors import HfpruneError, UnsupportedModelError, expect
from hfprune.files import write_whole
from hfprune.importance.gates import uncached
from hfprune.structure.anatomy import Anatomy, Group
from hfprune.structure.cost import Selection, group_macs
from hfprune.structure.surgery import cut

_WIDTHS = (0.0, 0.125, 0.25, 0.5, 0.75)
_WARM_UP = 3
_NANO = 1e9


@dataclass(frozen=True)
class Curve:
    """What one group adds to the time of its layer.

    Attributes:
        shares: of the group's MACs that stay, ascending from 0 to 1.
        seconds: that the group takes then, ascending from 0.
    """

    shares: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        for values in (self.shares, self.seconds):
            rising = np.array(values, dtype=float)
            if len(rising) != len(self.shares) or not (np.diff(rising, prepend=0.0) >= 0).all():
                raise ValueError(f"a curve does not ascend from 0: {values}")

    def at(self, share: float) -> float:
        """Seconds at any share of the group's MACs, on the lines between what was measured."""
        return float(np.interp(share, self.shares, self.seconds))


@dataclass(frozen=True)
class LatencyTable:
    """The seconds that one forward pass spends in each part of a model.

    Attributes:
        fingerprint: of the anatomy of the model that was measured.
        machine: where it ran: processor, device, threads, torch, dtype, attention.
        batch_size, tokens: of the batch it ran on.
        outside: seconds outside the layers.
        layers: {layer: seconds besides its groups}, such as "encoder.layer.0".
        groups: {group name: what the group adds}.
    """

    fingerprint: str
    machine: Mapping[str, str | int]
    batch_size: int
    tokens: int
    outside: float
    layers: Mapping[str, float]
    groups: Mapping[str, Curve]

    def of_group(self, group: Group, units: int, kv_groups: int) -> int:
        """Nanoseconds of a group that keeps `units` units in `kv_groups` KV groups."""
        whole = group_macs(group, group.units, group.kv_groups, self.tokens)
        share = group_macs(group, units, kv_groups, self.tokens) / max(1, whole)
        return round(_NANO * self.groups[group.name].at(share))

    def of_all(self, anatomy: Anatomy, keep: Selection) -> int:
        """Nanoseconds of the whole model that a selection leaves."""
        stays = {s.stack: keep.get(s.name, range(s.units)) for s in anatomy.stacks}
        names = {f"{s.name}.{n}" for s in anatomy.stacks for n in stays[s.stack]}
        total = sum(round(_NANO * self.layers[name]) for name in sorted(names))
        for group in anatomy:
            if group.layer in stays[group.stack]:
                units = keep.get(group.name, range(group.units))
                total += self.of_group(group, len(units), len(group.kv_of(units)))
        return round(_NANO * self.outside) + total

    def check_fits(self, model: PreTrainedModel, batch_size: int, tokens: int) -> None:
        """Refuse a table of another model or batch; warn of one from another machine, which may be
        meant: the pruned model is then planned for that machine. How many threads plan says nothing
        of how many the model is to run on: the table's count.

        Raises:
            HfpruneError: the table does not tell the time that is asked for.
        """
        anatomy = Anatomy.of(model)
        names = {f"{stack.name}.{n}" for stack in anatomy.stacks for n in range(stack.units)}
        complete = names <= self.layers.keys() and {g.name for g in anatomy} <= self.groups.keys()
        if self.fingerprint != anatomy.fingerprint or not complete:
            raise HfpruneError(
                "This latency table was measured on a model of another structure; measure this"
                " model with hfprune.measure_latency."
            )
        if (batch_size, tokens) != (self.batch_size, self.tokens):
            raise HfpruneError(
                f"The budget is for batches of {batch_size}x{tokens}, and the latency table for"
                f" {self.batch_size}x{self.tokens}: write latency=...@{self.batch_size}x"
                f"{self.tokens}, or measure again."
            )
        here = _machine(model)
        del here["threads"]
        if other := [key for key, value in here.items() if self.machine.get(key) != value]:
            differences = "; ".join(f"{k} {self.machine.get(k)!r}, here {here[k]!r}" for k in other)
            warnings.warn(
                f"This latency table is of another machine or setting ({differences}). The plan is"
                " for that one; measure here if it is to be for this one.",
                stacklevel=3,
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, under a temporary name first."""
        write_whole(path, json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> LatencyTable:
        """The inverse of `save`.

        Raises:
            HfpruneError: the file is not a latency table.
        """
        try:
            values = json.loads(Path(path).read_text())
            groups = {
                name: Curve(tuple(curve["shares"]), tuple(curve["seconds"]))
                for name, curve in values.pop("groups").items()
            }
            return LatencyTable(**values | {"machine": dict(values["machine"])}, groups=groups)
        except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            raise HfpruneError(
                f"{path} is not a latency table that can be read: {error}"
            ) from error


def measure_latency(
    model: PreTrainedModel,
    batch_size: int = 1,
    tokens: int = 128,
    threads: int | None = None,
    repeats: int = 15,
) -> LatencyTable:
    """Measure on this machine what every group of a model adds to the time of a forward pass.

    One layer of every kind is copied and really cut to several widths. The copies, the whole layer
    and the whole model take turns, so that a machine that slows down slows them all; the medians
    count. Close other programs first. Routed experts are measured as they are.

    Args:
        model: on the device and in the dtype in which it is to run; left as it was.
        batch_size: examples that run at once.
        tokens: of each; an image model reads its own image size.
        threads: CPU threads of an operation; None leaves torch's own number.
        repeats: timed runs of each.

    Raises:
        UnsupportedModelError: the family has no row, or reads neither text nor images, or more than
            these: images within its text, or videos.
        HfpruneError: `tokens` are more than the model's positions, or a number is less than 1.
    """
    counts = {"batch_size": batch_size, "tokens": tokens, "threads": threads, "repeats": repeats}
    for name, count in counts.items():
        if name != "threads" or count is not None:
            expect(count, int, name, "a whole number")
        if count is not None and count < 1:
            raise HfpruneError(f"{name} must be 1 or more, not {count}.")
    anatomy = Anatomy.of(model)
    inputs = _inputs(model, batch_size, tokens)
    kinds: dict[tuple[Any, ...], list[str]] = {}
    parts: dict[str, list[Group]] = {}
    for stack in anatomy.stacks:
        for layer in range(stack.units):
            name = f"{stack.name}.{layer}"
            parts[name] = [g for g in anatomy if (g.stack, g.layer) == (stack.stack, layer)]
            shape = (
                (g.kind, g.part, g.units, g.columns, g.heads_per_kv, g.unit_params, g.kv_params)
                for g in parts[name]
            )
            kinds.setdefault((stack.stack, stack.unit_params[layer], *shape), []).append(name)
    curves: dict[str, Curve] = {}
    layers: dict[str, float] = {}
    wholes: list[float] = []
    inside = 0.0
    with _as_it_will_run(model, threads), torch.inference_mode():
        _check_runs(model, inputs)
        machine = _machine(model)
        for alike in kinds.values():
            found, whole, everything = _measure_layer(
                model, alike[0], parts[alike[0]], inputs, tokens, repeats
            )
            wholes.append(everything)
            inside += whole * len(alike)
            for name in alike:
                groups = dict(zip((g.name for g in parts[name]), found, strict=True))
                curves |= groups
                layers[name] = max(0.0, whole - sum(c.seconds[-1] for c in groups.values()))
    outside = max(0.0, float(np.median(wholes)) - inside)
    return LatencyTable(anatomy.fingerprint, machine, batch_size, tokens, outside, layers, curves)


def check_measurable(model: PreTrainedModel, batch_size: int, tokens: int) -> None:
    """Refuse a model that cannot be measured, by running it once; for before it is scored.

    Raises:
        UnsupportedModelError: as `measure_latency` does.
        HfpruneError: `tokens` are more than the model's positions.
    """
    inputs = _inputs(model, batch_size, tokens)
    with _as_it_will_run(model, None), torch.inference_mode():
        _check_runs(model, inputs)


def _measure_layer(
    model: PreTrainedModel,
    name: str,
    groups: list[Group],
    inputs: Mapping[str, torch.Tensor],
    tokens: int,
    repeats: int,
) -> tuple[list[Curve], float, float]:
    """The curves of a layer's groups; seconds of the whole layer, and of the whole model."""
    args, kwargs = _arguments(model, name, inputs)
    sizes = {g.name: _sizes(g) for g in groups}
    layers = {
        (g.name, size): _cut_layer(model, name, g, size) for g in groups for size in sizes[g.name]
    }
    whole = model.base_model.get_submodule(name)
    runs: list[Callable[[], object]] = [lambda: model(**inputs), lambda: whole(*args, **kwargs)]
    runs += [lambda layer=layer: layer(*args, **kwargs) for layer in layers.values()]  # type: ignore[misc]
    model_seconds, layer_seconds, *others = _medians(runs, repeats, model.device)
    seconds = dict(zip(layers, others, strict=True))
    curves = []
    for group in groups:
        macs = [
            group_macs(group, size * group.heads_per_kv, size, tokens) for size in sizes[group.name]
        ]
        macs.append(group_macs(group, group.units, group.kv_groups, tokens))
        measured = [seconds[group.name, size] for size in sizes[group.name]] + [layer_seconds]
        curves.append(_curve(np.array(macs) / max(1, macs[-1]), np.array(measured)))
    return curves, layer_seconds, model_seconds


def _curve(shares: np.ndarray, seconds: np.ndarray) -> Curve:
    """The rising curve that is nearest to what was measured: more units never take less time."""
    from scipy.optimize import isotonic_regression

    rising = isotonic_regression(seconds).x
    rising = rising - rising[0]
    return Curve(tuple(map(float, shares)), tuple(map(float, rising)))


def _sizes(group: Group) -> list[int]:
    """How many KV groups, or neurons, the copies of a layer keep of a group: ascending, not all."""
    sizes = {max(int(share > 0), round(share * group.kv_groups)) for share in _WIDTHS}
    return sorted(size for size in sizes if size < group.kv_groups)


def _cut_layer(model: PreTrainedModel, name: str, group: Group, size: int) -> nn.Module:
    """A copy of a layer that keeps the first `size` KV groups, or neurons, of one group.

    The copy shares all tensors that are not cut with the model.
    """
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    cut(copied, {group.name: range(size * group.heads_per_kv)})
    return copied.base_model.get_submodule(name)


def _arguments(
    model: PreTrainedModel, name: str, inputs: Mapping[str, torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a layer is called with when the model runs."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    layer = model.base_model.get_submodule(name)
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        model(**inputs)
    finally:
        hook.remove()
    return seen[0]


def _medians(runs: list[Callable[[], object]], repeats: int, device: torch.device) -> list[float]:
    """Median seconds of each; they take turns in an order that changes, because a run is slower
    after one that leaves other data in the caches.
    """
    seconds = np.zeros((_WARM_UP + repeats, len(runs)))
    generator = np.random.default_rng(0)
    for turn in seconds:
        for number in generator.permutation(len(runs)):
            _wait(device)
            start = time.perf_counter()
            runs[number]()
            _wait(device)
            turn[number] = time.perf_counter() - start
    return [float(median) for median in np.median(seconds[_WARM_UP:], axis=0)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _as_it_will_run(model: PreTrainedModel, threads: int | None) -> Iterator[None]:
    before, training = torch.get_num_threads(), model.training
    torch.set_num_threads(threads or before)
    model.eval()
    try:
        with uncached(model):  # a layer that runs again would find its own keys
            yield
    finally:
        model.train(training)
        torch.set_num_threads(before)


def _inputs(model: PreTrainedModel, batch_size: int, tokens: int) -> dict[str, Any]:
    """A batch that a model of text or images reads."""
    config, text = model.config, model.config.get_text_config()
    inputs: dict[str, Any] = {}
    if model.main_input_name == "input_ids":
        most = getattr(text, "max_position_embeddings", tokens)
        if isinstance(most, int) and tokens > most:
            raise HfpruneError(f"{tokens} tokens are more than the model's {most} positions.")
        inputs["input_ids"] = _texts(text, batch_size, tokens).to(model.device)
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
    vision = getattr(config, "vision_config", config)
    if model.main_input_name == "pixel_values" or vision is not config:
        size, channels = getattr(vision, "image_size", 1), getattr(vision, "num_channels", 3)
        height, width = size if isinstance(size, tuple | list) else (size, size)
        pixels = torch.zeros(batch_size, channels, height, width, dtype=model.dtype)
        inputs["pixel_values"] = pixels.to(model.device)
    if not inputs:
        raise UnsupportedModelError(
            f"The latency of a {type(model).__name__} cannot be measured layer by layer yet: it"
            " reads neither text nor images. Give a budget of macs."
        )
    return inputs


def _texts(config: PreTrainedConfig, batch_size: int, tokens: int) -> torch.Tensor:
    """Random tokens that end as a text ends: a classifier may read what it says at the end."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (batch_size, tokens), generator=generator)
    if isinstance(end := getattr(config, "eos_token_id", None), int):
        ids[ids == end] = (end + 1) % config.vocab_size
        ids[:, -1] = end
    return ids


def _check_runs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Refuse a model that needs more than texts and images that can be made up.

    Raises:
        UnsupportedModelError: it does not run on the inputs.
    """
    try:
        model(**inputs)
    except Exception as error:
        raise UnsupportedModelError(
            f"The latency of a {type(model).__name__} cannot be measured layer by layer: it does"
            f" not run on {_written(inputs)} alone ({error}). Ask for a smaller batch, or give a"
            " budget of macs."
        ) from error


def _written(inputs: Mapping[str, torch.Tensor]) -> str:
    """What a batch holds: "input_ids (2x128) and pixel_values (2x3x224x224)"."""
    shapes = {name: "x".join(map(str, tensor.shape)) for name, tensor in inputs.items()}
    return " and ".join(f"{name} ({shape})" for name, shape in shapes.items())


def _machine(model: PreTrainedModel) -> dict[str, str | int]:
    cuda = model.device.type == "cuda"
    return {
        "processor": torch.cuda.get_device_name(model.device) if cuda else processor(),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
    }


def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
