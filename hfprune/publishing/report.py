"""The report: dense and pruned models side by side, nothing estimated shown as measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hfprune.evaluation.evaluate import Difference, Quality
from hfprune.evaluation.measure import Measurement

if TYPE_CHECKING:
    from rich.table import Table


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
    """

    name: str
    quality: Quality
    difference: Difference | None
    params: int
    macs: int
    measured: Measurement


@dataclass(frozen=True)
class Report:
    """What a run found.

    Attributes:
        variants: the models, dense first.
        tokens: length of the example whose MACs are counted.
        machine: what it was measured on: processor, threads, versions.
        seconds: {step: seconds}, of this run's steps.
    """

    variants: tuple[Variant, ...]
    tokens: int
    machine: Mapping[str, str]
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "variants": [
                {
                    **{key: getattr(v, key) for key in ("name", "params", "macs")},
                    "quality": v.quality.to_dict(),
                    "difference": None if v.difference is None else asdict(v.difference),
                    "measured": v.measured.to_dict(),
                }
                for v in self.variants
            ],
            "tokens": self.tokens,
            "machine": dict(self.machine),
            "seconds": dict(self.seconds),
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
            )
            for v in values["variants"]
        )
        return Report(variants, values["tokens"], values["machine"], values["seconds"])

    def cells(self) -> list[list[str]]:
        """The side-by-side table as text: a header row, then one row per variant."""
        first = self.variants[0]
        sizes = sorted(first.measured.latency)
        metric = first.quality.metric
        header = [
            "model",
            f"{metric} [95 %]",
            "vs dense [95 %]",
            "parameters",
            f"MACs ({self.tokens} tokens)",
            "file",
            *(f"latency, batch {size}" for size in sizes),
            "peak memory",
        ]
        rows = [header]
        for v in self.variants:
            rows.append(
                [
                    v.name,
                    _quality(v.quality),
                    _difference(v.difference),
                    f"{v.params / 1e6:.2f} M",
                    f"{v.macs / 1e6:,.0f} M",
                    _bytes(v.measured.file_bytes),
                    *(f"{v.measured.latency[size].median * 1e3:.1f} ms" for size in sizes),
                    _bytes(v.measured.peak_memory),
                ]
            )
        return rows

    def table(self) -> Table:
        """The side-by-side table for a terminal."""
        from rich.table import Table

        header, *rows = self.cells()
        table = Table(*(h for h in header), title="Dense and pruned, side by side")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The side-by-side table and how it was measured, as Markdown."""
        header, *rows = self.cells()
        lines = [
            "| " + " | ".join(header) + " |",
            "|" + "---|" + "---:|" * (len(header) - 1),
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
            self.caption(),
        ]
        return "\n".join(lines) + "\n"

    def caption(self) -> str:
        """How the figures came about, in two sentences."""
        first = self.variants[0]
        repeats = next(iter(first.measured.latency.values())).repeats
        machine = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        return (
            f"{first.quality.examples:,} test examples, bootstrap intervals (paired in the"
            " comparison with dense). MACs counted by torch, whole model. Latency: median of"
            f" {repeats} interleaved runs; peak memory: loading and one forward pass in a fresh"
            f" process. {machine}."
        )


def _quality(quality: Quality) -> str:
    if quality.metric == "perplexity":
        return f"{quality.value:.2f} [{quality.low:.2f}, {quality.high:.2f}]"
    return f"{quality.value:.1%} [{quality.low:.1%}, {quality.high:.1%}]"


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    scale = 1 if difference.metric == "perplexity" else 100
    value, low, high = (scale * x for x in (difference.value, difference.low, difference.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _bytes(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 1e6:,.1f} MB"
