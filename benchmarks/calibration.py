"""How many calibration sentences are enough, on the MiniLM movie classifier and without training.

    python scripts/fetch_quickstart.py && python benchmarks/calibration.py

prints, for every number of sentences, the points of test accuracy lost after compensation at the
budgets asked for, the split-half rank correlation that the scores report of themselves, and the
seconds of every step; mean and spread over the seeds. It draws the curve. Every seed fine-tunes its
own dense classifier once, the one of benchmarks/quality.py. All that is measured stays in
runs/benchmark-calibration/: a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
from quality import ROOT, Seed, kept, mean_and_spread, spread
from rich.console import Console
from rich.table import Table

import hfprune
from hfprune.evaluation.evaluate import evaluate_classification
from hfprune.pipeline import calibration_batches

RUNS = ROOT / "runs" / "benchmark-calibration"
STEPS = ("score", "plan and remove", "compensate")

Measured = dict[str, float]  # points lost by budget, "agreement", seconds by step


def main() -> None:
    """Run what is asked for, print the table and draw the curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", default=["macs=50%", "macs=25%"])
    parser.add_argument("--sentences", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--criterion", default="reconstruction")
    arguments = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    seeds = [Seed(seed, "labels") for seed in arguments.seeds]
    table = {
        count: [measured(s, count, arguments.budgets, arguments.criterion) for s in seeds]
        for count in arguments.sentences
    }
    show(table, arguments.budgets)
    figure = RUNS / f"{arguments.criterion}.png"
    draw(table, arguments.budgets, figure)
    print(f"The curve is in {figure.relative_to(ROOT)}.")


def measured(seed: Seed, sentences: int, budgets: list[str], criterion: str) -> Measured:
    """What one seed gives with so many sentences, from the disk if it was measured before."""
    name = "-".join([criterion, *budgets]).replace("%", "").replace("=", "")
    file = RUNS / f"seed-{seed.seed}-{sentences}-{name}.json"
    return kept(file, lambda: measure(seed, sentences, budgets, criterion))


def measure(seed: Seed, sentences: int, budgets: list[str], criterion: str) -> Measured:
    """Score once, then plan, remove and compensate for every budget."""
    score = dataclasses.replace(seed.recipe.score, examples=sentences)
    batches = calibration_batches(dataclasses.replace(seed.recipe, score=score))
    seconds = dict.fromkeys(STEPS, 0.0)

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[step] += time.perf_counter() - start

    with timed("score"):
        scores = hfprune.score(seed.dense, batches, criteria=[criterion], seed=seed.seed)
    result: Measured = {"agreement": scores.agreement[criterion]}
    for budget in budgets:
        with timed("plan and remove"):
            plan = hfprune.plan(seed.dense, scores, budget, criterion)
            smaller = hfprune.remove(seed.dense, plan)
        with timed("compensate"):
            hfprune.compensate(seed.dense, smaller, batches, plan.keep)
        accuracy = 100 * evaluate_classification(smaller, seed.test).value
        result[budget] = seed.dense_accuracy - accuracy
    return result | seconds


def show(table: dict[int, list[Measured]], budgets: list[str]) -> None:
    """Print a row per number of sentences."""
    seeds = len(next(iter(table.values())))
    title = f"Points of test accuracy lost after compensation; mean ± spread of {seeds} seeds"
    steps = [f"{step}, s" for step in STEPS]
    printed = Table("sentences", *budgets, "agreement of the halves", *steps, title=title)
    for sentences, measurements in table.items():

        def column(name: str, digits: int = 1, of: list[Measured] = measurements) -> str:
            return mean_and_spread([measured[name] for measured in of], digits)

        lost = [column(budget) for budget in budgets]
        seconds = [column(step, 0) for step in STEPS]
        printed.add_row(str(sentences), *lost, column("agreement", 2), *seconds)
    Console().print(printed)


def draw(table: dict[int, list[Measured]], budgets: list[str], path: Path) -> None:
    """Points lost over the number of sentences, barred by the spread of the seeds."""
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for budget in budgets:
        lost = [[measured[budget] for measured in of] for of in table.values()]
        means = [statistics.mean(values) for values in lost]
        spreads = [spread(values) for values in lost]
        axes.errorbar(list(table), means, spreads, marker="o", capsize=3, label=budget)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(table), [str(sentences) for sentences in table])
    axes.set_xlabel("calibration sentences")
    axes.set_ylabel("points of accuracy lost")
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
