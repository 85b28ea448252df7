"""Quality against cost on the MiniLM movie classifier: seeds x budgets, with and without what
recovers it.

    python scripts/fetch_quickstart.py && python benchmarks/quality.py

prints, for every budget of the encoder's MACs, the points of test accuracy lost against the dense
model: after removal alone, after compensation, and after distillation for the budgets in --distill;
mean and spread over the seeds. Random and magnitude stand beside the chosen criterion: what does
not beat them is not worth its time. Every seed fine-tunes its own dense classifier once and keeps
it in runs/benchmark-quality/, so that a second call starts from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hfprune.evaluation.evaluate import evaluate_classification
from hfprune.pipeline import run
from hfprune.recipe import Recipe

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "benchmark-quality"


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5, 0.35, 0.25])
    parser.add_argument("--distill", type=float, nargs="*", default=[0.5, 0.25])
    parser.add_argument("--criteria", nargs="+", default=["fisher", "magnitude", "random"])
    parser.add_argument("--losses", nargs="+", default=["labels", "logits"])
    arguments = parser.parse_args()
    lost: dict[tuple[float, str], list[float]] = {}
    for seed in arguments.seeds:
        for budget in arguments.budgets:
            for loss, criterion in ways(arguments.losses, arguments.criteria):
                first = (loss, criterion) == (arguments.losses[0], arguments.criteria[0])
                distill = first and budget in arguments.distill
                name = f"{criterion} of {loss}" if criterion == "fisher" else criterion
                for stage, points in one(seed, budget, loss, criterion, distill).items():
                    lost.setdefault((budget, f"{name}, {stage}"), []).append(points)
    show(lost, len(arguments.seeds))


def ways(losses: list[str], criteria: list[str]) -> list[tuple[str, str]]:
    """Every criterion, and for those that read gradients every loss."""
    blind = {"magnitude", "random"}
    return [(o, c) for c in criteria for o in (losses[:1] if c in blind else losses)]


def one(seed: int, budget: float, loss: str, criterion: str, distill: bool) -> dict[str, float]:
    """Points of test accuracy lost at each stage of one run, kept in a JSON file beside it."""
    base = Recipe.load(ROOT / "recipes" / "minilm" / "movie.yaml")
    recipe = dataclasses.replace(
        base,
        output=str(RUNS / f"seed-{seed}"),
        seed=seed,
        score=dataclasses.replace(base.score, loss=loss),
        prune=dataclasses.replace(base.prune, budget=f"macs={budget:.0%}", criterion=criterion),
        distill=base.distill if distill else None,
    )
    ending = "-distilled" if distill else ""
    kept = RUNS / f"seed-{seed}-{criterion}-{loss}-{budget:.0%}{ending}.json"
    if not kept.is_file():
        last = "distilled" if distill else "compensated"
        stages = ["dense", "pruned", "compensated"] + (["distilled"] if distill else [])
        quality = judge(recipe, stages, last)
        kept.write_text(json.dumps({s: 100 * (quality["dense"] - quality[s]) for s in stages[1:]}))
    return dict(json.loads(kept.read_text()))


def judge(recipe: Recipe, stages: list[str], last: str) -> dict[str, float]:
    """Test accuracy of every stage of a run."""
    from hfprune.data import Batches
    from hfprune.pipeline import evaluation_batches
    from hfprune.structure.checkpoint import from_pretrained

    run(recipe, until=last)
    batches: Batches = evaluation_batches(recipe)
    folder = Path(recipe.output)
    return {
        stage: evaluate_classification(from_pretrained(folder / stage), batches).value
        for stage in stages
    }


def show(lost: dict[tuple[float, str], list[float]], seeds: int) -> None:
    """Print the table: budgets in rows, criteria and stages in columns."""
    budgets = sorted({budget for budget, _ in lost}, reverse=True)
    columns = list(dict.fromkeys(column for _, column in lost))
    table = Table(
        "MACs kept", *columns, title=f"Points of accuracy lost, mean ± spread of {seeds} seeds"
    )
    for budget in budgets:
        cells = []
        for column in columns:
            values = lost.get((budget, column), [])
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}" if values else "")
        table.add_row(f"{budget:.0%}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
