"""What recovery gives back, on the MiniLM movie classifier: the recipe's distillation against other
ways to as small a model, at the same number of training steps.

    python scripts/fetch_quickstart.py && python benchmarks/recovery.py

prints, for every budget of the encoder's MACs, the points of test accuracy lost against the dense
model, mean and spread over the seeds, and the minutes of CPU time that training took; two cores
need half as long. It draws accuracy over MACs with error bars from the worst seed to the best. The
ways:

- compensated: no training; where the next two begin.
- distilled: as the recipe says.
- no teacher: the same start, trained on the labels alone.
- random: heads and neurons chosen at random, compensated, and the same distillation.
- truncated: whole layers, evenly spaced (DistilBERT), and the same distillation; drawn at the MACs
  that they have, which are near the budget only where whole layers are.
- rounds: two rounds of scoring, pruning, compensating and distilling, of half the steps each.
- gradual: pruned during the same distillation, from the dense model.

Every seed fine-tunes its own dense classifier once, the one of benchmarks/quality.py. All that is
measured stays in runs/benchmark-recovery/, by the recipe's distillation settings: a second call
goes on where the first one stopped, within a training from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cached_property

from quality import ROOT, Seed, kept, mean_and_spread, percent
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, TrainerCallback

import hfprune
from hfprune.evaluation.evaluate import evaluate_classification
from hfprune.files import write_whole
from hfprune.planning.budget import Budget
from hfprune.processes import Processes
from hfprune.publishing.figures import draw_curve
from hfprune.publishing.report import CurvePoint
from hfprune.recipe import Distill
from hfprune.rounds import budget_on_given
from hfprune.steps import Steps
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.cost import layers_macs

RUNS = ROOT / "runs" / "benchmark-recovery"

Measured = dict[str, float]  # macs: a share; accuracy and lost: percent; minutes: of CPU time


def main() -> None:
    """Run what is asked for, print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.12])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    arguments = parser.parse_args()
    table: dict[tuple[str, float], list[Measured]] = {}
    dense = []
    for seed in arguments.seeds:
        bench = Bench(Seed(seed, "labels"))
        dense.append(bench.seed.dense_accuracy)
        for way in arguments.ways:
            for budget in arguments.budgets:
                table.setdefault((way, budget), []).append(bench.measured(way, budget))
    show(table, dense)
    figure = RUNS / "recovery.png"
    draw_curve(points(table, dense), figure)
    print(f"The figure is in {figure.relative_to(ROOT)}.")


