"""The arguments of distillation: the Trainer's, and what to match of the teacher."""

from __future__ import annotations

import dataclasses
import math
from numbers import Real
from typing import get_args

from transformers import TrainingArguments

from hfprune.errors import RecipeError, expect
from hfprune.recovery.compatibility import refuse_unknown
from hfprune.recovery.losses import DistanceKind, Divergence, DivergenceKind


@dataclasses.dataclass
class DistillationArguments(TrainingArguments):
    """TrainingArguments with the weights of the parts of the loss and the divergence on the logits.

    The loss is the sum of weight x part; a part of weight 0 is neither computed nor logged. Parts
    are logged as `loss_task`, `loss_logits`, `loss_hidden`, `loss_attention` and `loss_embedding`,
    before weighting.

    Raises:
        RecipeError: a weight is negative or not finite, all are 0, or the divergence cannot be
            built.
    """

    task_weight: float = dataclasses.field(
        default=0.5, metadata={"help": "Weight of the model's own loss on the labels."}
    )
    logits_weight: float = dataclasses.field(
        default=1.0, metadata={"help": "Weight of the divergence from the teacher's predictions."}
    )
    hidden_weight: float = dataclasses.field(
        default=1.0, metadata={"help": "Weight of the error of each layer's hidden states."}
    )
    attention_weight: float = dataclasses.field(
        default=0.0, metadata={"help": "Weight of the error of the attention outlets' outputs."}
    )
    embedding_weight: float = dataclasses.field(
        default=0.0, metadata={"help": "Weight of the distance of mean-pooled embeddings."}
    )
    embedding_distance: DistanceKind = dataclasses.field(
        default="cosine", metadata={"help": "Distance of two embeddings: cosine or mse."}
    )
    temperature: float = dataclasses.field(
        default=2.0, metadata={"help": "Temperature of both distributions; above 0."}
    )
    divergence: DivergenceKind = dataclasses.field(
        default="forward", metadata={"help": "KL direction: forward, reverse or skewed."}
    )
    skew: float = dataclasses.field(
        default=0.1, metadata={"help": "Teacher's share of the mixture when skewed; in (0, 1)."}
    )
    dropout: bool = dataclasses.field(
        default=False, metadata={"help": "Keep the student's dropout while it learns."}
    )

    def __post_init__(self) -> None:
        """Validate the added fields, then everything TrainingArguments validates."""
        weights = self.weights()
        for name, weight in weights.items():
            expect(weight, Real, f"{name}_weight", "a number")
        if not all(0 <= w < math.inf for w in weights.values()) or not any(weights.values()):
            raise RecipeError(
                f"The weights of the loss are {weights}; give finite numbers of at least 0, one of "
                "them above 0."
            )
        Divergence(self.divergence, self.temperature, self.skew).check()
        refuse_unknown("embedding_distance", self.embedding_distance, get_args(DistanceKind))
        super().__post_init__()

    def weights(self) -> dict[str, float]:
        """The weight of every part of the loss, by its name."""
        return {
            "task": self.task_weight,
            "logits": self.logits_weight,
            "hidden": self.hidden_weight,
            "attention": self.attention_weight,
            "embedding": self.embedding_weight,
        }
