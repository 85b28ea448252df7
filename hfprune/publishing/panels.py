"""The drawing itself: one panel of a picture per function, in one style.

Colors are Okabe and Ito's, told apart by all readers, and no panel speaks by color alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hfprune.publishing.units import MARKS
from hfprune.publishing.wording import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from hfprune.evaluation.evaluate import Quality
    from hfprune.evaluation.measure import Latency
    from hfprune.publishing.report import CurvePoint
    from hfprune.publishing.units import Units

KEPT, GONE = "#0072b2", "#c9d0d8"
INK, MUTED, LINE, PAPER = "#1f2933", "#5b6673", "#e3e7ec", "#fefefe"
LINES = (
    (KEPT, "o", "-"),
    ("#d55e00", "s", "--"),
    ("#009e73", "^", "-."),
    ("#cc79a7", "D", ":"),
    ("#e69f00", "v", (0, (3, 1, 1, 1, 1, 1))),
    ("#56b4e9", "P", (0, (5, 3))),
)
"""Color, marker and dashes of one line after the other."""

_BINS = 36  # of a distribution
_FAR = 10  # times as large: on a linear axis, all but the largest would be one
_DOTTED = (0, (2, 2))
_BARS: dict[str, Any] = {"capsize": 3, "elinewidth": 1.1, "lw": 1.6, "ms": 5.5}
_OVER_LINES: dict[str, Any] = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8}


@contextmanager
def style() -> Iterator[None]:
    """The look of every picture, while it is drawn and while it is written."""
    import matplotlib

    with matplotlib.rc_context(
        {
            "font.size": 9.5,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "figure.titlesize": 10.5,
            "figure.titleweight": "bold",
            "text.color": INK,
            "axes.titlecolor": INK,
            "axes.labelcolor": MUTED,
            "xtick.color": MUTED,
            "xtick.labelcolor": MUTED,
            "ytick.labelcolor": INK,
            "axes.edgecolor": MUTED,
            "axes.facecolor": "none",
            "figure.facecolor": PAPER,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": LINE,
            "grid.linewidth": 0.8,
            "xtick.minor.size": 0,
            "ytick.major.size": 0,
            "ytick.minor.size": 0,
            "legend.frameon": False,
            "svg.fonttype": "none",  # letters stay letters: sharp, searchable, read aloud
            "svg.hashsalt": "hfprune",  # the same picture is the same file
        }
    ):
        yield


def one_by_one(rows: Sequence[Units]) -> bool:
    """Whether units are drawn as marks in their places: heads and experts, if they are few."""
    return all(row.kind != "neuron" and row.total <= MARKS for row in rows)


def draw_units(axes: Axes, rows: Sequence[Units]) -> None:
    """What stays of one kind of units, a layer a row: a mark per unit, or a bar."""
    if one_by_one(rows):
        _draw_marks(axes, rows)
    else:
        _draw_shares(axes, rows)
    _layer_axis(axes, rows)


def _draw_marks(axes: Axes, rows: Sequence[Units]) -> None:
    from matplotlib.patches import Rectangle

    most = max(row.total for row in rows)
    for y, row in enumerate(rows):
        for unit in range(row.total):
            color = KEPT if unit in (row.which or ()) else GONE
            axes.add_patch(Rectangle((unit + 0.06, y - 0.4), 0.88, 0.8, color=color, lw=0))
        axes.text(most * 1.02, y, f"{row.kept}/{row.total}", va="center")
    step = max(1, math.ceil(most / 12))
    ticks = range(0, most, step)
    axes.set_xticks([unit + 0.5 for unit in ticks], [str(unit) for unit in ticks])
    axes.set_xlim(0, most * 1.2)
    axes.set_xlabel(f"number of the {rows[0].kind}", x=1 / 2.4)  # below the marks


def _draw_shares(axes: Axes, rows: Sequence[Units]) -> None:
    places = range(len(rows))
    axes.barh(places, [1] * len(rows), color=GONE, height=0.8)
    axes.barh(places, [row.kept / max(1, row.total) for row in rows], color=KEPT, height=0.8)
    for y, row in enumerate(rows):
        axes.text(1.02, y, f"{row.kept:,}/{row.total:,}", va="center")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlim(0, 1.42)
    axes.set_xlabel(f"share of the {rows[0].kind}s that stays", x=1 / 2.84)  # below the bars


def _layer_axis(axes: Axes, rows: Sequence[Units]) -> None:
    """A layer a row, the first on top."""
    axes.set(ylim=(len(rows) - 0.4, -0.6), ylabel="layer")
    labels = [row.place + (" (removed)" if row.dropped else "") for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(visible=False)


def draw_importance(
    axes: Axes, rows: Sequence[Units], criterion: str, floor: float, top: float
) -> None:
    """How important the units of each layer were, those that stay and those that were removed.

    Args:
        axes: where to draw.
        rows: units of one kind, with their importances.
        criterion: the importance's name.
        floor: where the axis begins; what is less important stands there.
        top: where it ends.
    """
    axes.set_xscale("log")
    if all(row.total <= MARKS for row in rows):
        _draw_dots(axes, rows, floor)
    else:
        _draw_ridges(axes, rows, floor, top)
    _layer_axis(axes, rows)
    axes.set(xlim=(floor / 1.5, top * 1.5), xlabel=f"importance by {criterion}")
    axes.grid(visible=True, axis="x")


def _draw_dots(axes: Axes, rows: Sequence[Units], floor: float) -> None:
    for y, row in enumerate(rows):
        for values, color, edge in (
            (row.removed_importance, GONE, MUTED),
            (row.kept_importance, KEPT, PAPER),
        ):
            spots = [max(v, floor) for v in values]
            axes.scatter(spots, [y] * len(spots), s=40, c=color, edgecolors=edge, lw=0.7, zorder=3)


def _draw_ridges(axes: Axes, rows: Sequence[Units], floor: float, top: float) -> None:
    """Each row's distribution, its removed units at the bottom and the kept ones on them."""
    import numpy as np

    edges = np.geomspace(floor, top * 1.0001, _BINS + 1)

    def counts(values: Sequence[float], units: int) -> Any:
        if not values:
            return np.zeros(_BINS)
        # The values are quantiles: between two of them lie equally many units.
        ranks = np.linspace(0, len(values) - 1, 1000)
        spread = np.interp(ranks, range(len(values)), np.log(np.clip(values, floor, top)))
        return np.histogram(spread, np.log(edges))[0] * units / len(ranks)

    gone = [counts(row.removed_importance, row.total - row.kept) for row in rows]
    kept = [counts(row.kept_importance, row.kept) for row in rows]
    scale = 0.86 / max(float((g + k).max()) for g, k in zip(gone, kept, strict=True))
    for y, (lower, upper) in enumerate(zip(gone, kept, strict=True)):
        base = y + 0.43
        seam = base - scale * lower
        axes.stairs(seam, edges, baseline=base, color=GONE, fill=True)
        axes.stairs(seam - scale * upper, edges, baseline=seam, color=KEPT, fill=True)
        axes.axhline(base, color=LINE, lw=0.8, zorder=0)


