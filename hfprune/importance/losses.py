"""The loss whose gradient is importance, as a sum over what it averages.

A sum, not a mean: the gradient of an example's own term must not depend on which batch the example
happens to be in. What is drawn for an example depends on the example and the seed alone, so that
neither its batch nor the process that the batch lands on changes its scores.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Set

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from hfprune.errors import DataError, HfpruneError, unknown
from hfprune.importance.batches import ANSWERS, IGNORED, Batch, examples_in, padding_mask

Loss = Callable[[PreTrainedModel, Batch], torch.Tensor]

_CAUSAL = frozenset(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()).union(
    auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
)
_TOKEN_LEVEL = _CAUSAL.union(
    *(
        names.values()
        for names in (
            auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
            auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
            auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        )
    )
)
_MASKED = frozenset(["ElectraForPreTraining"])
"""Classes whose loss is of the tokens that the attention mask shows, whatever their labels."""
_CTC = frozenset(auto.MODEL_FOR_CTC_MAPPING_NAMES.values())
_EXAMPLE_LEVEL = _CTC.union(  # whatever shape their labels come in
    *(
        names.values()
        for names in (
            auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
            auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
            auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
            auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        )
    )
)


def labels_loss(model: PreTrainedModel, batch: Batch, seed: int = 0) -> torch.Tensor:
    """The model's own loss on the batch's labels, summed over examples or labelled tokens; where
    padding would predict a text's first token, this has none.

    Nothing is drawn: the seed is there because every named loss takes one.

    Raises:
        DataError: the batch has no labels, or one beyond the model's classes, or the model returns
            no loss.
    """
    if "labels" not in batch and "start_positions" not in batch:
        raise DataError(
            f"The batch has no 'labels' (it has {', '.join(batch)}); gradient importance needs a"
            " loss. Give labels, or score with loss='sampled', which needs none."
        )
    if _has_token_labels(model, batch) and shifts_labels(model):
        batch = {**batch, "labels": foretold(batch)}
    try:
        outputs = model(**batch)
    except IndexError:
        _check_labels(model, batch)
        raise
    if getattr(outputs, "loss", None) is None:
        raise DataError(
            f"{type(model).__name__} returns no loss for labels; load the model with its task head."
        )
    return _wide(outputs.loss) * terms(model, batch)  # half precision does not reach far


def sampled_loss(model: PreTrainedModel, batch: Batch, seed: int = 0) -> torch.Tensor:
    """Minus the log likelihood of labels drawn from the model's own predictions.

    Its mean squared gate gradient is the true Fisher information (Kunstner et al. 2019,
    "Limitations of the Empirical Fisher Approximation for Natural Gradient Descent",
    arXiv:1905.12558), where that of given labels vanishes with the model's mistakes. Classes are
    drawn from the softmax, for every example or real token; each of several labels from its own
    sigmoid; values from a normal distribution of variance 1 around the predicted ones. Where the
    batch has labels, they only say which tokens count: those that are not -100.

    Returns:
        The sum over examples, or over tokens where predictions are per token; float32 or wider.

    Raises:
        DataError: the model has no task head whose predictions are known.
    """
    outputs = _predictions(model, batch)
    generators = [_generator(batch, example, seed) for example in range(examples_in(batch))]
    if "start_logits" in outputs:
        start, end = _wide(outputs["start_logits"]), _wide(outputs["end_logits"])
        if (mask := padding_mask(model, batch, start, "inputs")) is not None:
            # The positions are the classes: those of padding would take part in the softmax.
            nothing = torch.finfo(start.dtype).min
            start, end = (side.masked_fill(mask == 0, nothing) for side in (start, end))
        return _drawn_cross_entropy(start, generators) + _drawn_cross_entropy(end, generators)
    logits = _wide(outputs["logits"])
    if logits.dim() == 2 and (kind := problem_of(model, batch)) != "single_label_classification":
        if kind == "regression":
            noise = torch.stack([torch.randn(logits.shape[1], generator=g) for g in generators])
            return F.mse_loss(logits, logits.detach() + noise.to(logits), reduction="sum") / 2
        chance = torch.stack([torch.rand(logits.shape[1], generator=g) for g in generators])
        drawn = (chance.to(logits) < logits.detach().sigmoid()).to(logits)
        return F.binary_cross_entropy_with_logits(logits, drawn, reduction="sum")
    if logits.dim() == 2:
        return _drawn_cross_entropy(logits, generators)
    counted = _counted(model, batch, logits)
    if shifts_labels(model):
        counted = counted & ~_after_padding(batch, counted)
        # The logits of the last token stay where they are: without them all would be copied.
        counted = F.pad(counted[:, 1:], (0, 1))
    return _drawn_cross_entropy(logits, generators, counted)


def logits_loss(model: PreTrainedModel, batch: Batch, seed: int = 0) -> torch.Tensor:
    """How far the logits move, whatever the labels: a random projection of each example's logits.

    Its squared gate gradient is, on average over the projections, the squared change of the
    centred logits when the gate closes (Hutchinson's estimator; the softmax does not see a common
    shift). It needs no labels, and it counts every example alike, where the loss on labels that the
    model has learnt by heart leaves only its few mistakes. For two classes it is the margin.

    Returns:
        The projections, summed over examples, and over real tokens where the logits are per token;
        of a span's two ends, whose logits are one per token, over the real tokens.

    Raises:
        DataError: the model returns no logits.
    """
    outputs = _predictions(model, batch)
    if spans := "start_logits" in outputs:
        logits = torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1)
        mask = padding_mask(model, batch, outputs["start_logits"], "inputs")
    else:
        logits = outputs["logits"]
        mask = _real_tokens(model, batch, logits)
    logits = _wide(logits)
    directions = torch.zeros_like(logits)
    for example in range(examples_in(batch)):
        generator = _generator(batch, example, seed)
        tokens = slice(None) if mask is None else mask[example].bool()
        real = (..., tokens) if spans else tokens
        shape = directions[example][real].shape
        drawn = torch.randn(shape, generator=generator).to(logits)
        directions[example][real] = _centred(drawn)
    return (logits * directions).sum()


def _centred(directions: torch.Tensor) -> torch.Tensor:
    """Directions (..., classes) without what they have in common, of mean square 1 in each of the
    dimensions that are left.
    """
    classes = directions.shape[-1]
    if classes > 1:
        directions = directions - directions.mean(dim=-1, keepdim=True)
    norms = directions.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(directions.dtype).tiny)
    return directions / norms * max(1, classes - 1) ** 0.5


def _predictions(model: PreTrainedModel, batch: Batch) -> Mapping[str, torch.Tensor]:
    """What the model says about a batch, whose labels serve only as the decoder's inputs."""
    decodes_labels = model.config.is_encoder_decoder and "decoder_input_ids" not in batch
    answers = ANSWERS[1:] if decodes_labels else ANSWERS
    outputs = model(**{name: tensor for name, tensor in batch.items() if name not in answers})
    if "logits" not in outputs and "start_logits" not in outputs:
        raise DataError(
            f"{type(model).__name__} returns no logits; load the model with its task head, or give"
            " score a loss of your own: loss=f with f(model, batch) -> a summed loss."
        )
    return dict(outputs)


