"""Quality against cost on the MiniLM movie classifier: seeds x budgets x criteria, without training
and after distillation.

    python scripts/fetch_quickstart.py && python benchmarks/quality.py

prints, for every budget of the encoder's MACs, the points of test accuracy lost against the dense
model: after removal alone, after compensation by the scores or on the data, and by the first
criterion also after distillation at the budgets in --distill; mean and spread over the seeds. It
draws the curve after compensation. Random and magnitude stand beside the others: what does not beat
them is not worth its time. Every seed fine-tunes its own dense classifier once. All that is
measured stays in runs/benchmark-quality/: a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import hfprune
from hfprune.data import Batches
from hfprune.evaluation.evaluate import evaluate_classification
from hfprune.files import write_whole
from hfprune.pipeline import calibration_batches, evaluation_batches, run
from hfprune.publishing.figures import draw_curve
from hfprune.publishing.report import CurvePoint
from hfprune.recipe import Recipe

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "benchmark-quality"

Measured = TypeVar("Measured")
Key = tuple[str, str, float]  # criterion, stage, budget


def main() -> None:
    """Run what is asked for, print the table and draw the curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5, 0.35, 0.25])
    parser.add_argument("--distill", type=float, nargs="*", default=[0.5, 0.25])
    parser.add_argument(
        "--criteria", nargs="+", default=["reconstruction", "fisher", "magnitude", "random"]
    )
    parser.add_argument("--loss", default="labels", choices=["labels", "sampled", "logits"])
    arguments = parser.parse_args()
    seeds = [Seed(seed, arguments.loss) for seed in arguments.seeds]
    accuracy: dict[Key, list[float]] = {}
    for criterion in arguments.criteria:
        for budget in arguments.budgets:
            for seed in seeds:
                for stage, value in seed.untrained(criterion, budget):
                    accuracy.setdefault((criterion, stage, budget), []).append(value)
    for budget in arguments.distill:
        for seed in seeds:
            key = (arguments.criteria[0], "distilled", budget)
            accuracy.setdefault(key, []).append(seed.distilled(arguments.criteria[0], budget))
    dense = [seed.dense_accuracy for seed in seeds]
    show(accuracy, dense)
    figure = RUNS / f"quality-{arguments.loss}.png"
    draw_curve(points(accuracy, dense), figure)
    print(f"The curve is in {figure.relative_to(ROOT)}.")


@dataclass
class Seed:
    """One seed's dense classifier, and the accuracy in percent of what is made of it."""

    seed: int
    loss: str

    @cached_property
    def recipe(self) -> Recipe:
        base = Recipe.load(ROOT / "recipes" / "minilm" / "movie.yaml")
        score = dataclasses.replace(base.score, loss=self.loss)
        output = str(RUNS / f"seed-{self.seed}")
        return dataclasses.replace(base, output=output, seed=self.seed, score=score)

    @cached_property
    def dense(self) -> PreTrainedModel:
        run(self.recipe, until="dense")
        return hfprune.from_pretrained(Path(self.recipe.output) / "dense")

    @cached_property
    def calibration(self) -> list[dict]:
        return calibration_batches(self.recipe)

    @cached_property
    def test(self) -> Batches:
        return evaluation_batches(self.recipe)

    @cached_property
    def scores(self) -> hfprune.Scores:
        return hfprune.score(
            self.dense, self.calibration, loss=self.loss, seed=self.seed, moments=True
        )

    @property
    def dense_accuracy(self) -> float:
        return self._kept("dense", lambda: {"dense": self._judge(self.dense)})["dense"]

    def untrained(self, criterion: str, budget: float) -> Iterator[tuple[str, float]]:
        """After removal, after compensation by the scores, which need no data, and on the data."""

        def measure() -> dict[str, float]:
            plan = hfprune.plan(self.dense, self.scores, f"macs={budget}", criterion)
            by = {"removed": None, "by scores": self.scores, "compensated": self.calibration}
            return {
                stage: self._judge(hfprune.remove(self.dense, plan, compensate=calibration))
                for stage, calibration in by.items()
            }

        yield from self._kept(f"{criterion}-{percent(budget)}", measure).items()

    def distilled(self, criterion: str, budget: float) -> float:
        """After the recipe's distillation, too."""

        def measure() -> dict[str, float]:
            prune = dataclasses.replace(
                self.recipe.prune, budget=f"macs={percent(budget)}", criterion=criterion
            )
            recipe = dataclasses.replace(self.recipe, prune=prune)
            run(recipe, until="result")
            folder = Path(recipe.output) / "distilled"
            return {"distilled": self._judge(hfprune.from_pretrained(folder))}

        return self._kept(f"{criterion}-{percent(budget)}-distilled", measure)["distilled"]

    def _judge(self, model: PreTrainedModel) -> float:
        return 100 * evaluate_classification(model, self.test).value

    def _kept(self, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        return kept(RUNS / f"seed-{self.seed}-{self.loss}-{name}.json", measure)


def show(accuracy: dict[Key, list[float]], dense: list[float]) -> None:
    """Print the table: criteria and stages in rows, budgets in columns."""
    title = (
        f"Points of test accuracy lost, mean ± spread of {len(dense)} seeds; dense"
        f" {mean_and_spread(dense)} %"
    )
    budgets = sorted({budget for *_, budget in accuracy}, reverse=True)
    table = Table("MACs kept", *(percent(budget) for budget in budgets), title=title)
    for criterion, stage in dict.fromkeys((criterion, stage) for criterion, stage, _ in accuracy):
        cells = []
        for budget in budgets:
            values = accuracy.get((criterion, stage, budget), [])
            lost = [d - v for d, v in zip(dense, values, strict=False)]
            cells.append(mean_and_spread(lost) if lost else "")
        table.add_row(f"{criterion}, {stage}", *cells)
    Console().print(table)


def points(accuracy: dict[Key, list[float]], dense: list[float]) -> list[CurvePoint]:
    """Accuracy after compensation by every criterion, barred from the worst seed to the best."""
    made = [CurvePoint(1.0, statistics.mean(dense), min(dense), max(dense), "dense")]
    made += [
        CurvePoint(budget, statistics.mean(values), min(values), max(values), criterion)
        for (criterion, stage, budget), values in accuracy.items()
        if stage == "compensated"
    ]
    return made


def kept(file: Path, measure: Callable[[], Measured]) -> Measured:
    """What is measured once: read from its file if it is there, else measured and written."""
    if not file.is_file():
        measured = measure()
        write_whole(file, json.dumps(measured) + "\n")
        print(f"{file.stem}: {measured}", flush=True)
    found: Measured = json.loads(file.read_text())
    return found


def percent(share: float) -> str:
    """A share as people write it, whole or not: 50%, 12.5%."""
    return f"{share * 100:g}%"


def spread(values: list[float]) -> float:
    """Standard deviation over seeds; 0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean_and_spread(values: list[float], digits: int = 1) -> str:
    """As in a table: 86.1 ± 0.4."""
    return f"{statistics.mean(values):.{digits}f} ± {spread(values):.{digits}f}"


if __name__ == "__main__":
    main()
