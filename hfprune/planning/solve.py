"""The planner: which units of all layers together are worth their cost under a budget.

Every group offers options (how many units to keep, the most important first), each with its costs
and a loss of importance. Choosing one option per group under the budget's limits is the
multiple-choice knapsack problem; see `hfprune.planning.knapsack`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from hfprune.errors import BudgetError, HfpruneError
from hfprune.importance.scoring import Scores
from hfprune.planning.budget import Budget, Limit
from hfprune.planning.constraints import Constraints
from hfprune.planning.knapsack import Choice, choose
from hfprune.planning.offers import Offer, offer, tied
from hfprune.planning.plan import PruningPlan, Spending
from hfprune.planning.resources import Meter, meter
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.cost import Selection

_TINY = 1e-12


def plan(
    model: PreTrainedModel,
    scores: Scores,
    budget: str | Budget | Sequence[str],
    criterion: str = "fisher",
    constraints: Constraints | None = None,
    tokens: int | None = None,
) -> PruningPlan:
    """Choose what to keep of a model under a budget.

    Args:
        model: the model that was scored.
        scores: from `hfprune.score`.
        budget: "macs=50%" or "params=0.6", the share of the layers' cost to keep; or several such
            limits, "macs=50%, params=60%". No limit is exceeded, and the spending is within the
            constraints' tolerance below one of them.
        criterion: by which importance.
        constraints: floors, granularity, and what must stay; by default one head and one neuron per
            layer at least.
        tokens: length of the example whose MACs are counted; by default the calibration data's
            mean.

    Raises:
        BudgetError: no structure meets the budget; the message names the nearest that one can.
        HfpruneError: the scores belong to another model, the criterion was not scored, or the
            constraints do not fit the model.
    """
    anatomy = Anatomy.of(model)
    if scores.fingerprint != anatomy.fingerprint:
        raise HfpruneError(
            "These scores were measured on a model of another structure; score this model again."
        )
    constraints = constraints or Constraints()
    constraints.check(model)
    importance = scores.by(criterion)
    if missing := [
        part.name for part in (*anatomy, *anatomy.experts) if part.name not in importance
    ]:
        raise HfpruneError(
            f"These scores hold nothing for {missing[0]}: they were measured by an hfprune that did"
            " not know such units. Score this model again."
        )
    asked = Budget.parse(budget)
    tokens = tokens or max(1, round(scores.tokens))
    return solve(
        anatomy,
        importance,
        asked,
        [meter(limit, anatomy, tokens) for limit in asked.limits],
        criterion=criterion,
        constraints=constraints,
        tokens=tokens,
    )


def solve(
    anatomy: Anatomy,
    importance: Mapping[str, torch.Tensor],
    budget: Budget,
    meters: Sequence[Meter],
    *,
    criterion: str,
    constraints: Constraints,
    tokens: int,
    within: Selection | None = None,
) -> PruningPlan:
    """The plan that keeps the most importance under a budget; see `plan`.

    Args:
        meters: one per limit of the budget.
        within: choose among these units only; None for all.
    """
    among = anatomy.everything | dict(within or {})
    keep = _kept_blocks(anatomy, importance, constraints)
    stay = {stack.stack: keep.get(stack.name, range(stack.units)) for stack in anatomy.stacks}
    offers = [
        offer(group, importance[group.name], among[group.name], meters, constraints)
        for group in anatomy
        if group.layer in stay[group.stack]
    ]
    dense = [meter.of_all({}) for meter in meters]
    limits = [_amount(limit, all_) for limit, all_ in zip(budget.limits, dense, strict=True)]
    whole = [
        [meter.of_group(o.group, o.group.units, o.group.kv_groups) for meter in meters]
        for o in offers
    ]
    fixed = [meter.of_all(keep) for meter in meters] - _summed(whole, len(meters))
    total = sum(float(importance[g.name].sum()) for g in anatomy)
    choice, options = _choose(offers, limits - fixed, total, uniform=constraints.uniform)
    ...
