"""What a student is asked to match of its teacher, and what each part of it averages over.

Every function returns a sum over what is counted, in float32. The caller divides by the count over
the whole accumulated batch and all processes, which is what makes accumulation and data parallelism
exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from hfprune.errors import DataError, RecipeError, unknown
from hfprune.importance.batches import IGNORED
from hfprune.importance.losses import foretold

DivergenceKind = Literal["forward", "reverse", "skewed"]
DistanceKind = Literal["cosine", "mse"]


class Counted(NamedTuple):
    """Boolean masks over one batch; each part of the loss is a mean over one of them.

    Attributes:
        targets: labels the model's own loss averages over; the shape of the labels, or (batch,).
        predictions: distributions to compare; (batch,) with one per example, (batch, tokens) at
            token level.
        positions: hidden states to compare; (batch, tokens), or (batch,) when no padding is marked.
        examples: all of them; (batch,).
    """

    targets: Tensor
    predictions: Tensor
    positions: Tensor
    examples: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], *, shifted: bool, once: bool = False) -> Counted:
        """Read the masks off a batch.

        Token-level integer labels count where they are not -100; one label per example, or none,
        makes every example a prediction; `attention_mask` says which positions are not padding.
        Padding on the left predicts nothing: what counts does not depend on the longest of a batch.

        Args:
            batch: the keyword arguments of the model's forward.
            shifted: the model predicts token i + 1 at position i (causal language models).
            once: the model answers once for an example, whose label may be of shape (1,), or a
                transcript.
        """
        first = next(value for value in batch.values() if isinstance(value, Tensor))
        examples = torch.ones(first.shape[0], dtype=torch.bool, device=first.device)
        mask = batch.get("attention_mask")
        positions = mask.bool() if mask is not None and mask.dim() == 2 else examples
        labels = batch.get("labels")
        if labels is None:
            return cls(examples, examples, positions, examples)
        if labels.is_floating_point():  # regression, multi-label: no value means "ignored"
            values = torch.ones_like(labels, dtype=torch.bool)
            return cls(values, examples, positions, examples)
        if once and labels.dim() == 2:
            labels = labels.squeeze(1)
        if labels.dim() == 1:
            return cls(labels != IGNORED, examples, positions, examples)
        if once:
            return cls(examples, examples, positions, examples)
        if shifted:
            labels = F.pad(foretold(batch)[:, 1:], (0, 1), value=IGNORED)
        return cls(labels != IGNORED, labels != IGNORED, positions, examples)

    def sizes(self) -> Tensor:
        """How much each mask counts: int64, shape (4,), in field order."""
        return torch.stack([mask.sum() for mask in self])


class Divergence(NamedTuple):
    """How far the student's distribution is from the teacher's, at a temperature.

    The value is multiplied by temperature^2 so that gradients keep their size (Hinton et al. 2015,
    "Distilling the knowledge in a neural network"). With p the teacher and q the student:

    - forward: KL(p || q); the student covers all the teacher's modes.
    - reverse: KL(q || p); the student keeps to modes it can hold.
    - skewed: KL(p || skew * p + (1 - skew) * q), bounded where q vanishes (Ko et al. 2024,
      "DistiLLM").
    """

    kind: DivergenceKind = "forward"
    temperature: float = 2.0
    skew: float = 0.1

    def check(self) -> None:
        """Refuse values that make no distribution.

        Raises:
            RecipeError: unknown kind, temperature not above 0, or skew outside (0, 1).
        """
        if self.kind not in get_args(DivergenceKind):
            raise RecipeError(unknown("divergence", self.kind, get_args(DivergenceKind)))
        if not 0 < self.temperature < math.inf:
            raise RecipeError(f"temperature is {self.temperature}; give a finite number above 0.")
        if not 0 < self.skew < 1:
            raise RecipeError(f"skew is {self.skew}; give a number between 0 and 1, e.g. 0.1.")

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Divergence of each distribution: logits (..., classes) to float32 (...)."""
        log_q = F.log_softmax(student.float() / self.temperature, dim=-1)
        log_p = F.log_softmax(teacher.float() / self.temperature, dim=-1)
        if self.kind == "forward":
            value = _kl(log_p, log_q)
        elif self.kind == "reverse":
            value = _kl(log_q, log_p)
        else:
            shares = math.log(self.skew), math.log(1 - self.skew)
            value = _kl(log_p, torch.logaddexp(log_p + shares[0], log_q + shares[1]))
        return self.temperature**2 * value


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last axis."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def logits_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    counted: Counted,
    divergence: Divergence,
    problem_type: str | None = None,
) -> Tensor:
    """Divergence of the student's predictions from the teacher's, summed over what is counted.

    - `logits` of (batch, tokens, vocabulary): one distribution per counted token.
    - `logits` of (batch, labels): one per example; one Bernoulli per label, averaged, for
      multi-label problems; the squared difference for regression, whose single logit is no
      distribution.
    - `start_logits` and `end_logits` of (batch, tokens): one each per example over the tokens that
      are not padding, averaged.

    Args:
        student: the student's outputs.
        teacher: the teacher's outputs on the same batch.
        counted: what counts in that batch.
        divergence: how to compare two distributions.
        problem_type: as in the model's config, of logits of (batch, labels).

    Raises:
        DataError: the outputs hold no logits, or the batch does not say which of them count.
    """
    if "start_logits" in student:
        spans = [
            divergence(_unpadded(student[end], counted), _unpadded(teacher[end], counted))
            for end in ("start_logits", "end_logits")
        ]
        return torch.stack(spans).mean(0).sum()
    if "logits" not in student:
        raise DataError(
            f"The model returns {', '.join(student)} and no logits to distil; set logits_weight to "
            "0, and embedding_weight above it for sentence embeddings; or load it with its task "
            "head."
        )
    check_shapes("logits", student["logits"], teacher["logits"], counted.predictions, trailing=1)
    logits_q = student["logits"][counted.predictions]  # (n, classes)
    logits_p = teacher["logits"][counted.predictions]
    of_tokens = student["logits"].dim() == 3
    if logits_q.shape[-1] == 1 or (problem_type == "regression" and not of_tokens):
        return (logits_q.float() - logits_p.float()).square().mean(-1).sum()
    if problem_type == "multi_label_classification":  # sigmoid(x) = softmax((x, 0))[0]
        logits_q = torch.stack([logits_q, torch.zeros_like(logits_q)], dim=-1)
        logits_p = torch.stack([logits_p, torch.zeros_like(logits_p)], dim=-1)
        return divergence(logits_q, logits_p).mean(-1).sum()
    return divergence(logits_q, logits_p).sum()


