"""hfprune against released competitors: the same dense movie classifiers, calibration sentences,
MACs and test sentences; no training; three seeds.

    python scripts/fetch_quickstart.py && python benchmarks/compare.py

The competitors are Kwon et al. 2022 (their repository), TextPruner 1.1 and Torch-Pruning 1.6.1.
They need transformers 4, and run in a throwaway environment that is made in runs/benchmark-compare/
by the first call. How each is set up is said in its module of benchmarks/competitors/. The dense
classifiers and the figures of hfprune are those of benchmarks/quality.py. All that is measured
stays in runs/: a second call goes on where the first one stopped; remove a folder to measure anew.
It prints a table of accuracies and one of what is left (compare.md), and draws the accuracies
(compare.png).

optipfair 0.4.2 prunes gated FFNs only, which BERT has not: benchmarks/language.py compares with it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from competitors.exchange import Job, Widths
from quality import ROOT, Seed, kept, mean_and_spread, percent

import hfprune
from hfprune.files import write_whole
from hfprune.publishing.figures import draw_curve
from hfprune.publishing.report import CurvePoint
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.cost import layers_macs, layers_params

RUNS = ROOT / "runs" / "benchmark-compare"
REQUIREMENTS = (
    *("torch==2.13.0", "transformers==4.57.6", "huggingface-hub<1", "scipy>=1.11"),
    "torch-pruning==1.6.1",
)
ALONE = ("textpruner==1.1", "optipfair==0.4.2")  # they ask for more than they need here
COLUMNS = ("input_ids", "attention_mask", "labels")
KWON = "https://github.com/WoosukKwon/retraining-free-pruning"
COMMIT = "806ac5a"

COMPETITORS = {
    "kwon": {"kwon": "Kwon et al., mask tuning"},
    "textpruner": {
        "textpruner-uneven": "TextPruner, uneven",
        "textpruner-even": "TextPruner, even",
    },
    "torch_pruning": {
        "torch-pruning-taylor-bottleneck": "Torch-Pruning, Taylor, bottleneck",
        "torch-pruning-taylor-uniform": "Torch-Pruning, Taylor, uniform",
        "torch-pruning-magnitude-bottleneck": "Torch-Pruning, magnitude, bottleneck",
        "torch-pruning-magnitude-uniform": "Torch-Pruning, magnitude, uniform",
    },
}
"""Module of `competitors` -> its methods and their names in the table."""
DRAWN = {
    "hfprune, reconstruction, compensated": "hfprune",
    "Kwon et al., mask tuning": "Kwon et al.",
    "TextPruner, uneven": "TextPruner, uneven",
    "TextPruner, even": "TextPruner, even",
    "Torch-Pruning, Taylor, bottleneck": "Torch-Pruning, Taylor",
    "Torch-Pruning, magnitude, bottleneck": "Torch-Pruning, norm",
}
"""Names in the table -> shorter ones in the figure."""


def main() -> None:
    """Run what is missing, print the tables and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5, 0.35, 0.25])
    parser.add_argument("--criteria", nargs="+", default=["reconstruction", "fisher"])
    parser.add_argument("--competitors", nargs="*", default=list(COMPETITORS), choices=COMPETITORS)
    parser.add_argument(
        "--kwon", default=KWON, help="what git can clone the code of Kwon et al. from"
    )
    arguments = parser.parse_args()
    seeds = [Comparison(seed, arguments.budgets) for seed in arguments.seeds]
    rows: dict[str, list[Result]] = {}
    for comparison in seeds:
        for row, result in comparison.own(arguments.criteria):
            rows.setdefault(row, []).append(result)
    for competitor in arguments.competitors:
        source = cloned(arguments.kwon) if competitor == "kwon" else ""
        for comparison in seeds:
            for row, result in comparison.others(competitor, source):
                rows.setdefault(row, []).append(result)
    dense = [comparison.seed.dense_accuracy for comparison in seeds]
    text = f"{accuracies(rows, dense)}\n{remains(rows)}"
    write_whole(RUNS / "compare.md", text)
    print(text)
    figure = RUNS / "compare.png"
    draw_curve(points(rows, dense), figure)
    print(f"The tables and the curve are in {RUNS.relative_to(ROOT)}/.")


