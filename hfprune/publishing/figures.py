"""Pictures of what was pruned and measured: for the terminal, as image files, and for a page.

Every picture of a report is one narrow panel, so that it can be read on a telephone and stand
beside others on a wide page. A page that inlines the SVG can put its own theme in the place of the
colors in `THEME`.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from hfprune.files import whole_file, write_whole
from hfprune.publishing.panels import (
    GONE,
    INK,
    KEPT,
    LINE,
    LINES,
    MUTED,
    PAPER,
    draw_importance,
    draw_latencies,
    draw_points,
    draw_qualities,
    draw_seconds,
    draw_units,
    one_by_one,
    scale_of,
    style,
    unit_of,
    written,
)
from hfprune.publishing.units import MARKS, NAMES, units_of
from hfprune.publishing.wording import duration, kilowatt_hours, milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hfprune.evaluation.measure import Latency
    from hfprune.planning.plan import PruningPlan
    from hfprune.publishing.report import CurvePoint, Report
    from hfprune.publishing.units import Units

THEME = {
    "kept": KEPT, "gone": GONE, "ink": INK, "muted": MUTED, "line": LINE, "paper": PAPER,
    **{f"line-{i}": color for i, (color, _, _) in enumerate(LINES) if i},
}  # fmt: skip
"""What the colors of a picture are for."""

_COST = "MACs of the layers that stay (%)"
_BAR = 48  # characters of a full bar in the terminal
_WIDTH = 4.2  # inches of a picture, so that its letters are 11 px on a screen of 400
_PROLOG = '<?xml version="1.0" encoding="utf-8"?>\n'


@dataclass(frozen=True)
class Picture:
    """One picture, drawn and told.

    Attributes:
        name: of its files, without an ending.
        title: what it is of.
        caption: how to read it.
        description: what it shows, in words, for those who cannot see it.
        figure: the drawing.
    """

    name: str
    title: str
    caption: str
    description: str
    figure: Figure

    @cached_property
    def svg(self) -> str:
        """The drawing as an `<svg>` element with title and description; its ids are its own."""
        buffer = io.StringIO()
        with style():
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", text)
        opening, rest = text.split(">", 1)
        named = f'aria-labelledby="{self.name}-title {self.name}-desc"'
        return (
            f'{opening} role="img" {named}>\n'
            f' <title id="{self.name}-title">{escape(self.title)}</title>\n'
            f' <desc id="{self.name}-desc">{escape(self.description)}</desc>{rest}'
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write NAME.svg and NAME.png into a folder, each under a temporary name first."""
        path = Path(folder, f"{self.name}.svg")
        write_whole(path, _PROLOG + self.svg)
        save_figure(self.figure, path.with_suffix(".png"))