def only_logits(outputs: Mapping[str, Tensor]) -> Tensor:
    """The logits of a model's outputs.

    Raises:
        DataError: there are none under that name.
    """
    if "logits" not in outputs:
        raise DataError(
            f"The teacher returns {', '.join(outputs)} and no logits that a cache could hold; "
            "train without a cache."
        )
    return outputs["logits"]


def _unpadded(logits: Tensor, counted: Counted) -> Tensor:
    """Span logits (batch, tokens) with no probability left on padding."""
    if counted.positions.dim() == 1:
        return logits
    return logits.float().masked_fill(~counted.positions, -1e9)


def state_loss(student: Tensor, teacher: Tensor, counted: Tensor, part: str) -> Tensor:
    """Squared error of states relative to the teacher's mean square, summed over what is counted.

    Mean squared error over the width, divided position by position by the teacher's mean square:
    residual streams grow by orders of magnitude with depth and differ between families, and the
    next layer normalises them anyway, so only the relative error means the same everywhere, and one
    weight serves all layers and models.

    Args:
        student: (batch, tokens, width), or (batch, width).
        teacher: the same shape.
        counted: boolean (batch, tokens), or (batch,): then each example counts once, as the mean
            over its tokens.
        part: the part of the loss this is, named in errors.

    Raises:
        DataError: the two shapes differ, or the mask does not fit them.
    """
    check_shapes(part, student, teacher, counted, trailing=None)
    student = student[counted].float()
    teacher = teacher[counted].float()
    scale = teacher.square().mean(-1).clamp_min(1e-6)
    error = (student - teacher).square().mean(-1) / scale  # (n,) or (batch, tokens)
    return error.flatten(1).mean(1).sum() if error.dim() > 1 else error.sum()


def pooled(outputs: Mapping[str, Tensor], counted: Counted) -> Tensor:
    """Sentence embeddings (batch, width), float32: the mean of the last states without padding.

    Raises:
        DataError: the model returns no `last_hidden_state`.
    """
    states = outputs.get("last_hidden_state")
    if states is None:
        raise DataError(
            f"The model returns {', '.join(outputs)} and no last_hidden_state to pool; set "
            "embedding_weight to 0, or load it without its task head."
        )
    if counted.positions.dim() == 1:
        return states.float().mean(1)
    mask = counted.positions.unsqueeze(-1)
    return (states.float() * mask).sum(1) / mask.sum(1).clamp_min(1)


def embedding_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    counted: Counted,
    distance: DistanceKind,
) -> Tensor:
    """Distance of the student's sentence embeddings from the teacher's, summed over the examples.

    - cosine: 1 - cos; the length of an embedding does not matter.
    - mse: squared error relative to the teacher's mean square, as for hidden states.
    """
    ours, theirs = pooled(student, counted), pooled(teacher, counted)
    if distance == "mse":
        return state_loss(ours, theirs, counted.examples, "embedding")
    check_shapes("embedding", ours, theirs, counted.examples, trailing=None)
    return (1 - F.cosine_similarity(ours, theirs, dim=-1)).sum()


def check_shapes(
    part: str, student: Tensor, teacher: Tensor, mask: Tensor, *, trailing: int | None
) -> None:
    """Refuse tensors that cannot be compared entry by entry under the mask."""
    if student.shape != teacher.shape:
        raise DataError(
            f"The student's {part} has shape {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}. Distil from the model the student was pruned from, or set "
            f"{part}_weight to 0."
        )
    leading = student.shape[: mask.dim()] if trailing is None else student.shape[:-trailing]
    if leading != mask.shape:
        raise DataError(
            f"The {part} of shape {tuple(student.shape)} does not fit what the batch counts, "
            f"{tuple(mask.shape)}: token-level outputs need token-level labels and an attention "
            f"mask over the same tokens. Give them, or set {part}_weight to 0."
        )


def spread_layers(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """The teacher layer of each student layer, evenly spaced with the last layers aligned.

    With equal counts this is the identity; 3 of 6 gives (1, 3, 5).
    """
    return tuple(
        ((layer + 1) * teacher_layers - 1) // student_layers for layer in range(student_layers)
    )
