"""How the resources that a budget limits are counted: of one group, and of a whole selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from hfprune.planning.budget import Budget, Limit
from hfprune.planning.latency import LatencyTable, check_measurable, measure_latency
from hfprune.structure.anatomy import Anatomy, Group
from hfprune.structure.cost import (
    Selection,
    Tokens,
    group_macs,
    group_params,
    layers_macs,
    layers_params,
    longest,
    table_params,
)
from hfprune.structure.memory import Memory

_SHORT = (1, 8)
"""A batch that every model runs on, where how long the examples are is not known yet."""


@dataclass(frozen=True)
class Meter:
    """Counts one resource in whole numbers: MACs, parameters, bytes or nanoseconds.

    Attributes:
        of_group: (group, units, KV groups) that stay -> what the group costs, in a stack that loses
            heads.
        of_all: selection -> what all that is counted costs.
    """

    of_group: Callable[[Group, int, int], int]
    of_all: Callable[[Selection], int]


def meter(
    limit: Limit,
    model: PreTrainedModel,
    anatomy: Anatomy,
    tokens: Tokens,
    latency: LatencyTable | None = None,
) -> Meter:
    """What counts the resource of a limit.

    Args:
        limit: of a budget.
        model: whose weights and cache take memory, and which takes time.
        anatomy: of the model.
        tokens: length of an example, where the limit does not say it; memory and latency are
            counted for the longest stack's.
        latency: where the time goes; measured now, if it is needed and None.

    Raises:
        UnsupportedModelError: memory of a model whose weights are not all of one size, or latency
            of one that reads neither text nor images.
        HfpruneError: a latency table of another model, or of other batches than the limit's.
    """
    shape = limit.shape or (1, longest(tokens))
    if limit.resource == "macs":
        return Meter(
            lambda group, units, kv: group_macs(group, units, kv, tokens),
            lambda keep: layers_macs(anatomy, tokens, keep),
        )
    if limit.resource == "params":
        tables = table_params(anatomy)
        return Meter(
            lambda group, units, kv: (
                group_params(group, units, kv) + units * tables.get(group.name, 0)
            ),
            lambda keep: layers_params(anatomy, keep),
        )
    if limit.resource == "memory":
        memory = Memory.of(model, *shape)
        return Meter(memory.of_group, memory.of_all)
    table = latency or measure_latency(model, *shape)
    table.check_fits(model, *shape)
    return Meter(table.of_group, lambda keep: table.of_all(anatomy, keep))


def check_budget(budget: Budget, model: PreTrainedModel, latency: LatencyTable | None) -> None:
    """Refuse a budget of what cannot be counted of a model; for before it is trained or scored.

    Raises:
        HfpruneError: and its children, as `meter` does.
    """
    for limit in budget.limits:
        if limit.resource == "memory":
            Memory.of(model, *limit.shape or _SHORT)
        elif limit.resource == "latency" and latency:
            latency.check_fits(model, *limit.shape or (latency.batch_size, latency.tokens))
        elif limit.resource == "latency":
            check_measurable(model, *limit.shape or _SHORT)
