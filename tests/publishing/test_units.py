"""What became of the units, as a report holds it."""

import dataclasses
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from reports import plan_of, scores_of

from hfprune.publishing.units import SAMPLED, Pruning, units_of


def parts_of(plan):
    return (*plan.anatomy, *plan.anatomy.experts)


@pytest.mark.parametrize("family", ["bert", "t5", "olmo2", "mixtral"])
def test_every_layer_is_told_with_its_importances(family):
    plan = plan_of(family)
    scores = scores_of(plan)
    rows = units_of(plan, scores.by("fisher"))
    assert len({row.label for row in rows}) == len(rows) == len(parts_of(plan))
    for part, row in zip(parts_of(plan), rows, strict=True):
        kept = plan.keep.get(part.name, tuple(range(part.units)))
        values = scores.by("fisher")[part.name]
        gone = [unit for unit in range(part.units) if unit not in kept]
        assert (row.kind, row.total, row.kept, row.which) == (
            part.kind,
            part.units,
            len(kept),
            kept,
        )
        assert row.kept_importance == pytest.approx(sorted(values[list(kept)].tolist()), rel=1e-3)
        assert row.removed_importance == pytest.approx(sorted(values[gone].tolist()), rel=1e-3)


def test_many_units_are_told_by_their_quantiles():
    plan = plan_of("bert")
    group = next(g for g in plan.anatomy if g.kind == "neuron" and plan.keep[g.name])
    wide = dataclasses.replace(group, units=5000)
    anatomy = dataclasses.replace(
        plan.anatomy, groups=tuple(wide if g is group else g for g in plan.anatomy)
    )
    kept = tuple(range(0, 5000, 2))
    plan = dataclasses.replace(plan, anatomy=anatomy, keep={**plan.keep, group.name: kept})
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).double().exp()
    row = next(r for r in units_of(plan, {group.name: values}) if r.total == 5000)
    assert row.which is None
    assert len(row.kept_importance) == SAMPLED
    wanted = np.quantile(values[::2].numpy(), np.linspace(0, 1, SAMPLED))
    assert row.kept_importance == pytest.approx(wanted.tolist(), rel=0.02)


def test_a_dropped_layer_keeps_nothing():
    rows = units_of(plan_of("mixtral", layers=(0, 2)))
    assert {row.layer for row in rows if row.dropped} == {1}
    assert all((row.kept == 0) for row in rows if row.dropped)
    assert all("(removed)" in row.label for row in rows if row.dropped)


def test_it_comes_back_from_json_and_counts():
    plan = plan_of("mixtral")
    pruning = Pruning.of(plan, scores_of(plan))
    assert Pruning.from_dict(json.loads(json.dumps(asdict(pruning)))) == pruning
    for kind in pruning.kinds:
        stay = sum(
            len(plan.keep.get(p.name, range(p.units))) for p in parts_of(plan) if p.kind == kind
        )
        assert pruning.count(kind) == (stay, sum(p.units for p in parts_of(plan) if p.kind == kind))
