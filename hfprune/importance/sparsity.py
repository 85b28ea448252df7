"""Unstructured sparsity: single weights of the linear layers become zero, the shapes stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfprune.errors import DataError, HfpruneError, UnsupportedModelError, unknown
from hfprune.importance.batches import Batch, Reads, padding_mask, placed, reads
from hfprune.importance.diagnosis import check_finite, loss_of
from hfprune.importance.gates import evaluating, frozen, uncached, unmarked
from hfprune.importance.losses import Loss, loss_named
from hfprune.structure.architectures import ROWS
from hfprune.structure.fitness import check_unadapted
from hfprune.structure.slices import lists_of_layers

Scope = Literal["global", "layer", "row"]
Saliency = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Sparsity:
    """Which weights stay; prints as a report.

    Attributes:
        masks: {path of a linear layer: boolean tensor of its weight's shape, True for what stays}.
        params: parameters of the whole model.
        how: by what they were chosen, and among which; "" if they were found.
        experts: weights of routed experts, which lie in no linear layer and all stay.
    """

    masks: Mapping[str, torch.Tensor]
    params: int
    how: str = ""
    experts: int = 0

    @staticmethod
    def of(model: PreTrainedModel) -> Sparsity:
        """The zeros that a model has, such as one that was sparsified, saved and loaded.

        Raises:
            UnsupportedModelError: weights that are quantized, sharded or not in memory; adapters.
        """
        layers = linear_layers(model)
        masks = {path: _weight(module).detach().ne(0) for path, module in layers.items()}
        params = sum(p.numel() for p in model.parameters())
        return Sparsity(masks, params, experts=_expert_weights(model))

    @property
    def zeros(self) -> int:
        """How many weights are zero."""
        return sum(int((~mask).sum()) for mask in self.masks.values())

    @property
    def weights(self) -> int:
        """How many weights the linear layers have."""
        return sum(mask.numel() for mask in self.masks.values())

    def apply(self, model: nn.Module) -> None:
        """Set what does not stay to zero, in place.

        Raises:
            HfpruneError: the model has no such layer, or one of another shape.
            UnsupportedModelError: the model is sharded.
        """
        weights: dict[str, torch.Tensor] = {}
        for path, mask in self.masks.items():
            weight = _weight_at(model, path)
            if weight is None or weight.shape != mask.shape:
                found = "is not there" if weight is None else f"has {tuple(weight.shape)}"
                raise HfpruneError(
                    f"The masks are of another model: {path} {found}, and its mask has"
                    f" {tuple(mask.shape)}."
                )
            if isinstance(weight, DTensor):
                raise UnsupportedModelError(
                    f"{path} is sharded: masks are held on one process or data-parallel ones."
                )
            weights[path] = weight
        with torch.no_grad():
            for path, weight in weights.items():
                weight.mul_(self.masks[path].to(weight))

    def __str__(self) -> str:
        experts = f"All {self.experts:,} weights of the routed experts stay: they lie in no linear"
        experts = f"{experts} layer.\n" if self.experts else ""
        return (
            f"{self.zeros:,} of {self.weights:,} weights of {len(self.masks)} linear layers are"
            f" zero ({self.zeros / self.weights:.1%}; {self.zeros / self.params:.1%} of all"
            f" parameters){self.how and ', '}{self.how}.\n"
            f"{experts}"
            "Zeros alone make nothing faster or smaller: dense kernels multiply by them and files"
            " store them. For speed and memory on any machine remove whole heads and neurons"
            " (hfprune.plan, hfprune.remove); 2:4 needs a GPU with kernels for it."
        )


_AMONG = {
    "global": "among all layers' weights",
    "layer": "within each layer",
    "row": "within each output's row",
}


def sparsify(
    model: PreTrainedModel,
    sparsity: float = 0.5,
    *,
    criterion: str = "magnitude",
    scope: Scope = "layer",
    n_m: str | None = None,
    batches: Iterable[Batch] | None = None,
    loss: str | Loss = "labels",
) -> Sparsity:
    """Set the least important weights of a model's layers to zero, in place.

    It covers the weights of every Linear and Conv1D in the model's lists of layers, not embeddings,
    poolers and heads, and not routed experts, which transformers holds in tensors of their own. The
    model is saved as ever: its weights are ordinary ones, with zeros. `hfprune.KeepSparse` holds
    them at zero in training. The choice needs memory for a float32 copy of all those weights, three
    with the scope "global".

    Args:
        model: any transformers model whose weights are in memory.
        sparsity: share of the weights to set to zero, between 0 and 1; met to one weight of those
            that compete: with the scope "row" every row is rounded alike, so that 1 % of rows of 32
            is nothing. What comes back says what was reached.
        criterion: "magnitude", |w| (Han et al. 2015, arXiv:1506.02626); "wanda", |w| times the norm
            of the weight's input (Sun et al. 2023, arXiv:2306.11695); "taylor", |w dL/dw| summed
            over batches (Molchanov et al. 2019, arXiv:1906.10771), which needs memory for the
            gradients of the weights.
        scope: which weights compete: those of all layers, of one layer, or of one output's row.
        n_m: "2:4" keeps 2 of every 4 consecutive inputs of each row, whatever the scope; the
            sparsity has to be the same.
        batches: for "wanda" and "taylor": calibration batches, {name: tensor}; of several
            processes each reads all of them.
        loss: for "taylor", as for `hfprune.score`.

    Raises:
        HfpruneError: an unknown criterion or scope, a sparsity that is no share or not that of n_m,
            or rows that n_m does not divide.
        DataError: the criterion needs batches and has none, a loss, an input or an importance that
            is not finite, or a loss that does not depend on a layer.
        UnsupportedModelError: weights that are quantized, sharded or not in memory; adapters.
    """
    if criterion not in _SALIENCIES:
        raise HfpruneError(unknown("criterion", criterion, _SALIENCIES))
    if scope not in get_args(Scope):
        raise HfpruneError(unknown("scope", scope, get_args(Scope)))
    if not (isinstance(sparsity, Real) and 0 < sparsity < 1):
        raise HfpruneError(f"sparsity is {sparsity!r}; give a share between 0 and 1, e.g. 0.5.")
    if criterion != "magnitude" and batches is None:
        raise DataError(f"The criterion {criterion!r} needs calibration data: give batches=...")
    pattern = _pattern(n_m, sparsity) if n_m else None
    layers = linear_layers(model)
    if pattern:
        _check_divides(layers, pattern[1])
    calibration = list(batches or ())
    if batches is not None and not calibration:
        raise DataError("There are no calibration batches; give at least one.")
    named = loss if callable(loss) else loss_named(loss, seed=0)
    with torch.inference_mode(False), torch.no_grad():
        saliency = _SALIENCIES[criterion](model, layers, calibration, named)
        for path, values in saliency.items():
            if not torch.isfinite(values).all():
                raise DataError(f"The {criterion} of {path} is not finite.")
        masks = {
            path: _as_stored(layers[path], kept)
            for path, kept in _kept(saliency, sparsity, scope, pattern).items()
        }
    params = sum(p.numel() for p in model.parameters())
    among = f"{n_m} along each row" if n_m else _AMONG[scope]
    made = Sparsity(masks, params, f"by {criterion} {among}", _expert_weights(model))
    made.apply(model)
    return made


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every Linear and Conv1D in the lists of layers of a model, by its path.

    Raises:
        UnsupportedModelError: there is none, or one whose weights are not plain, or adapters.
    """
    check_unadapted(model)
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found: dict[str, nn.Module] = {
        path: module
        for path, module in _inside_layers(model).items()
        if isinstance(module, nn.Linear | Conv1D)
        and id(module.weight) not in embedded
        and module.weight.numel()  # none are left of a pruned layer without heads or neurons
    }
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__} has no linear layers in its layers.")
    for path, module in found.items():
        weight = _weight(module)
        if weight.is_meta or not weight.is_floating_point() or type(weight) is not nn.Parameter:
            raise UnsupportedModelError(
                f"The weight of {path} is quantized, sharded or not in memory (a"
                f" {type(weight).__name__} of {weight.dtype} on {weight.device}); load the model"
                " whole and in floating point."
            )
    return found


