"""Scores: what scoring found, as a value and as a file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hfprune.errors import HfpruneError, unknown
from hfprune.files import whole_file
from hfprune.importance.weights import digest
from hfprune.structure.anatomy import Anatomy

logger = logging.getLogger(__name__)

_FILE = "scores.safetensors"
_META = "scores"
_MEASURED_ON = ("fingerprint", "examples", "tokens", "agreement", "weights")


@dataclass(frozen=True)
class Scores:
    """The importance of every unit by every criterion, with what it was measured on.

    Attributes:
        importance: {criterion: {group name: (units,) float64 tensor}}.
        fingerprint: of the anatomy that was scored.
        examples: calibration examples.
        tokens: mean tokens per example, without padding, of each stack of layers: those of encoder
            and decoder, of images and texts.
        agreement: {criterion: Spearman rank correlation between the two halves of the calibration
            examples}, for the criteria that read gradients (of `reconstruction`, that of `fisher`,
            which reads the same ones); low means that more examples would change the plan.
        moments: {group name: (columns + 1, columns + 1) second moments of its outlet's inputs and a
            constant one, tokens weighted by the loss's gradient}, float32 or wider: with them
            `compensate` needs no data. Empty, unless they were asked for.
        weights: by which the scored weights are known again (see `check_model`); "" where that is
            not known.
    """

    importance: Mapping[str, Mapping[str, torch.Tensor]]
    fingerprint: str
    examples: int
    tokens: tuple[float, ...]
    agreement: Mapping[str, float]
    moments: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    weights: str = ""

    def by(self, criterion: str) -> Mapping[str, torch.Tensor]:
        """The importance by one criterion: {group name: (units,) float64}.

        Raises:
            HfpruneError: that criterion was not scored.
        """
        if not isinstance(criterion, str) or criterion not in self.importance:
            raise HfpruneError(unknown("criterion", criterion, self.importance))
        return self.importance[criterion]

    def check_model(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        """Refuse to speak for a model of another structure; warn of one with other weights, which
        may be meant: a model changes little in a few steps of training.

        Raises:
            HfpruneError: the structures differ.
        """
        if self.fingerprint != anatomy.fingerprint:
            raise HfpruneError(
                "These scores were measured on a model of another structure; score this model"
                " again."
            )
        if self.weights and self.weights != digest(model, anatomy):
            logger.warning(
                "These scores were measured on other weights of the same structure: on another"
                " model, or before training. Score this one, if what you plan is for it."
            )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write scores.safetensors into a folder, under a temporary name first."""
        tensors = {
            f"{criterion}/{group}": values.contiguous()
            for criterion, groups in self.importance.items()
            for group, values in groups.items()
        }
        tensors |= {group: moments.contiguous() for group, moments in self.moments.items()}
        meta = {name: getattr(self, name) for name in _MEASURED_ON}
        # In one file, or a save that fails over older scores would mix the two.
        with whole_file(Path(folder) / _FILE) as temporary:
            save_file(tensors, temporary, {_META: json.dumps(meta)})

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Scores:
        """The inverse of `save`.

        Raises:
            HfpruneError: there are no scores, or none that can be read.
        """
        importance: dict[str, dict[str, torch.Tensor]] = {}
        moments: dict[str, torch.Tensor] = {}
        try:
            with safe_open(Path(folder) / _FILE, "pt") as file:
                meta = json.loads(file.metadata()[_META])
                for key in file.keys():  # noqa: SIM118 (the file is no mapping)
                    criterion, _, group = key.rpartition("/")
                    found = importance.setdefault(criterion, {}) if criterion else moments
                    found[group] = file.get_tensor(key)
            meta["tokens"] = tuple(meta["tokens"])
            return Scores(importance, **meta, moments=moments)
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise HfpruneError(
                f"{folder} holds no scores that this hfprune can read ({error}); score the model"
                " again."
            ) from error
