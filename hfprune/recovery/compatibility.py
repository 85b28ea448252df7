"""Whether student, teacher and arguments fit each other: asked before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from hfprune.errors import RecipeError, unknown


def refuse_arguments(args: TrainingArguments, trainer_arguments: Mapping[str, Any]) -> None:
    """Refuse what would be ignored or break the loss."""
    if not hasattr(args, "weights"):
        raise RecipeError(
            f"args are {type(args).__name__}, which do not say what to match of the teacher; give "
            "hfprune.DistillationArguments, which take the same settings."
        )
    refused = {
        "label_smoothing_factor": "the teacher's distribution is already soft",
        "use_liger_kernel": "its fused loss returns no logits",
    }
    for name, reason in refused.items():
        if getattr(args, name):
            raise RecipeError(f"{name} cannot be used in distillation: {reason}. Leave it unset.")
    if trainer_arguments.get("compute_loss_func") is not None:
        raise RecipeError("compute_loss_func would be ignored; set the weights of args instead.")
    if args.n_gpu > 1:
        raise RecipeError(
            f"One process sees {args.n_gpu} GPUs; start with `accelerate launch` (one process per "
            "GPU), or set CUDA_VISIBLE_DEVICES to one of them."
        )


def refuse_wrapped(teacher: Any) -> None:
    """Refuse a teacher that is a model of another kind, such as PEFT's adapters around one."""
    if isinstance(teacher, nn.Module) and not isinstance(teacher, PreTrainedModel):
        raise RecipeError(
            f"The teacher is a {type(teacher).__name__}; give a transformers model, or its folder "
            "or Hub id. Merge adapters first (merge_and_unload)."
        )


def refuse_same(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a model as its own teacher, which would move with it."""
    if student is teacher:
        raise RecipeError(
            "Student and teacher are one and the same model; give a copy (copy.deepcopy), or the "
            "teacher's folder."
        )


def has_no_head(model: PreTrainedModel) -> bool:
    """Whether the model is what `AutoModel` loads: states and no predictions."""
    names = {n for found in MODEL_MAPPING_NAMES.values() for n in _names(found)}
    return type(model).__name__ in names


def _names(found: str | Sequence[str]) -> list[str]:
    return [found] if isinstance(found, str) else list(found)


def refuse_missing_head(model: PreTrainedModel, weights: Mapping[str, float]) -> None:
    """Refuse to compare the predictions of a model that makes none."""
    asked = [f"{part}_weight" for part in ("task", "logits") if weights[part]]
    if asked and has_no_head(model):
        raise RecipeError(
            f"A {type(model).__name__} has no task head, so there is nothing for "
            f"{' and '.join(asked)}: set them to 0 and embedding_weight to 1 for sentence "
            "embeddings, or load the model with its head."
        )


def refuse_uncached(weights: Mapping[str, float], train_dataset: Any) -> None:
    """Refuse to learn from a cache what it does not hold."""
    asked = [part for part in ("hidden", "attention", "embedding") if weights[part]]
    if asked or not weights["logits"]:
        raise RecipeError(
            "A teacher's cache holds its logits and nothing else: set logits_weight above 0, and "
            f"{', '.join(f'{part}_weight' for part in asked) or 'the others'} to 0."
        )
    if not hasattr(train_dataset, "__getitem__") or not hasattr(train_dataset, "__len__"):
        raise RecipeError(
            f"A teacher's cache needs a train_dataset whose rows have numbers; a "
            f"{type(train_dataset).__name__} is only iterated over. Load it whole, or train "
            "without a cache."
        )


def refuse_unknown(what: str, given: str, allowed: Iterable[str]) -> None:
    """Refuse a name that is not among the allowed."""
    if given not in allowed:
        raise RecipeError(unknown(what, given, allowed))


def refuse_other_classes(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse models whose predictions are over different classes."""
    ours, theirs = _classes(student), _classes(teacher)
    if ours != theirs:
        raise RecipeError(
            f"The student predicts {ours[1]} {ours[0]}, the teacher {theirs[1]} {theirs[0]}: the "
            "divergence needs the same on both sides. Take the teacher the student was pruned "
            "from, or set logits_weight to 0."
        )
    names, other_names = student.config.id2label or {}, teacher.config.id2label or {}
    same_set = set(names.values()) == set(other_names.values())
    if ours[0] == "labels" and same_set and names != other_names:
        raise RecipeError(
            f"Student and teacher number the labels differently: {names} and {other_names}. Make "
            "the student with the teacher's id2label."
        )


def _classes(model: PreTrainedModel) -> tuple[str, int | None]:
    """What the model predicts one of, and how many there are."""
    head = model.get_output_embeddings()
    if head is not None:
        return "vocabulary entries", head.weight.shape[0]
    return "labels", model.config.num_labels


def submodule(model: nn.Module, path: str, role: str) -> nn.Module:
    """The submodule at a path, or an error that names it."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise RecipeError(
            f"attention_outlets names {path!r}, which the {role} {type(model).__name__} does not "
            "have; give paths as in named_modules()."
        ) from None
