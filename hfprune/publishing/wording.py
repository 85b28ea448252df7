"""How a report says its figures."""

from __future__ import annotations

from collections.abc import Iterable

from hfprune.evaluation.evaluate import Difference, Quality
from hfprune.evaluation.measure import Measurement


def table_row(cells: Iterable[str]) -> str:
    """A row of a Markdown table; the names that a recipe gives to data may hold anything."""
    written = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return f"| {' | '.join(written)} |"


def duration(seconds: float) -> str:
    """Seconds as a person says them: "0.5 s", "43 s", "5 min 21 s"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def milliseconds(seconds: float) -> str:
    """Seconds as "12.3 ms"."""
    return f"{seconds * 1e3:,.1f} ms"


def kilowatt_hours(drawn: float, carbon_intensity: float | None) -> str:
    """Energy, and the grams of CO2 equivalent per kWh that it is told with."""
    found = f"{drawn:.3g} kWh by the processors' own counters"
    if carbon_intensity is None:
        return found
    return f"{found}, at {carbon_intensity:g} g of CO2 equivalent per kWh"


def verdict(dense: Quality, result: Quality, difference: Difference) -> str:
    """Whether a result is better, worse or the same, as far as the test examples tell."""
    metric = difference.metric
    if difference.low <= 0 <= difference.high:
        found = f"No difference in {metric} can be shown on {difference.examples:,} examples"
    else:
        rises = difference.value > 0
        better = rises != (metric == "perplexity")
        found = f"The {metric} is {'better' if better else 'worse'} than the dense model's"
    return f"{found}: {with_interval(result)}, dense {with_interval(dense)}."


def with_interval(quality: Quality) -> str:
    """A quality with its interval: "86.5% [84.5%, 88.6%]"."""
    if quality.metric == "perplexity":
        return f"{quality.value:,.2f} [{quality.low:,.2f}, {quality.high:,.2f}]"
    return f"{quality.value:.1%} [{quality.low:.1%}, {quality.high:.1%}]"


def to_dense(difference: Difference | None) -> str:
    """A difference to the dense model with its interval, in points; nothing for that model."""
    if difference is None:
        return ""
    ends = (difference.value, difference.low, difference.high)
    value, low, high = (_signed(x, difference.metric) for x in ends)
    return f"{value} [{low}, {high}]"


def _signed(value: float, metric: str) -> str:
    """A difference to as many places as the values that it is of."""
    return f"{value:+,.2f}" if metric == "perplexity" else f"{100 * value:+.1f}"


def points(difference: Difference) -> str:
    """A difference as "-0.5 points of accuracy"."""
    unit = "" if difference.metric == "perplexity" else " points"
    return f"{_signed(difference.value, difference.metric)}{unit} of {difference.metric}"


def smaller(before: Measurement, after: Measurement) -> tuple[str, str]:
    """How much smaller the file is, and the memory beside it."""
    if not before.file_bytes or not after.file_bytes:
        return "not measured", "The models were not saved."
    note = f"{megabytes(after.file_bytes)}, dense {megabytes(before.file_bytes)}."
    if before.peak_memory and after.peak_memory:
        note += (
            f" Peak memory {megabytes(after.peak_memory)}, dense {megabytes(before.peak_memory)},"
            " to load and run the largest batch."
        )
    return f"{1 - after.file_bytes / before.file_bytes:.0%} smaller on disk", note


def megabytes(count: int | None) -> str:
    """Bytes as "12.3 MB"."""
    return "not measured" if count is None else f"{count / 1e6:,.1f} MB"


def millijoules(joules: float | None) -> str:
    """Joules as "12.3 mJ"."""
    return "not measured" if joules is None else f"{joules * 1e3:,.1f} mJ"