def _inside_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every module in the lists of layers of a model, by its path."""
    root = model.base_model
    prefix = next(f"{name}." if name else "" for name, m in model.named_modules() if m is root)
    lists = tuple(f"{path}." for path in lists_of_layers(model))
    return {prefix + n: m for n, m in root.named_modules() if n.startswith(lists)}


def _expert_weights(model: PreTrainedModel) -> int:
    """How many weights lie in tensors with one matrix per expert."""
    kernels = nn.Conv1d | nn.Conv2d | nn.Conv3d  # of three dimensions too, or more
    return sum(
        parameter.numel()
        for module in _inside_layers(model).values()
        if not isinstance(module, kernels)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3
    )


def _pattern(n_m: str, sparsity: float) -> tuple[int, int]:
    """The two numbers of "2:4": how many of how many stay."""
    match = re.fullmatch(r"(\d+):(\d+)", str(n_m))
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise HfpruneError(f"n_m is {n_m!r}; give how many of how many weights stay, as '2:4'.")
    kept, of = int(match[1]), int(match[2])
    if abs(1 - kept / of - sparsity) > 1e-6:
        raise HfpruneError(
            f"n_m={n_m!r} sets {1 - kept / of:.4g} of the weights to zero, and sparsity says"
            f" {sparsity}; give both alike."
        )
    return kept, of


def _check_divides(layers: Mapping[str, nn.Module], size: int) -> None:
    for path, module in layers.items():
        inputs = _rows(module).shape[1]
        if inputs % size:
            raise HfpruneError(
                f"{path} has {inputs} inputs, which {size} does not divide; choose another n_m."
            )


def _kept(
    saliency: Saliency, sparsity: float, scope: str, pattern: tuple[int, int] | None
) -> dict[str, torch.Tensor]:
    """{path: (outputs, inputs) boolean}: which weights stay."""
    if pattern:
        kept, of = pattern
        return {
            path: _largest(values.reshape(-1, of), kept).reshape(values.shape)
            for path, values in saliency.items()
        }
    if scope == "global":
        everything = torch.cat([values.flatten() for values in saliency.values()])
        flat = _largest(everything[None], _stay(len(everything), sparsity))[0]
        pieces = flat.split([values.numel() for values in saliency.values()])
        return {
            path: piece.reshape(values.shape)
            for (path, values), piece in zip(saliency.items(), pieces, strict=True)
        }
    rows = {path: v if scope == "row" else v.reshape(1, -1) for path, v in saliency.items()}
    return {
        path: _largest(v, _stay(v.shape[1], sparsity)).reshape(saliency[path].shape)
        for path, v in rows.items()
    }


def _stay(count: int, sparsity: float) -> int:
    return count - round(sparsity * count)


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """(rows, columns) boolean: exactly `count` of each row, the largest; of equals the last."""
    drop = values.shape[1] - count
    if not drop:
        return torch.ones_like(values, dtype=torch.bool)
    limit = values.kthvalue(drop, dim=1, keepdim=True).values
    below, equal = values < limit, values == limit
    spare = drop - below.sum(dim=1, keepdim=True)
    return ~(below | (equal & (equal.cumsum(dim=1) <= spare)))


def _magnitude(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], batches: list[Batch], loss: Loss
) -> Saliency:
    return {path: _rows(module).abs() for path, module in layers.items()}


def _wanda(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], batches: list[Batch], loss: Loss
) -> Saliency:
    sums: dict[str, torch.Tensor] = {}
    batch: Batch = {}
    index = 0
    row = ROWS.get(model.config.model_type)
    crossed = [a for s in row.stacks for a in s.attentions if a.context == "cross"] if row else []
    of_encoder = tuple(f".{name}" for attention in crossed for name in (attention.k, attention.v))
    with ExitStack() as stack:
        for path, module in layers.items():
            tower = "inputs" if path.endswith(of_encoder) else reads(model, path)

            def watch(
                module: nn.Module,
                args: tuple[torch.Tensor, ...],
                path: str = path,
                tower: Reads = tower,
            ) -> None:
                squares = args[0].detach().float().square()
                if squares.dim() != 3:  # all tokens in one dimension, or a dimension more
                    squares = squares.reshape(-1, 1, squares.shape[-1])
                if (mask := padding_mask(model, batch, squares, tower)) is not None:
                    squares = squares * mask.to(squares)[..., None]
                total = squares.flatten(0, -2).double().sum(dim=0)
                if not torch.isfinite(total).all():
                    raise DataError(
                        f"The inputs of {path} are not finite in calibration batch {index}."
                    )
                sums[path] = sums[path] + total if path in sums else total

            stack.callback(module.register_forward_pre_hook(watch).remove)
        with evaluating(model), uncached(model), unmarked(model):
            for number, given in enumerate(batches):
                index = number
                batch = placed(given, index, model.device)
                model(**batch)
    for path in layers:
        if path not in sums:
            raise DataError(f"No calibration batch reaches {path}.")
    return {path: _rows(m).abs() * sums[path].sqrt().float() for path, m in layers.items()}


def _taylor(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], batches: list[Batch], loss: Loss
) -> Saliency:
    sums = {path: torch.zeros_like(_rows(module)) for path, module in layers.items()}
    weights = [_weight(module) for module in layers.values()]
    with frozen(model), uncached(model), unmarked(model), torch.enable_grad():
        try:
            for weight in weights:
                weight.requires_grad_(True)
            for index, given in enumerate(batches):
                batch = placed(given, index, model.device)
                value = loss_of(loss, model, batch, index)
                check_finite(value, index, model, batch, loss)
                if not value.requires_grad:
                    raise DataError(
                        f"The loss of calibration batch {index} does not depend on any layer of the"
                        " model."
                    )
                slopes = torch.autograd.grad(value, weights, allow_unused=True)
                for (path, module), slope in zip(layers.items(), slopes, strict=True):
                    if slope is None:
                        raise DataError(f"The loss does not depend on {path}.")
                    sums[path] += (_rows(module) * _rows(module, slope)).abs_()
        finally:
            for weight in weights:
                weight.requires_grad_(False)  # `frozen` gives back what was
    return sums


_SALIENCIES: dict[
    str, Callable[[PreTrainedModel, Mapping[str, nn.Module], list[Batch], Loss], Saliency]
] = {"magnitude": _magnitude, "taylor": _taylor, "wanda": _wanda}


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor), "a linear layer has a weight"
    return weight


def _weight_at(model: nn.Module, path: str) -> torch.Tensor | None:
    try:
        return model.get_parameter(f"{path}.weight")
    except AttributeError:
        return None


def _rows(module: nn.Module, tensor: torch.Tensor | None = None) -> torch.Tensor:
    """The weight, or a tensor of its shape, as (outputs, inputs) in float32 or wider."""
    values = (_weight(module) if tensor is None else tensor).detach()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values.T if isinstance(module, Conv1D) else values


def _as_stored(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """The inverse of `_rows` in shape."""
    return (rows.T if isinstance(module, Conv1D) else rows).contiguous()
