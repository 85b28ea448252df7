"""Criteria: pure functions from what was observed at a group's outlet to the importance of its
units.

A new criterion is one function and the line that registers it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hfprune.errors import HfpruneError, unknown
from hfprune.importance.reconstruction import Joint, removal_errors


@dataclass(frozen=True)
class Evidence:
    """What one pass over the calibration data showed of one group of units.

    Attributes:
        absolute: (units,) sum over examples of |dL/dg|, the gate gradient of the example's own
            loss.
        squared: (units,) sum over examples (over tokens, for token-level losses) of (dL/dg)^2.
        inputs: (units, columns) sum over tokens of the squared input of each outlet column. Where
            only joint criteria are asked for, it is zero, and `absolute` and `squared` are of the
            first of many heads or neurons only.
        outlet: (units, columns) squared L2 norm of the outlet's weights of each column.
        weights: (units,) squared L2 norm of all weights that a unit owns.
        examples: number of examples.
        seed: for criteria that draw.
        joint: what is known of the units together, for the joint criteria; None for experts, which
            share no outlet.
    """

    absolute: torch.Tensor
    squared: torch.Tensor
    inputs: torch.Tensor
    outlet: torch.Tensor
    weights: torch.Tensor
    examples: int
    seed: int
    joint: Joint | None = None


Criterion = Callable[[Evidence], torch.Tensor]

CRITERIA: dict[str, Criterion] = {}

JOINT: set[str] = set()
"""Criteria that read `Evidence.joint`, which is gathered only for them, and of other data none
(experts have no other).
"""


def criterion(function: Criterion) -> Criterion:
    """Register a criterion under its function's name.

    Raises:
        HfpruneError: the name is taken.
    """
    name = function.__name__
    if name in CRITERIA:
        raise HfpruneError(f"There is a criterion {name!r} already; criteria are not replaced.")
    CRITERIA[name] = function
    return function


def joint_criterion(function: Criterion) -> Criterion:
    """As `criterion`, for one that reads `Evidence.joint` in place of the units' own data."""
    JOINT.add(criterion(function).__name__)
    return function


def criterion_named(name: str) -> Criterion:
    """The registered criterion of that name.

    Raises:
        HfpruneError: unknown name; the message has the nearest.
    """
    if not isinstance(name, str) or name not in CRITERIA:
        raise HfpruneError(unknown("criterion", name, CRITERIA))
    return CRITERIA[name]


@criterion
def taylor(evidence: Evidence) -> torch.Tensor:
    """Mean absolute change of the loss, to first order, when the gate closes.

    Michel et al. 2019, "Are Sixteen Heads Really Better than One?", arXiv:1905.10650.
    """
    return evidence.absolute / evidence.examples


@criterion
def fisher(evidence: Evidence) -> torch.Tensor:
    """Half the mean squared gate gradient: the change of the loss to second order.

    Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv:2204.09656;
    per token where the loss is per token, because the gradients of a sequence's tokens are nearly
    independent and their sum cancels.
    """
    return evidence.squared / (2 * evidence.examples)


@joint_criterion
def reconstruction(evidence: Evidence) -> torch.Tensor:
    """Half the mean squared change of the loss that is left after the outlet's kept columns have
    been refitted, added when the unit goes after all that matter less.

    See `hfprune.importance.reconstruction`. For routed experts, `fisher`.
    """
    if evidence.joint is None:
        return fisher(evidence)
    return removal_errors(evidence.joint) / (2 * evidence.examples)


@criterion
def magnitude(evidence: Evidence) -> torch.Tensor:
    """L2 norm of the unit's weights (Han et al. 2015, arXiv:1506.02626)."""
    return evidence.weights.sqrt()


@criterion
def activation(evidence: Evidence) -> torch.Tensor:
    """Norm of the outlet's weights times the norm of their inputs.

    Sun et al. 2023, "A Simple and Effective Pruning Approach for LLMs" (Wanda), arXiv:2306.11695.
    """
    return (evidence.inputs * evidence.outlet).sum(dim=1).sqrt()


@criterion
def random(evidence: Evidence) -> torch.Tensor:
    """Uniform noise: the floor that every other criterion must beat."""
    generator = torch.Generator().manual_seed(evidence.seed)
    return torch.rand(len(evidence.weights), generator=generator, dtype=torch.float64)


HALVED: dict[str, Criterion] = {"taylor": taylor, "fisher": fisher, "reconstruction": fisher}
"""By what the two halves of the examples are compared, for the criteria that read gradients: joint
moments are not kept twice.
"""