def draw_qualities(axes: Axes, qualities: Mapping[str, Quality]) -> None:
    """The quality of each model with its interval, the first one's as a level through all."""
    names = list(qualities)
    scale = scale_of(qualities[names[0]].metric)
    for y, quality in enumerate(qualities.values()):
        value, low, high = (scale * x for x in (quality.value, quality.low, quality.high))
        color = KEPT if y else MUTED
        ends = _ends([(low, value, high)])
        axes.errorbar([value], [y], xerr=ends, color=color, marker="o", **_BARS)
        text = written(value, quality.metric)
        axes.text(value, y - 0.17, text, ha="center", va="bottom", bbox=_OVER_LINES)
    if qualities[names[0]].metric == "perplexity":
        _spread(axes, "x", [quality.value for quality in qualities.values()])
    level = scale * qualities[names[0]].value
    axes.axvline(level, color=MUTED, lw=1, ls=_DOTTED, zorder=1)
    axes.set(xlabel=unit_of(qualities[names[0]].metric), ylim=(len(names) - 0.5, -0.75))
    axes.set_yticks(range(len(names)), names)
    axes.grid(visible=False, axis="y")


def draw_points(axes: Axes, points: Sequence[CurvePoint], quality: str, cost: str) -> None:
    """Quality against cost, a line with error bars per series; "dense" is a level."""
    names = list(dict.fromkeys(p.series for p in points if p.series != "dense"))
    for point in (p for p in points if p.series == "dense"):
        axes.axhline(point.mean, color=MUTED, lw=1.2, ls=_DOTTED, label="dense")
        axes.axhspan(point.low, point.high, color=LINE, lw=0, alpha=0.7, zorder=0)
    for number, name in enumerate(names):
        color, marker, dashes = LINES[number % len(LINES)]
        own = sorted((p for p in points if p.series == name), key=lambda p: p.budget)
        # Side by side: the error bars of one budget would hide one another.
        shift = (number - (len(names) - 1) / 2) * 0.6
        axes.errorbar(
            [100 * p.budget + shift for p in own],
            [p.mean for p in own],
            _ends([(p.low, p.mean, p.high) for p in own]),
            color=color,
            marker=marker,
            ls=dashes,
            label=name,
            **_BARS,
        )
    axes.set(xlabel=cost, ylabel=quality)
    if quality == unit_of("perplexity"):
        _spread(axes, "y", [p.mean for p in points])


