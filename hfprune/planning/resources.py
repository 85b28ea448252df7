"""How the resources that a budget limits are counted: of one group, and of a whole selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hfprune.errors import HfpruneError
from hfprune.planning.budget import Limit
from hfprune.structure.anatomy import Anatomy, Group
from hfprune.structure.cost import (
    Selection,
    group_macs,
    group_params,
    layers_macs,
    layers_params,
)


@dataclass(frozen=True)
class Meter:
    """Counts one resource in whole numbers: MACs, parameters, bytes or nanoseconds.

    Attributes:
        of_group: (group, units, KV groups) that stay -> what the group costs.
        of_all: selection -> what all that is counted costs.
    """

    of_group: Callable[[Group, int, int], int]
    of_all: Callable[[Selection], int]


def macs_meter(anatomy: Anatomy, tokens: int) -> Meter:
    """MACs of the layers for one example."""
    return Meter(
        lambda group, units, kv: group_macs(group, units, kv, tokens),
        lambda keep: layers_macs(anatomy, tokens, keep),
    )


def params_meter(anatomy: Anatomy) -> Meter:
    """Parameters of the layers."""
    return Meter(group_params, lambda keep: layers_params(anatomy, keep))


def meter(limit: Limit, anatomy: Anatomy, tokens: int) -> Meter:
    """What counts the resource of a limit."""
    if limit.resource == "macs":
        return macs_meter(anatomy, tokens)
    if limit.resource == "params":
        return params_meter(anatomy)
    raise HfpruneError(f"{limit} cannot be counted.")