@dataclass(frozen=True)
class Result:
    """One pruned classifier: its budget, test accuracy in percent, shares of the encoder kept."""

    budget: float
    accuracy: float
    macs: float
    params: float


@dataclass
class Comparison:
    """All that is made of one seed's dense classifier."""

    number: int
    budgets: list[float]

    @cached_property
    def seed(self) -> Seed:
        return Seed(self.number, "labels")

    @cached_property
    def folder(self) -> Path:
        folder = RUNS / f"seed-{self.number}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def own(self, criteria: Iterable[str]) -> Iterator[tuple[str, Result]]:
        """What benchmarks/quality.py measures."""
        for criterion in criteria:
            for budget in self.budgets:
                left = self._left(criterion, budget)
                for stage, accuracy in self.seed.untrained(criterion, budget):
                    yield f"hfprune, {criterion}, {stage}", Result(budget, accuracy, **left)

    def others(self, competitor: str, source: str) -> Iterator[tuple[str, Result]]:
        """What a competitor makes of the same."""
        job = self._job(competitor, source)
        for method, row in COMPETITORS[competitor].items():
            for budget in self.budgets:
                if not job.answer(method, budget).is_file():
                    self._run(competitor, job)
                answer = json.loads(job.answer(method, budget).read_text())
                kept = Widths(**answer["widths"])
                yield (
                    row,
                    Result(
                        budget,
                        self._accuracy(answer["logits"]),
                        kept.macs(self.tokens) / self.widths.macs(self.tokens),
                        kept.params() / self.widths.params(),
                    ),
                )

    @cached_property
    def tokens(self) -> int:
        """Length of the sentence whose MACs are counted, as hfprune.plan takes it."""
        lengths = [len(row["input_ids"]) for row in rows_of(self.seed.calibration)]
        return round(statistics.mean(lengths))

    @cached_property
    def widths(self) -> Widths:
        """Of the dense encoder.

        Raises:
            AssertionError: the competitors' costs are not counted as hfprune counts its own.
        """
        config = self.seed.dense.config
        layers = config.num_hidden_layers
        head_size = config.hidden_size // config.num_attention_heads
        widths = Widths(
            config.hidden_size,
            head_size,
            [config.num_attention_heads] * layers,
            [config.intermediate_size] * layers,
        )
        anatomy = Anatomy.of(self.seed.dense)
        assert widths.macs(self.tokens) == layers_macs(anatomy, self.tokens)
        assert widths.params() == layers_params(anatomy)
        return widths

    def _job(self, competitor: str, source: str) -> Job:
        """Write what the competitor reads."""
        calibration, test = self.folder / "calibration.jsonl", self.folder / "test.jsonl"
        write_lines(calibration, rows_of(self.seed.calibration))
        write_lines(test, ({"input_ids": r["input_ids"]} for r in rows_of(self.seed.test)))
        job = Job(
            dense=str(Path(self.seed.recipe.output) / "dense"),
            calibration=str(calibration),
            test=str(test),
            tokens=self.tokens,
            shares=self.budgets,
            output=str(self.folder),
            source=source,
        )
        job.save(self.folder / f"{competitor}.job")
        return job

    def _run(self, competitor: str, job: Job) -> None:
        file = self.folder / f"{competitor}.job"
        print(f"seed {self.number}, {competitor} ...", flush=True)
        command = [environment(), "-m", f"competitors.{competitor}", str(file)]
        subprocess.run(command, cwd=Path(__file__).parent, check=True)

    @cached_property
    def _labels(self) -> list[int]:
        return [row["label"] for row in rows_of(self.seed.test)]

    def _accuracy(self, logits: list[list[float]]) -> float:
        pairs = zip(logits, self._labels, strict=True)
        return 100 * statistics.mean(row.index(max(row)) == label for row, label in pairs)

    def _left(self, criterion: str, budget: float) -> dict[str, float]:
        """Shares of MACs and parameters that hfprune's plan keeps."""

        def shares() -> dict[str, float]:
            plan = hfprune.plan(self.seed.dense, self.seed.scores, f"macs={budget}", criterion)
            return {"macs": plan.macs_share, "params": plan.params_share}

        return kept(self.folder / f"hfprune-{criterion}-{percent(budget)}.json", shares)


