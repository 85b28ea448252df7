"""What every group of units offers the planner: how many units to keep, at what cost and loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hfprune.errors import HfpruneError
from hfprune.planning.constraints import Constraints
from hfprune.planning.knapsack import Floats, Ints
from hfprune.planning.resources import Meter
from hfprune.structure.anatomy import Group


@dataclass(frozen=True)
class Offer:
    """What one group offers: parallel arrays of cost and loss, and the shape of each option.

    Attributes:
        ranked: (KV groups, query heads per group) unit indices, most important first in each row.
        importance: (KV groups, query heads per group) importance in that order.
        kv: KV groups of each option, taken in the order of their best query heads.
        per_kv: query heads per KV group of each option (1 for neurons, whose "KV groups" are the
            neurons).
        cost: (options, meters) what each option costs.
        loss: of importance, of each option.
    """

    group: Group
    ranked: Ints
    importance: Floats
    kv: Ints
    per_kv: Ints
    cost: Ints
    loss: Floats

    @property
    def largest(self) -> int:
        """The option that keeps all there is to choose from."""
        return int(np.argmax(self.kv * self.per_kv))

    def units(self, option: int) -> tuple[int, ...]:
        """The units that an option keeps, ascending."""
        kv, per_kv = int(self.kv[option]), int(self.per_kv[option])
        if not kv:
            return ()
        best = np.argsort(-self.importance[:, :per_kv].sum(axis=1), kind="stable")[:kv]
        return tuple(sorted(self.ranked[best, :per_kv].flatten().tolist()))

    def margin(self, option: int, prices: Floats) -> tuple[float | None, float | None]:
        """The importance per priced cost of the best units that go, and of the least that stay."""
        priced = self.cost @ prices
        gain, dearer = self.loss[option] - self.loss, priced - priced[option]
        up, down = dearer > 0, dearer < 0
        return (
            float((gain[up] / dearer[up]).max()) if up.any() else None,
            float((gain[down] / dearer[down]).min()) if down.any() else None,
        )


def offer(
    group: Group,
    importance: torch.Tensor,
    among: Sequence[int],
    meters: Sequence[Meter],
    constraints: Constraints,
) -> Offer:
    """Everything that a group can keep of the units `among` which it may choose."""
    values = importance.double().cpu().numpy()
    units = np.array(among, dtype=np.int64).reshape(len(group.kv_of(among)), -1 if among else 1)
    order = np.argsort(-values[units], axis=1, kind="stable")
    ranked = np.take_along_axis(units, order, axis=1)
    kv, per_kv = _shapes(group, *units.shape, constraints)
    kept = np.zeros(len(kv))
    for h in np.unique(per_kv):  # the best g KV groups, when each keeps its best h query heads
        best = -np.sort(-values[ranked[:, :h]].sum(axis=1))
        kept[per_kv == h] = np.concatenate([[0.0], np.cumsum(best)])[kv[per_kv == h]]
    cost = [
        [meter.of_group(group, int(g * h), int(g)) for meter in meters]
        for g, h in zip(kv, per_kv, strict=True)
    ]
    return Offer(
        group,
        ranked,
        values[ranked],
        kv,
        per_kv,
        np.array(cost, dtype=np.int64),
        values.sum() - kept,
    )


def _shapes(
    group: Group, kv_groups: int, heads_per_kv: int, constraints: Constraints
) -> tuple[Ints, Ints]:
    """How many KV groups, and query heads in each, may stay of those there are: two arrays."""
    units = kv_groups * heads_per_kv
    if constraints.protects(group):
        return np.array([kv_groups]), np.array([heads_per_kv])
    if group.kind == "neuron":
        counts = np.arange(units + 1)
        allowed = (counts % constraints.round_to == 0) | (counts == units)
        allowed &= counts >= min(constraints.min_neurons, units)
        return counts[allowed], np.ones(int(allowed.sum()), dtype=np.int64)
    shapes = [(g, h) for h in range(1, heads_per_kv + 1) for g in range(1, kv_groups + 1)]
    floor = min(constraints.min_heads, units)
    shapes = [(g, h) for g, h in [(0, 1), *shapes] if g * h >= floor]
    kv, per_kv = (np.array(side, dtype=np.int64) for side in zip(*shapes, strict=True))
    return kv, per_kv


def tied(offers: Sequence[Offer]) -> list[list[int]]:
    """Numbers of the offers that must choose the same option: those of a stack and kind.

    Raises:
        HfpruneError: the layers are not alike before pruning, or some are protected and some not.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    for number, own in enumerate(offers):
        groups.setdefault((own.group.stack, own.group.kind), []).append(number)
    for together in groups.values():
        first = offers[together[0]]
        for other in (offers[n] for n in together):
            if not (
                np.array_equal(first.kv, other.kv) and np.array_equal(first.per_kv, other.per_kv)
            ):
                raise HfpruneError(
                    f"uniform: {first.group.name} and {other.group.name} have different numbers of"
                    f" {other.group.kind}s to choose from. Protect all layers of the stack or none,"
                    " or plan without uniform."
                )
    return list(groups.values())