def pictures(report: Report) -> list[Picture]:
    """Every picture that a report has the figures for."""
    drawn = []
    with style():
        if report.pruning:
            kinds = [
                [row for row in report.pruning.units if row.kind == kind]
                for kind in report.pruning.kinds
            ]
            drawn += [_of_units(rows) for rows in kinds]
            drawn += [p for rows in kinds if (p := _of_importance(rows, report.pruning.criterion))]
        drawn.append(_of_quality(report))
        if report.curve:
            drawn.append(_of_curve(report))
        drawn.append(_of_latency(report))
        drawn += [_of_lengths(report, size) for size in report.dense.measured.latency_by_length]
        if report.seconds:
            drawn.append(_of_time(report))
    return drawn


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure under a temporary name, then rename it; the ending says the format."""
    kind = Path(path).suffix[1:]
    metadata = {"Date": None} if kind == "svg" else None
    with whole_file(path) as temporary, style():
        figure.savefig(temporary, format=kind, dpi=200, metadata=metadata)


def kept_as_text(plan: PruningPlan) -> str:
    """The kept units of every layer: heads and experts one by one, neurons as a bar of their
    share.
    """
    rows = units_of(plan)
    lines = []
    width = max(len(row.label) for row in rows)
    for row in rows:
        if one_by_one([row]):
            drawing = "".join(
                "█" if unit in (row.which or ()) else "·" for unit in range(row.total)
            )
        else:
            full = round(_BAR * row.kept / max(1, row.total))
            drawing = "█" * full + "·" * (_BAR - full)
        lines.append(f"{row.label:<{width}}  {drawing}  {row.kept:,}/{row.total:,}")
    return "\n".join(lines)


def draw_kept(plan: PruningPlan, path: str | os.PathLike[str]) -> None:
    """Draw what a plan keeps of every layer, to a PNG, SVG or PDF file.

    Side by side a panel per kind of units: heads and experts as squares in their places, neurons as
    a bar of their share.
    """
    rows = units_of(plan)
    kinds = dict.fromkeys(row.kind for row in rows)
    panels = [[row for row in rows if row.kind == kind] for kind in kinds]
    with style():
        height = 1.1 + 0.24 * max(map(len, panels))
        figure = _figure(height, _WIDTH * len(panels))
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            draw_units(axes, panel)
            axes.set_title(_staying(panel), loc="left", pad=8)
        figure.suptitle(
            f"{plan.anatomy.model_type}, {plan.budget} by {plan.criterion}: the layers keep"
            f" {plan.macs_share:.0%} of their MACs, {plan.params_share:.0%} of their parameters",
            fontweight="normal",
        )
    save_figure(figure, path)


def draw_curve(
    points: Sequence[CurvePoint],
    path: str | os.PathLike[str],
    *,
    quality: str = "accuracy (%)",
    cost: str = _COST,
) -> None:
    """Draw quality against cost to a PNG, SVG or PDF file, a line with error bars per series.

    Args:
        points: of one or more series; those of the series "dense" are drawn as a level. `mean`,
            `low` and `high` are drawn as they are, `budget` in percent.
        path: the file.
        quality: name of the axis, with its unit.
        cost: name of the axis; percent.
    """
    with style():
        figure = _single(
            "Quality against cost", 3.4, lambda axes: draw_points(axes, points, quality, cost)
        )
    save_figure(figure, path)


def _of_units(rows: Sequence[Units]) -> Picture:
    kind, title = rows[0].kind, _staying(rows)
    listed = "; ".join(f"layer {row.place}: {row.kept:,} of {row.total:,}" for row in rows)
    return Picture(
        f"kept-{kind}s",
        title,
        f"One square a {kind}: full ones stay, pale ones were removed."
        if one_by_one(rows)
        else f"The share of each layer's {kind}s that stays.",
        f"How many {kind}s of each layer stay. {listed}.",
        _single(title, 0.95 + 0.24 * len(rows), lambda axes: draw_units(axes, rows)),
    )


def _staying(rows: Sequence[Units]) -> str:
    name = NAMES[rows[0].kind]
    return f"{name[0].upper()}{name[1:]} that stay"


def _of_importance(rows: Sequence[Units], criterion: str) -> Picture | None:
    kind = rows[0].kind
    values = sorted(v for row in rows for v in (*row.kept_importance, *row.removed_importance))
    positive = [v for v in values if v > 0]
    if not positive:
        return None
    # A few units that nothing depends on would squeeze all others into a corner.
    floor, top = max(positive[0], positive[len(positive) // 2] * 1e-6), positive[-1]
    dots = all(row.total <= MARKS for row in rows)
    shape = f"a {kind} a dot" if dots else f"the higher, the more {kind}s"
    edge = " Those of (nearly) no importance stand at the left edge." * (values[0] < floor)
    medians = "; ".join(f"layer {row.place}: {_medians(row)}" for row in rows)
    title = f"Importance of the {NAMES[kind]}"
    return Picture(
        f"importance-{kind}s",
        title,
        f"Each layer's {kind}s from least to most important, {shape}; full ones stay, pale ones"
        f" were removed.{edge}",
        f"Median importance by {criterion} of the {kind}s that stay, and of those removed."
        f" {medians}.",
        _single(
            title,
            1.0 + 0.34 * len(rows),
            lambda axes: draw_importance(axes, rows, criterion, floor, top),
        ),
    )


def _medians(row: Units) -> str:
    kept, removed = (
        f"{values[len(values) // 2]:.2g}" if values else "none"
        for values in (row.kept_importance, row.removed_importance)
    )
    return f"{kept} and {removed}"


def _of_quality(report: Report) -> Picture:
    qualities = {v.name: v.quality for v in report.variants}
    scale, metric = scale_of(report.dense.quality.metric), report.dense.quality.metric
    listed = "; ".join(
        "{}: {} [{}, {}]".format(
            name, *(written(scale * x, metric) for x in (q.value, q.low, q.high))
        )
        for name, q in qualities.items()
    )
    title = "Quality on the test split"
    return Picture(
        "quality",
        title,
        "Bars are 95 % intervals of each model by itself. Whether two models differ is said by the"
        " table, which compares them on the same examples.",
        f"{unit_of(metric)} with 95 % intervals. {listed}.",
        _single(title, 1.0 + 0.34 * len(qualities), lambda axes: draw_qualities(axes, qualities)),
    )


def _of_curve(report: Report) -> Picture:
    metric = report.dense.quality.metric
    scale = scale_of(metric)
    points = [
        dataclasses.replace(p, mean=scale * p.mean, low=scale * p.low, high=scale * p.high)
        for p in report.curve
    ]
    listed = "; ".join(
        "{} at {:.0%}: {} [{}, {}]".format(
            p.series, p.budget, *(written(x, metric) for x in (p.mean, p.low, p.high))
        )
        for p in points
    )
    title = "Quality against cost"
    return Picture(
        "curve",
        title,
        "What stays of the quality at each budget: of criteria before any recovery, of rounds after"
        " it. Bars and the band are 95 % intervals.",
        f"{unit_of(metric)} over {_COST}. {listed}.",
        _single(title, 3.4, lambda axes: draw_points(axes, points, unit_of(metric), _COST)),
    )


def _of_latency(report: Report) -> Picture:
    return _latency(
        "latency",
        "Latency over batch size",
        "batch size (examples)",
        "examples of the test split, padded to the longest of the batch",
        {v.name: v.measured.latency for v in report.structures},
    )


def _of_lengths(report: Report, size: int) -> Picture:
    return _latency(
        f"latency-length-{size}",
        f"Latency over length, batch {size}",
        "length of the examples (tokens)",
        f"batches of {size} without padding, the test split's tokens over and over",
        {v.name: v.measured.latency_by_length[size] for v in report.structures},
    )


def _latency(
    name: str, title: str, xlabel: str, inputs: str, lines: Mapping[str, Mapping[int, Latency]]
) -> Picture:
    listed = "; ".join(
        f"{label} at {size}: {milliseconds(line[size].median)}"
        for label, line in lines.items()
        for size in sorted(line)
    )
    return Picture(
        name,
        title,
        f"Median of interleaved runs on {inputs}; bars are the middle half of the runs, × says how"
        " many times as fast as dense. Both axes are logarithmic.",
        f"{title}. {listed}.",
        _single(title, 3.2, lambda axes: draw_latencies(axes, lines, xlabel)),
    )


def _of_time(report: Report) -> Picture:
    title, seconds = "Where the time went", report.seconds
    listed = "; ".join(f"{name}: {duration(value)}" for name, value in seconds.items())
    drew = ""
    if report.kilowatt_hours is not None:
        energy = kilowatt_hours(report.kilowatt_hours, report.carbon_intensity)
        drew = f" The steps up to the last model drew {energy}."
    return Picture(
        "time",
        title,
        "The time of each step, named by what it left in the run's folder;"
        f" {duration(sum(seconds.values()))} in all.{drew}",
        f"Seconds of each step. {listed}.",
        _single(title, 1.0 + 0.24 * len(seconds), lambda axes: draw_seconds(axes, seconds)),
    )


def _single(title: str, height: float, draw: Callable[[Axes], None]) -> Figure:
    """A figure of one panel, with a title and a legend if there is something to tell apart."""
    figure = _figure(height)
    axes = figure.subplots()
    draw(axes)
    figure.suptitle(title, x=0.02, ha="left")
    if names := axes.get_legend_handles_labels()[1]:
        columns = len(names) if len(names) <= 3 else 2
        figure.legend(loc="outside lower left", ncols=columns, handlelength=2.6, columnspacing=1.4)
    # The layout is settled once, and not anew for every file.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _figure(height: float, width: float = _WIDTH) -> Figure:
    """A figure by itself, whatever backend the user's own plots have."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
