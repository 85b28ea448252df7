"""Folders to publish, made by hand: a saved pruned model, and what a finished run leaves."""

import dataclasses
import json
import shutil

import tiny
import torch
import yaml
from test_data import tiny_tokenizer

from hfprune.evaluation.evaluate import Difference, Quality
from hfprune.evaluation.measure import Latency, Measurement
from hfprune.importance.scores import Scores
from hfprune.planning.budget import Budget
from hfprune.planning.plan import PruningPlan
from hfprune.publishing.figures import draw_kept
from hfprune.publishing.report import Report, Variant, weights_of
from hfprune.recipe import Recipe
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.surgery import copy_and_cut

BASE = {"id": "base/bert", "revision": "5" * 40}


def plan_of(model, seed=0):
    """A plan with a random, uneven choice of units."""
    anatomy = Anatomy.of(model)
    return PruningPlan(
        anatomy, tiny.selection(anatomy, seed), Budget.parse("macs=50%"), "fisher", 9
    )


def scores_of(plan):
    """Random scores for every unit of a plan's model."""
    draw = torch.Generator().manual_seed(0)
    values = {g.name: torch.rand(g.units, generator=draw).double() for g in plan.anatomy}
    return Scores({"fisher": values}, plan.anatomy.fingerprint, 64, (9.0,), {"fisher": 0.9})


def pruned(seed=0, base=None):
    """A pruned tiny classifier."""
    model = tiny.model("bert", "AutoModelForSequenceClassification")
    if base:
        model.config.hfprune = {"version": 1, "modules": {}, "base": base}
    plan = plan_of(model, seed)
    return copy_and_cut(model, plan.keep, plan.summary)


def save(folder, seed=0, base=None, **options):
    """A pruned model's folder, with a tokenizer."""
    pruned(seed, base).save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def report(names=("dense", "distilled"), metric="accuracy", run=None):
    """A report of made-up figures, all different, on the models of a run's folder."""

    def variant(index, name):
        latency = {1: Latency(0.002 - index / 1e4, 0.001, 0.003, 7)}
        return Variant(
            name=name,
            quality=Quality(metric, 0.9 - index / 100, 0.8, 0.95, 123),
            difference=Difference(metric, -0.01, -0.03, 0.02, 123) if index else None,
            params=20_000_000 - index * 1_000_000,
            macs=400_000_000 - index * 10_000_000,
            measured=Measurement("cpu", 2, latency, None, 91_000_000 - index),
            weights=weights_of(run / name) if run else {},
        )

    variants = tuple(variant(*pair) for pair in enumerate(names))
    machine = {"CPU": "a fine one", "torch": "9.9"}
    return Report(variants, 9, machine, {"dense": 61.5}, recipe=RECIPE)


RECIPE = Recipe.from_dict(
    {
        "model": "/home/somebody/bert",
        "output": "/home/somebody/run",
        "data": {
            **{split: f"/home/somebody/{split}.jsonl" for split in ("train", "dev", "test")},
            "max_length": 12,
        },
        "seed": 7,
        "finetune": {"epochs": 1, "learning_rate": 1e-3, "batch_size": 8},
        "distill": {"epochs": 2, "learning_rate": 1e-4, "batch_size": 8},
    }
).to_dict()


def family(folder, budgets=("macs=80%", "macs=0.4"), base=BASE):
    """The folder of a finished run of several rounds, as far as it is published."""
    run(folder, base)
    names = []
    for number, budget in enumerate(budgets, 1):
        this = folder / f"round-{number}"
        save(this / "distilled", seed=number, base=base)
        plan = plan_of(tiny.model("bert", "AutoModelForSequenceClassification"), seed=number)
        plan = dataclasses.replace(plan, budget=Budget.parse(budget))
        plan.save(this / "plan.json")
        draw_kept(plan, this / "kept.png")
        scores_of(plan).save(this / "scores")
        names.append(f"round-{number}/distilled")
    recipe = RECIPE | {"prune": RECIPE["prune"] | {"budget": list(budgets)}}
    found = report(("dense", *names), run=folder)
    seconds = {"dense": 60.0, "round-1/distilled": 30.0, "round-2/distilled": 20.0}
    found = dataclasses.replace(found, seconds=seconds, recipe=recipe)
    for name in ("distilled", "plan.json", "kept.png"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "reloaded.json").write_text(json.dumps({"model": names[-1]}))
    (folder / "report.json").write_text(json.dumps(found.to_dict()))
    (folder / "report.md").write_text(found.markdown())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def run(folder, base=None, commits=None, **changes):
    """The folder of a finished run, as far as it is published."""
    save(folder / "distilled", base=base)
    plan = plan_of(tiny.model("bert", "AutoModelForSequenceClassification"))
    plan.save(folder / "plan.json")
    draw_kept(plan, folder / "kept.png")
    texts = {
        "steps.json": json.dumps({"dense": {"commits": commits or {}}}),
        "reloaded.json": json.dumps({"model": "distilled"}),
        "report.json": json.dumps(report(run=folder).to_dict()),
        "report.md": report().markdown(),
        "recipe.yaml": yaml.safe_dump(RECIPE | changes),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder
