"""Made-up reports, of a plan of a tiny model, for the tests of this folder."""

import tiny
import torch

from hfprune.evaluation.evaluate import Difference, Quality
from hfprune.evaluation.measure import Latency, Measurement
from hfprune.importance.scores import Scores
from hfprune.planning.budget import Budget
from hfprune.planning.plan import PruningPlan
from hfprune.publishing.report import CurvePoint, Report, Variant
from hfprune.publishing.units import Pruning
from hfprune.structure.anatomy import Anatomy

NAMES = ("dense", "pruned", "compensated", "distilled")


def plan_of(family, **changes):
    """A plan that keeps a random, uneven choice of a tiny model's units."""
    anatomy = Anatomy.of(tiny.model(family))
    keep = tiny.selection(anatomy) | changes
    return PruningPlan(anatomy, keep, Budget.parse("macs=50%"), "fisher", 9)


def scores_of(plan, agreement=0.97):
    """Scores over many orders of magnitude for every unit of a plan's model; a head of none."""
    draw = torch.Generator().manual_seed(0)
    parts = (*plan.anatomy, *plan.anatomy.experts)
    values = {
        p.name: torch.exp(3 * torch.randn(p.units, generator=draw, dtype=torch.float64))
        for p in parts
    }
    values[parts[0].name][0] = 0
    return Scores({"fisher": values}, plan.anatomy.fingerprint, 640, (11.4,), {"fisher": agreement})


def variant(name, scale, metric="accuracy", low=-0.05, high=0.01):
    """A model of a made-up run, whose figures are a dense model's times a scale."""
    value = 0.9 * scale if metric == "accuracy" else 12.5 / scale
    latency = {
        size: Latency(median * scale, 0.6 * median * scale, 1.6 * median * scale, 7)
        for size, median in ((32, 0.05), (1, 0.002))
    }
    by_length = {
        1: {
            n: Latency(0.002 * n * scale, 0.001 * n * scale, 0.003 * n * scale, 7)
            for n in (16, 128)
        }
    }
    dense = 0.9 if metric == "accuracy" else 12.5
    return Variant(
        name=name,
        quality=Quality(metric, value, value - 0.02, value + 0.02, 1032),
        difference=None if name == "dense" else Difference(metric, value - dense, low, high, 1032),
        params=int(22_700_000 * scale),
        macs=int(480_000_000 * scale),
        measured=Measurement(
            "cpu", 2, latency, 3_000_000 if scale < 1 else None, 91_000_000, None, by_length
        ),
    )


def make(metric="accuracy", family="bert", **changes):
    """A report of four models."""
    plan = plan_of(family)
    values = {
        "variants": tuple(variant(name, 1 - 0.1 * i, metric) for i, name in enumerate(NAMES)),
        "tokens": 23,
        "machine": {"CPU": "a fine one", "threads": "2"},
        "seconds": {"dense": 61.5, "scores": 3.2},
        "pruning": Pruning.of(plan, scores_of(plan)),
        "recipe": {"model": "org/some-model", "prune": {"budget": "macs=50%"}},
        "curve": (
            CurvePoint(1.0, 0.9, 0.88, 0.92, "dense"),
            CurvePoint(0.5, 0.85, 0.83, 0.88, "fisher"),
            CurvePoint(0.25, 0.7, 0.65, 0.72, "fisher"),
            CurvePoint(0.5, 0.6, 0.5, 0.62, "random"),
        ),
    }
    return Report(**(values | changes))