def _check_labels(model: PreTrainedModel, batch: Batch) -> None:
    """Refuse labels that name no class of the model."""
    classes, labels = _predictions(model, batch)["logits"].shape[-1], batch["labels"]
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise DataError(
            f"The label {int(wrong[0])} is none of the model's {classes} classes: labels are 0 to"
            f" {classes - 1}, and {IGNORED} for what has none."
        )


def _generator(batch: Batch, example: int, seed: int) -> torch.Generator:
    """Randomness of one example: from what is in it, without its padding, and the seed."""
    content = zlib.crc32(str(seed).encode())
    examples = examples_in(batch)
    for name in sorted(batch.keys() - set(ANSWERS)):
        if len(batch[name]) != examples:  # patches of all images in one sequence
            continue
        row = batch[name][example]
        mask = batch.get("decoder_attention_mask" if "decoder" in name else "attention_mask")
        if mask is not None and row.shape[: mask.dim() - 1] == mask[example].shape:
            row = row[mask[example].bool()]
        if row.numel():
            scalars = row.cpu().flatten().contiguous().view(torch.uint8)
            content = zlib.crc32(scalars.numpy().tobytes(), content)
    return torch.Generator().manual_seed(content)


def _drawn_cross_entropy(
    logits: torch.Tensor, generators: list[torch.Generator], counted: torch.Tensor | None = None
) -> torch.Tensor:
    """Summed cross-entropy of classes that are drawn from the logits.

    Args:
        logits: (examples, classes) or (examples, tokens, classes).
        generators: one per example.
        counted: (examples, tokens) boolean; the other tokens have no loss.
    """
    if counted is None:
        counted = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    drawn = torch.full(counted.shape, IGNORED, device=logits.device)
    for example, generator in enumerate(generators):
        # One example at a time: the probabilities of a whole batch are as large as its logits.
        real = counted[example]
        chances = logits[example].detach()[real].softmax(dim=-1).cumsum(dim=-1)
        dice = torch.rand(chances.shape[:-1], generator=generator).to(chances)[..., None]
        # Of the total, which rounding leaves beside 1.
        drawn[example] = drawn[example].masked_scatter(
            real, torch.searchsorted(chances, dice * chances[..., -1:], right=True)
        )
    return F.cross_entropy(
        logits.flatten(0, -2), drawn.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _counted(model: PreTrainedModel, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """Which of the (examples, tokens) predictions count: labelled ones, or those of real tokens."""
    labels = batch.get("labels")
    if labels is not None and labels.shape == logits.shape[:2]:
        return labels != IGNORED
    mask = _real_tokens(model, batch, logits)
    return torch.ones_like(logits[..., 0]).bool() if mask is None else mask.bool()


def foretold(batch: Batch) -> torch.Tensor:
    """A decoder's labels without those that padding would predict."""
    return batch["labels"].masked_fill(_after_padding(batch, batch["labels"]), IGNORED)


def _after_padding(batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
    """Which of the (examples, tokens) are the first after padding on the left: such a token is
    predicted by nothing, as that of a text without padding.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != tokens.shape:
        return torch.zeros_like(tokens, dtype=torch.bool)
    real = mask.bool()
    return F.pad(real[:, 1:] & ~real[:, :-1], (1, 0))


def _real_tokens(model: PreTrainedModel, batch: Batch, logits: torch.Tensor) -> torch.Tensor | None:
    """The mask of real tokens of logits (examples, tokens, classes); none where there is one row of
    classes for each example.
    """
    if logits.dim() < 3:
        return None
    decodes = model.config.is_encoder_decoder
    return padding_mask(model, batch, logits, "decoder inputs" if decodes else "inputs")


def problem_of(model: PreTrainedModel, batch: Batch) -> str:
    """What an example's row of logits stands for, found as transformers finds it."""
    labels, told = batch.get("labels"), getattr(model.config, "problem_type", None)
    if told:
        return str(told)
    if model.config.num_labels == 1:
        return "regression"
    many = labels is not None and labels.is_floating_point()
    return "multi_label_classification" if many else "single_label_classification"


def _wide(values: torch.Tensor) -> torch.Tensor:
    """In float32 or wider, as losses are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def terms(model: PreTrainedModel, batch: Batch) -> int:
    """How many terms the model's loss is the mean of: labelled examples or tokens; 1 of a sum."""
    labels, examples = batch.get("labels"), examples_in(batch)
    if _is_one_of(_CTC, model):
        return 1 if sums_examples(model) else examples
    of_tokens = _has_token_labels(model, batch)
    of_classes = of_tokens or problem_of(model, batch) == "single_label_classification"
    if labels is None or not of_classes or (labels.numel() != examples and not of_tokens):
        return examples
    if _is_one_of(_MASKED, model) and "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    if of_tokens and shifts_labels(model):
        labels = labels[:, 1:]  # the first token is predicted by nothing
    return int((labels != IGNORED).sum())


def _has_token_labels(model: PreTrainedModel, batch: Batch) -> bool:
    """Whether the labels name a class for every token (language models, token classification)."""
    labels = batch.get("labels")
    if labels is None or answers_once(model):
        return False
    return labels.dim() == 2 and not labels.is_floating_point()


def is_token_level(model: PreTrainedModel, batch: Batch) -> bool:
    """Whether the loss is a sum over tokens: by the labels, or by the model if there are none."""
    if "labels" in batch:
        return _has_token_labels(model, batch)
    return _is_one_of(_TOKEN_LEVEL, model)


def shifts_labels(model: PreTrainedModel) -> bool:
    """Whether the loss compares each position with the next label, as decoders' losses do."""
    return _is_one_of(_CAUSAL, model)


def answers_once(model: PreTrainedModel) -> bool:
    """Whether the loss is of examples, whatever shape their labels come in."""
    return _is_one_of(_EXAMPLE_LEVEL, model)


def sums_examples(model: PreTrainedModel) -> bool:
    """Whether the model's loss is a sum over the examples, where others are means."""
    return _is_one_of(_CTC, model) and bool(model.config.ctc_loss_reduction == "sum")


def _is_one_of(classes: Set[object], model: PreTrainedModel) -> bool:
    # By the class's name, or its parents' (FSDP makes a subclass): `loss_type` is None for
    # GPT2LMHeadModel and its like.
    return any(kind.__name__ in classes for kind in type(model).__mro__)


LOSSES: dict[str, Callable[[PreTrainedModel, Batch, int], torch.Tensor]] = {
    "labels": labels_loss,
    "logits": logits_loss,
    "sampled": sampled_loss,
}


def loss_named(name: str, seed: int) -> Loss:
    """The loss of that name, drawing what it draws from a seed.

    Raises:
        HfpruneError: unknown name; the message has the nearest.
    """
    if name not in LOSSES:
        raise HfpruneError(unknown("loss", name, LOSSES))
    loss = LOSSES[name]
    return lambda model, batch: loss(model, batch, seed)
