"""The report: dense and pruned models side by side, nothing estimated shown as measured.

This file holds what a run found and says it in words and tables; `figures` draws it and `page` puts
both on a page.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfprune.evaluation.evaluate import Difference, Quality
from hfprune.evaluation.measure import Measurement
from hfprune.files import sha256_of
from hfprune.importance.diagnosis import ALIKE
from hfprune.publishing.units import Pruning
from hfprune.publishing.wording import (
    megabytes,
    millijoules,
    milliseconds,
    points,
    smaller,
    table_row,
    to_dense,
    verdict,
    with_interval,
)
from hfprune.structure.cost import Tokens, written_tokens

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Judged:
    """A model on some data: its quality, and its difference to the dense model on the same
    examples; None for the dense model.
    """

    quality: Quality
    difference: Difference | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        difference = None if self.difference is None else asdict(self.difference)
        return {"quality": self.quality.to_dict(), "difference": difference}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Judged:
        """The inverse of `to_dict`."""
        difference = values["difference"]
        return Judged(
            Quality.from_dict(values["quality"]),
            None if difference is None else Difference.from_dict(difference),
        )


@dataclass(frozen=True)
class Variant:
    """One model of a run.

    Attributes:
        name: "dense", "pruned", "compensated" or "distilled".
        quality: on the test split.
        difference: to the dense model on the same examples; None for the dense model.
        params: parameters of the whole model, tied ones counted once.
        macs: of one forward pass over one example, counted on the real model.
        measured: latency, memory, file size and energy.
        weights: {file: sha256} of the weights, as `weights_of` reads them: a report that lies
            beside other weights is not of that model. {} where they were not saved.
        also: on data of other kinds, by their names in the recipe.
    """

    name: str
    quality: Quality
    difference: Difference | None
    params: int
    macs: int
    measured: Measurement
    weights: Mapping[str, str] = field(default_factory=dict)
    also: Mapping[str, Judged] = field(default_factory=dict)


@dataclass(frozen=True)
class CurvePoint:
    """Quality at one cost, in a series of points.

    Attributes:
        budget: share of the cost that stays, of a run's report of the layers' MACs; 1 is dense.
        mean: the quality there; over seeds, if there are several.
        low, high: ends of its error bar.
        series: "dense", or what chose the units: "fisher", "magnitude", "random" ...
    """

    budget: float
    mean: float
    low: float
    high: float
    series: str


@dataclass(frozen=True)
class Fact:
    """One figure of the headline: what it is of, the figure, and what to know about it."""

    title: str
    value: str
    note: str


@dataclass(frozen=True)
class Report:
    """What a run found.

    Attributes:
        variants: the models, dense first, the run's result last.
        tokens: length of the example whose MACs are counted; one per stack where they differ.
        machine: what it was measured on: processor, threads, versions.
        seconds: {artefact: seconds of the step that made it}.
        pruning: what was removed; None in a report that an older hfprune wrote.
        recipe: the recipe as plain values.
        curve: quality over budgets, where more than one was tried.
        energy: {artefact: joules that the processors drew in the step that made it}, of the steps
            up to the last model; {} where one of them could not be read.
        carbon_intensity: grams of CO2 equivalent per kWh, as the recipe says.
        seen: share of the test texts that stand in the training split, too.
    """

    variants: tuple[Variant, ...]
    tokens: Tokens
    machine: Mapping[str, str]
    seconds: Mapping[str, float]
    pruning: Pruning | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    energy: Mapping[str, float] = field(default_factory=dict)
    carbon_intensity: float | None = None
    seen: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "variants": [
                {
                    **{key: getattr(v, key) for key in ("name", "params", "macs")},
                    "quality": v.quality.to_dict(),
                    "difference": None if v.difference is None else asdict(v.difference),
                    "measured": v.measured.to_dict(),
                    "weights": dict(v.weights),
                    "also": {name: judged.to_dict() for name, judged in v.also.items()},
                }
                for v in self.variants
            ],
            "tokens": self.tokens,
            "machine": dict(self.machine),
            "seconds": dict(self.seconds),
            "pruning": None if self.pruning is None else asdict(self.pruning),
            "recipe": dict(self.recipe),
            "curve": [asdict(point) for point in self.curve],
            "energy": dict(self.energy),
            "carbon_intensity": self.carbon_intensity,
            "seen": self.seen,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`."""
        variants = tuple(
            Variant(
                name=v["name"],
                quality=Quality.from_dict(v["quality"]),
                difference=None if v["difference"] is None else Difference(**v["difference"]),
                params=v["params"],
                macs=v["macs"],
                measured=Measurement.from_dict(v["measured"]),
                weights=v.get("weights", {}),
                also={name: Judged.from_dict(j) for name, j in v.get("also", {}).items()},
            )
            for v in values["variants"]
        )
        pruning = values.get("pruning")
        return Report(
            variants,
            tuple(tokens) if isinstance(tokens := values["tokens"], list) else tokens,
            values["machine"],
            values["seconds"],
            Pruning.from_dict(pruning) if pruning else None,
            values.get("recipe", {}),
            tuple(CurvePoint(**point) for point in values.get("curve", ())),
            values.get("energy", {}),
            values.get("carbon_intensity"),
            values.get("seen", 0.0),
        )

    @property
    def dense(self) -> Variant:
        """What the run began with."""
        return self.variants[0]

    @property
    def result(self) -> Variant:
        """What the run ended with."""
        return self.variants[-1]

    @property
    def structures(self) -> list[Variant]:
        """One variant of each structure, the last: refitted and distilled weights run alike."""
        return list({(v.params, v.macs): v for v in self.variants}.values())

    @property
    def kilowatt_hours(self) -> float | None:
        """What the processors drew up to the last model; None where it was not read."""
        return sum(self.energy.values()) / 3.6e6 if self.energy else None

    @property
    def emissions(self) -> float | None:
        """Grams of CO2 equivalent of that energy; None where one of the two is not known."""
        if self.kilowatt_hours is None or self.carbon_intensity is None:
            return None
        return self.kilowatt_hours * self.carbon_intensity

    def cells(self) -> list[list[str]]:
        """The side-by-side table as text: a header row, then one row per variant."""
        sizes = sorted(self.dense.measured.latency)
        energy = any(v.measured.energy_per_example is not None for v in self.variants)
        header = [
            "model",
            f"{self.dense.quality.metric} [95 %]",
            "vs dense [95 %]",
            *self.dense.quality.beside,
            *(title for name in self.dense.also for title in (f"on {name} [95 %]", "vs dense")),
            "parameters",
            f"MACs ({written_tokens(self.tokens)} tokens)",
            "file",
            *(f"latency, batch {size}" for size in sizes),
            *(["energy per example"] if energy else []),
            "peak memory",
        ]
        rows = [header]
        for v in self.variants:
            rows.append(
                [
                    v.name,
                    with_interval(v.quality),
                    to_dense(v.difference),
                    *(f"{value:.1%}" for value in v.quality.beside.values()),
                    *(
                        cell
                        for judged in v.also.values()
                        for cell in (with_interval(judged.quality), to_dense(judged.difference))
                    ),
                    f"{v.params / 1e6:.2f} M",
                    f"{v.macs / 1e6:,.0f} M",
                    megabytes(v.measured.file_bytes),
                    *(milliseconds(v.measured.latency[size].median) for size in sizes),
                    *([millijoules(v.measured.energy_per_example)] if energy else []),
                    megabytes(v.measured.peak_memory),
                ]
            )
        return rows

    def table(self) -> Table:
        """The side-by-side table for a terminal."""
        from rich.markup import escape
        from rich.table import Table

        header, *rows = ([escape(cell) for cell in row] for row in self.cells())
        table = Table(*header, title="Dense and pruned, side by side")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The headline, the side-by-side table, how it was measured and what to beware of, as
        Markdown.
        """
        header, *rows = self.cells()
        lines = [
            *(f"- **{fact.title}: {fact.value}.** {fact.note}" for fact in self.facts()),
            "",
            table_row(header),
            "|" + "---|" + "---:|" * (len(header) - 1),
            *map(table_row, rows),
            "",
            self.caption(),
            "",
            *(f"- {caveat}" for caveat in self.caveats()),
        ]
        return "\n".join(lines) + "\n"

    def caption(self) -> str:
        """How the figures came about, in few sentences."""
        repeats = next(iter(self.dense.measured.latency.values())).repeats
        machine = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        seen = (
            f" {self.seen:.1%} of the test texts also stand in the training split."
            if self.seen
            else ""
        )
        return (
            f"{self.dense.quality.examples:,} test examples, bootstrap intervals (paired in the"
            f" comparison with dense).{seen} MACs counted by torch, whole model. Latency: median of"
            f" {repeats} interleaved runs; peak memory: loading and one forward pass in a fresh"
            f" process. {machine}."
        )

    def facts(self) -> list[Fact]:
        """The headline: what was removed, what it costs in quality, what it gains."""
        dense, result = self.dense, self.result
        if result.difference is None:
            return []
        return [
            Fact(
                "Removed",
                f"{1 - result.macs / dense.macs:.0%} of the MACs",
                f"{1 - result.params / dense.params:.0%} of the parameters of the whole model."
                + self._units(),
            ),
            Fact(
                "Quality",
                points(result.difference),
                verdict(dense.quality, result.quality, result.difference),
            ),
            *(
                Fact(
                    f"Quality on {name}",
                    points(judged.difference),
                    verdict(dense.also[name].quality, judged.quality, judged.difference),
                )
                for name, judged in result.also.items()
                if judged.difference is not None
            ),
            *self._speed(),
            Fact("Size", *smaller(dense.measured, result.measured)),
        ]

    def caveats(self) -> list[str]:
        """What the figures do not say by themselves."""
        quality, measured = self.result.quality, self.result.measured
        half = (quality.high - quality.low) / 2
        about = f"{half:,.2f}" if quality.metric == "perplexity" else f"{100 * half:.1f} points"
        found = [
            f"Noise: with {quality.examples:,} test examples the {quality.metric} of one model is"
            f" known to about ±{about}. The intervals hold the chance of the test examples"
            " only; another seed of training would add its own.",
        ]
        if self.pruning:
            found.append(self._calibration(self.pruning))
        found += [
            f"One machine: latency and memory were measured on {measured.device} with"
            f" {measured.threads} thread{'s' * (measured.threads != 1)}. Another processor, another"
            " runtime or other batch shapes give other ratios, and latency follows MACs only"
            " roughly.",
            *self._overlaps(),
            "Energy was not measured: this machine lets no hardware counter be read, and an"
            " estimate would be no measurement."
            if measured.energy_per_example is None
            else "Energy is what the processor packages drew in all while the model ran, other"
            " programs included.",
            "The quality is of this task and this test split. Pruned for one task, a model can be"
            " much worse at others, and at groups of examples that are rare here.",
        ]
        if measured.peak_memory is None:
            found.append("Peak memory could not be read on this machine.")
        return found

    def _units(self) -> str:
        if not self.pruning:
            return ""
        counts = [(kind, *self.pruning.count(kind)) for kind in self.pruning.kinds]
        stay = " and ".join(f"{kept:,} of {total:,} {kind}s" for kind, kept, total in counts)
        return f" {stay} stay, chosen by {self.pruning.criterion} under {self.pruning.budget}."

    def _speed(self) -> list[Fact]:
        before, after = (v.measured.latency for v in (self.dense, self.result))
        *others, largest = (
            (size, before[size].median, after[size].median) for size in sorted(before)
        )
        size, was, now = largest
        note = f"A batch of {size}: {milliseconds(now)}, dense {milliseconds(was)}."
        note += "".join(f" {was / now:.1f} times at batch {size}." for size, was, now in others)
        return [Fact("Speed", f"{was / now:.1f} times as fast", note)]

    def _calibration(self, pruning: Pruning) -> str:
        said = (
            f"Calibration: importance was measured on {pruning.examples:,} training examples of"
            f" {written_tokens(pruning.tokens)} tokens on average."
        )
        if pruning.agreement is None:
            return f"{said} {pruning.criterion} reads no gradients of them."
        said += (
            " The two halves of them rank the units alike to"
            f" {pruning.agreement:.2f} (Spearman; 1 is equal)."
        )
        few = pruning.agreement < ALIKE
        return f"{said} More examples would change the plan." if few else said

    def _overlaps(self) -> list[str]:
        """Where the middle halves of the timed runs of dense and result overlap."""
        before, after = (v.measured.latency for v in (self.dense, self.result))
        sizes = [size for size in sorted(before) if after[size].high >= before[size].low]
        if not sizes:
            return []
        listed = ", ".join(map(str, sizes))
        return [
            f"At batch {listed} the middle halves of the timed runs of the dense model and of the"
            " result overlap: the difference there is within the noise of this machine."
        ]


def weights_of(folder: str | os.PathLike[str]) -> dict[str, str]:
    """{file: sha256} of a saved model's weights."""
    return {path.name: sha256_of(path) for path in sorted(Path(folder).glob("*.safetensors"))}