def draw_latencies(axes: Axes, lines: Mapping[str, Mapping[int, Latency]], xlabel: str) -> None:
    """Latency over sizes, a line per model with the middle half of its runs; beside the last one,
    how many times as fast as the first it is.
    """
    axes.set(xscale="log", yscale="log")
    models = list(lines.values())
    first, last = models[0], models[-1]
    for number, (label, line) in enumerate(lines.items()):
        # The first is what the others are compared with; as in the other pictures, in grey.
        color, marker, dashes = (
            (MUTED, "o", _DOTTED) if number == 0 else LINES[(number - 1) % len(LINES)]
        )
        sizes = sorted(line)
        runs = [line[size] for size in sizes]
        middle = [1e3 * run.median for run in runs]
        ends = _ends([(1e3 * run.low, 1e3 * run.median, 1e3 * run.high) for run in runs])
        axes.errorbar(
            sizes, middle, ends, color=color, marker=marker, ls=dashes, label=label, **_BARS
        )
    for size in sorted(first) if len(lines) > 1 else ():
        axes.annotate(
            f"{first[size].median / last[size].median:.1f}×",
            (size, 1e3 * min(last[size].low, last[size].median)),  # below the bar
            (0, -6),
            textcoords="offset points",
            ha="center",
            va="top",
        )
    axes.margins(x=0.12, y=0.18)
    _plain_ticks(axes, sorted(first))
    axes.set(xlabel=xlabel, ylabel="latency of a batch (ms)")


def _ends(intervals: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """(low, middle, high) as lengths below and above the middle; a bootstrap interval need not hold
    it.
    """
    below = [max(0.0, middle - low) for low, middle, _ in intervals]
    return [below, [max(0.0, high - middle) for _, middle, high in intervals]]


def _plain_ticks(axes: Axes, sizes: Sequence[int]) -> None:
    """On logarithmic axes: the sizes that were measured, and numbers that are not powers of ten."""
    from matplotlib.ticker import NullLocator

    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    _plain_numbers(axes.yaxis, (1, 2, 5))


def _spread(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Make an axis, "x" or "y", logarithmic if its values are far apart."""
    times = max(values) / min(values)
    if times > _FAR:
        axes.set(**{f"{which}scale": "log"})
        axis: Axis = axes.xaxis if which == "x" else axes.yaxis
        _plain_numbers(axis, (1, 2, 5) if times < _FAR**3 else (1,))


def _plain_numbers(axis: Axis, steps: Sequence[float]) -> None:
    """On a logarithmic axis: ticks at these in every decade, numbers that are no powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.15g}"))


def draw_seconds(axes: Axes, seconds: Mapping[str, float]) -> None:
    """A bar per step with the time that it took."""
    longest = max(*seconds.values(), 1e-9)
    axes.barh(range(len(seconds)), list(seconds.values()), color=KEPT, height=0.7)
    for y, value in enumerate(seconds.values()):
        axes.text(value + longest * 0.02, y, duration(value), va="center")
    axes.set(xlim=(0, longest * 1.36), ylim=(len(seconds) - 0.4, -0.6), xlabel="seconds")
    axes.set_yticks(range(len(seconds)), list(seconds))
    axes.grid(visible=False, axis="y")


def scale_of(metric: str) -> float:
    """Shares are drawn in percent, perplexity as it is."""
    return 1 if metric == "perplexity" else 100


def written(value: float, metric: str) -> str:
    """A quality as it is drawn, with as many places as the table has."""
    return f"{value:,.2f}" if metric == "perplexity" else f"{value:.1f}"


def unit_of(metric: str) -> str:
    """A metric's name with its unit."""
    return metric if metric == "perplexity" else f"{metric} (%)"
