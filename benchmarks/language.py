"""Perplexity against parameters on Gemma 3 270m: budgets x criteria without training, and after the
recipe's short distillation, on text of the calibration's kind and of another.

    python scripts/fetch_quickstart.py gemma3-270m movie movie-text editorial-text
    python benchmarks/language.py

prints, for every budget of the layers' parameters, the perplexity after removal, after compensation
and, by the recipe's criterion where --distill names the budget, after distillation; and draws it as
a share of the dense model's. optipfair 0.4.2 stands beside it at equal parameters, run in the
environment of benchmarks/compare.py. All that is measured stays in
runs/benchmark-language/: a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from compare import environment
from quality import ROOT, kept, percent
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

import hfprune
from hfprune.evaluation.evaluate import evaluate_perplexity
from hfprune.files import write_whole
from hfprune.importance.batches import Batch
from hfprune.pipeline import calibration_batches, evaluation_batches, run
from hfprune.processes import Processes
from hfprune.publishing.figures import draw_curve
from hfprune.publishing.report import CurvePoint
from hfprune.recipe import Recipe
from hfprune.steps import Steps
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.cost import layers_params

RUNS = ROOT / "runs" / "benchmark-language"

OPTIPFAIR = {
    "optipfair-maw": "optipfair, MAW",
    "optipfair-maw-data": "optipfair, MAW with activations",
}
"""Method of `competitors.optipfair` -> its name in the table."""

Key = tuple[str, float]  # method, budget
Perplexity = dict[str, float]  # by the text's kind


def main() -> None:
    """Run what is missing, print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument(
        "--criteria",
        nargs="+",
        default=["reconstruction", "fisher", "activation", "magnitude"],
    )
    parser.add_argument("--distill", type=float, nargs="*", default=[0.8], metavar="BUDGET")
    parser.add_argument("--optipfair", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--blocks", type=int, help="test blocks of each kind at most")
    arguments = parser.parse_args()
    gemma = Gemma(arguments.blocks)
    dense = gemma.dense_perplexity
    found: dict[Key, Perplexity] = {}
    for criterion in arguments.criteria:
        for budget in arguments.budgets:
            for stage, values in gemma.pruned(criterion, budget).items():
                found[f"{criterion}, {stage}", budget] = values
    criterion = gemma.recipe.prune.criterion
    for budget in arguments.distill:
        found[f"{criterion}, distilled", budget] = gemma.distilled(criterion, budget)
    if arguments.optipfair:
        for method, budget, values in gemma.optipfair(arguments.budgets):
            found[method, budget] = values
    for kind in dense:
        Console().print(table(kind, dense, found))
    figure = RUNS / "language.png"
    draw_curve(
        list(points(dense, found)),
        figure,
        quality="perplexity (1 = dense)",
        cost="parameters of the layers",
    )
    print(f"The curve is in {figure.relative_to(ROOT)}.")


class Gemma:
    """The dense model, and the perplexity of what is made of it.

    Args:
        blocks: test blocks of each kind at most; None for all.
    """

    def __init__(self, blocks: int | None) -> None:
        self.blocks = blocks
        base = Recipe.load(ROOT / "recipes" / "gemma3" / "270m-movie.yaml")
        self.recipe = dataclasses.replace(base, output=str(RUNS / "run"))

    @cached_property
    def dense(self) -> PreTrainedModel:
        run(self.recipe, until="dense")
        return hfprune.from_pretrained(Path(self.recipe.output) / "dense")

    @cached_property
    def calibration(self) -> list[Batch]:
        return calibration_batches(self.recipe)

    @cached_property
    def test(self) -> dict[str, list[Batch]]:
        """Test batches, by the text's kind."""
        files = {"movie": self.recipe.data.test, **self.recipe.measure.also}
        made = {}
        for kind, file in files.items():
            data = dataclasses.replace(self.recipe.data, test=file)
            batches = evaluation_batches(dataclasses.replace(self.recipe, data=data))
            size = self.recipe.score.batch_size
            made[kind] = list(islice(batches, self.blocks and -(-self.blocks // size)))
        return made

    @cached_property
    def scores(self) -> hfprune.Scores:
        folder = RUNS / "scores"
        if not (folder / "scores.safetensors").is_file():
            hfprune.score(self.dense, self.calibration).save(folder)
        return hfprune.Scores.load(folder)

    @property
    def dense_perplexity(self) -> Perplexity:
        return self._kept("dense", lambda: {"dense": self._judge(self.dense)})["dense"]

    def pruned(self, criterion: str, budget: float) -> dict[str, Perplexity]:
        """After removal, and after compensation."""

        def measure() -> dict[str, Perplexity]:
            plan = self._plan(criterion, budget)
            smaller = hfprune.remove(self.dense, plan)
            removed = self._judge(smaller)
            hfprune.compensate(self.dense, smaller, self.calibration, plan.keep)
            return {"removed": removed, "compensated": self._judge(smaller)}

        return self._kept(f"{criterion}-{percent(budget)}", measure)

    def distilled(self, criterion: str, budget: float) -> Perplexity:
        """After compensation and the recipe's distillation."""
        name = f"{criterion}-{percent(budget)}-distilled"

        def measure() -> dict[str, Perplexity]:
            plan = self._plan(criterion, budget)
            student = hfprune.remove(self.dense, plan, compensate=self.calibration)
            training = Steps(self.recipe, print, Processes()).training
            training.distil(student, self.dense, plan.layer_map, RUNS / f"{name}-checkpoints")
            return {"distilled": self._judge(student)}

        return self._kept(name, measure)["distilled"]

    def optipfair(self, budgets: list[float]) -> Iterator[tuple[str, float, Perplexity]]:
        """What optipfair makes of the same, all parameters taken from the FFNs."""
        anatomy = Anatomy.of(self.dense)
        neurons = [group for group in anatomy if group.kind == "neuron"]
        everything = layers_params(anatomy)
        without = layers_params(anatomy, {group.name: () for group in neurons})
        removed = {percent(b): (1 - b) * everything / (everything - without) for b in budgets}
        job = {
            "dense": str(Path(self.recipe.output) / "dense"),
            "calibration": torch.cat([b["input_ids"] for b in self.calibration]).tolist(),
            "removed": removed,
            "output": str(RUNS),
        }
        write_whole(RUNS / "optipfair.job", json.dumps(job) + "\n")
        if not all((RUNS / f"{method}-{b}").is_dir() for method in OPTIPFAIR for b in removed):
            command = [environment(), "-m", "competitors.optipfair", str(RUNS / "optipfair.job")]
            subprocess.run(command, cwd=Path(__file__).parent, check=True)
        for method, row in OPTIPFAIR.items():
            for budget in budgets:
                folder = RUNS / f"{method}-{percent(budget)}"

                def measure(folder: Path = folder, budget: float = budget) -> dict[str, Perplexity]:
                    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                    share = layers_params(Anatomy.of(model)) / everything
                    assert abs(share - budget) < 0.002, f"{folder.name} keeps {share:.2%}"
                    return {"removed": self._judge(model)}

                yield row, budget, self._kept(folder.name, measure)["removed"]

    def _plan(self, criterion: str, budget: float) -> hfprune.PruningPlan:
        return hfprune.plan(self.dense, self.scores, f"params={budget}", criterion)

    def _judge(self, model: PreTrainedModel) -> Perplexity:
        return {kind: evaluate_perplexity(model, data).value for kind, data in self.test.items()}

    def _kept(
        self, name: str, measure: Callable[[], dict[str, Perplexity]]
    ) -> dict[str, Perplexity]:
        return kept(RUNS / f"{name}-{self.blocks or 'all'}.json", measure)


def table(kind: str, dense: Perplexity, found: dict[Key, Perplexity]) -> Table:
    """Methods in rows, budgets in columns: perplexity on one kind of text, and over the dense's."""
    budgets = sorted({budget for _, budget in found}, reverse=True)
    title = f"Perplexity on {kind} text (dense {dense[kind]:.1f}), by parameters kept"
    made = Table("method", *(percent(budget) for budget in budgets), title=title)
    for method in dict.fromkeys(method for method, _ in found):
        values = [found.get((method, budget), {}).get(kind) for budget in budgets]
        made.add_row(method, *(f"{v:.1f} ({v / dense[kind]:.3f})" if v else "" for v in values))
    return made


def points(dense: Perplexity, found: dict[Key, Perplexity]) -> Iterator[CurvePoint]:
    """Perplexity over the dense model's on both kinds, of what is not only removed."""
    yield CurvePoint(1.0, 1.0, 1.0, 1.0, "dense")
    for (method, budget), values in found.items():
        if not method.endswith(", removed"):
            for kind, value in values.items():
                ratio = value / dense[kind]
                yield CurvePoint(budget, ratio, ratio, ratio, f"{method}, {kind}")


if __name__ == "__main__":
    main()