def rows_of(batches: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The sentences of padded batches, one by one: token ids and label."""
    for batch in batches:
        for ids, mask, label in zip(*(batch[k] for k in COLUMNS), strict=True):
            yield {"input_ids": ids[mask.bool()].tolist(), "label": int(label)}


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))


def cloned(source: str) -> str:
    """The folder of the code of Kwon et al., cloned by the first call."""
    folder = RUNS / "kwon"
    if not folder.is_dir():
        temporary = RUNS / "kwon.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        if subprocess.run(["git", "clone", "--quiet", source, str(temporary)]).returncode:
            raise SystemExit(f"error: git cannot clone {source}; --kwon takes a folder or address.")
        subprocess.run(["git", "-C", str(temporary), "checkout", "--quiet", COMMIT], check=True)
        temporary.rename(folder)
    return str(folder)


def environment() -> str:
    """The Python of the competitors' environment, which is made by the first call."""
    folder = RUNS / "environment"
    python = folder / "bin" / "python"
    installed = folder / "installed"
    wanted = "\n".join((*REQUIREMENTS, *ALONE))
    if not installed.is_file() or installed.read_text() != wanted:
        print("making the competitors' environment ...", flush=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([*pip, *REQUIREMENTS], check=True)
        subprocess.run([*pip, "--no-deps", *ALONE], check=True)
        installed.write_text(wanted)
    return str(python)


def table(
    title: str, rows: Mapping[str, Sequence[Result]], cell: Callable[[list[Result]], str]
) -> str:
    """Methods in rows, budgets in columns, a cell of the seeds' results in each; Markdown."""
    budgets = sorted({result.budget for results in rows.values() for result in results})[::-1]
    lines = [["MACs kept", *(percent(budget) for budget in budgets)], ["---"] * (len(budgets) + 1)]
    for row, results in rows.items():
        lines.append([row, *(cell([r for r in results if r.budget == b]) for b in budgets)])
    return f"{title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def accuracies(rows: Mapping[str, Sequence[Result]], dense: list[float]) -> str:
    """Mean and spread over the seeds."""
    title = (
        f"Test accuracy (%) at equal MACs of the encoder, mean ± spread of {len(dense)} seeds;"
        f" dense {mean_and_spread(dense)}:"
    )
    return table(title, rows, lambda results: mean_and_spread([r.accuracy for r in results]))


def remains(rows: Mapping[str, Sequence[Result]]) -> str:
    """What the budgets were met by."""

    def shares(results: list[Result]) -> str:
        macs, params = ([r.macs for r in results], [r.params for r in results])
        return f"{100 * statistics.mean(macs):.1f} / {100 * statistics.mean(params):.1f}"

    removed = {
        row: results
        for row, results in rows.items()
        if row.endswith(", removed") or not row.startswith("hfprune")
    }
    return table("MACs / parameters of the encoder that are left (%), mean:", removed, shares)


def points(rows: Mapping[str, Sequence[Result]], dense: list[float]) -> list[CurvePoint]:
    """The drawn methods' accuracies, barred from the worst seed to the best."""
    made = [CurvePoint(1.0, statistics.mean(dense), min(dense), max(dense), "dense")]
    for row in (row for row in DRAWN if row in rows):
        for budget in {result.budget for result in rows[row]}:
            values = [r.accuracy for r in rows[row] if r.budget == budget]
            ends = min(values), max(values)
            made.append(CurvePoint(budget, statistics.mean(values), *ends, DRAWN[row]))
    return made


if __name__ == "__main__":
    main()