class Bench:
    """One seed's dense classifier and the ways to a smaller one."""

    def __init__(self, seed: Seed) -> None:
        assert seed.recipe.distill is not None
        self.seed = seed
        self.settings: Distill = seed.recipe.distill
        self.steps = Steps(seed.recipe, print, Processes())
        settings = json.dumps(dataclasses.asdict(self.settings), sort_keys=True)
        self.folder = RUNS / hashlib.sha256(settings.encode()).hexdigest()[:8]
        self.minutes, self.checkpoints = 0.0, self.folder  # of the way that is being measured
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "settings.json", settings + "\n")

    @cached_property
    def anatomy(self) -> Anatomy:
        return Anatomy.of(self.seed.dense)

    def measured(self, way: str, budget: float) -> Measured:
        """The cost and the accuracy of one way's model, from the disk if it was measured before."""
        name = f"seed-{self.seed.seed}-{way.replace(' ', '-')}-{percent(budget)}"
        checkpoints = self.folder / f"{name}-checkpoints"

        def measure() -> Measured:
            self.minutes, self.checkpoints = 0.0, checkpoints
            model = WAYS[way](self, budget)
            accuracy = 100 * evaluate_classification(model, self.seed.test).value
            return {
                "macs": layers_macs(Anatomy.of(model), self.tokens)
                / layers_macs(self.anatomy, self.tokens),
                "accuracy": accuracy,
                "lost": self.seed.dense_accuracy - accuracy,
                "minutes": self.minutes,
            }

        found = kept(self.folder / f"{name}.json", measure)
        shutil.rmtree(checkpoints, ignore_errors=True)
        return found

    @property
    def tokens(self) -> int:
        """Length of the example whose MACs are counted."""
        return round(self.seed.scores.tokens[0])

    def compensated(self, budget: float, criterion: str = "") -> PreTrainedModel:
        """The pruned model without training, by the recipe's criterion if none is given."""
        criterion = criterion or self.seed.recipe.prune.criterion
        plan = hfprune.plan(self.seed.dense, self.seed.scores, f"macs={budget}", criterion)
        return hfprune.remove(self.seed.dense, plan, compensate=self.seed.calibration)

    def distilled(
        self,
        student: PreTrainedModel,
        *,
        layer_map: Sequence[int] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        part: str = "",
        **changes: float,
    ) -> PreTrainedModel:
        """The student after the recipe's distillation, with changes to its settings."""
        settings = dataclasses.replace(self.settings, **changes)
        recipe = dataclasses.replace(self.seed.recipe, distill=settings)
        training = dataclasses.replace(self.steps.training, recipe=recipe)
        start = time.process_time()
        training.distil(
            student, self.seed.dense, layer_map, self.checkpoints / part, callbacks=callbacks
        )
        self.minutes += (time.process_time() - start) / 60
        return student

    def without_teacher(self, budget: float) -> PreTrainedModel:
        student = self.compensated(budget)
        return self.distilled(student, task_weight=1.0, logits_weight=0.0, hidden_weight=0.0)

    def truncated(self, budget: float) -> PreTrainedModel:
        """The whole layers nearest to the budget, the first and the last among them."""
        (stack,) = self.anatomy.stacks
        count = max(1, round(budget * stack.units))
        kept = tuple(round(n * (stack.units - 1) / max(1, count - 1)) for n in range(count))
        keep = {g.name: tuple(range(g.units)) if g.layer in kept else () for g in self.anatomy}
        plan = hfprune.PruningPlan(
            self.anatomy,
            {**keep, stack.name: kept},
            Budget.parse(f"macs={count / stack.units}"),
            "truncation",
            self.tokens,
        )
        student = hfprune.remove(self.seed.dense, plan)
        return self.distilled(student, layer_map=plan.layer_map)

    def in_rounds(self, budget: float) -> PreTrainedModel:
        """Two rounds, each of which keeps the same share of what it is given."""
        model, scores, shares = self.seed.dense, self.seed.scores, (budget**0.5, budget)
        for share in shares:
            if share != shares[0]:
                scores = hfprune.score(model, self.seed.calibration, seed=self.seed.seed)
            limit = budget_on_given(Budget.parse(f"macs={share}"), self.anatomy, self.tokens)
            plan = hfprune.plan(model, scores, limit, self.seed.recipe.prune.criterion)
            model = hfprune.remove(model, plan, compensate=self.seed.calibration)
            epochs = self.settings.epochs / len(shares)
            self.distilled(model, part=f"{share:.0%}", epochs=epochs)
        return model

    def gradually(self, budget: float) -> PreTrainedModel:
        student = copy.deepcopy(self.seed.dense)
        gradual = hfprune.GradualPruning(f"macs={budget}", tokens=self.tokens)
        return self.distilled(student, callbacks=[gradual])


WAYS: dict[str, Callable[[Bench, float], PreTrainedModel]] = {
    "compensated": Bench.compensated,
    "distilled": lambda bench, budget: bench.distilled(bench.compensated(budget)),
    "no teacher": Bench.without_teacher,
    "random": lambda bench, budget: bench.distilled(bench.compensated(budget, "random")),
    "truncated": Bench.truncated,
    "rounds": Bench.in_rounds,
    "gradual": Bench.gradually,
}


def show(table: dict[tuple[str, float], list[Measured]], dense: list[float]) -> None:
    """Print the table: ways in rows, budgets in columns."""
    budgets = list(dict.fromkeys(budget for _, budget in table))
    title = (
        f"Points of test accuracy lost, mean ± spread of {len(dense)} seeds (CPU minutes of"
        f" training); dense {mean_and_spread(dense)} %"
    )
    printed = Table("way", *(f"{percent(budget)} of the MACs" for budget in budgets), title=title)
    for way in dict.fromkeys(way for way, _ in table):
        cells = []
        for budget in budgets:
            found = table[way, budget]
            share, minutes = (statistics.mean(m[key] for m in found) for key in ("macs", "minutes"))
            cell = mean_and_spread([m["lost"] for m in found])
            cell += f" at {share:.0%}" * (abs(share / budget - 1) > 0.02)
            cells.append(cell + f" ({minutes:.1f})" * (minutes > 0))
        printed.add_row(way, *cells)
    Console().print(printed)


def points(table: dict[tuple[str, float], list[Measured]], dense: list[float]) -> list[CurvePoint]:
    """Accuracy of every way, barred from the worst seed to the best."""
    made = [CurvePoint(1.0, statistics.mean(dense), min(dense), max(dense), "dense")]
    for (way, _), found in table.items():
        accuracy = [m["accuracy"] for m in found]
        share = statistics.mean(m["macs"] for m in found)
        made.append(CurvePoint(share, statistics.mean(accuracy), min(accuracy), max(accuracy), way))
    return made


if __name__ == "__main__":
    main()
