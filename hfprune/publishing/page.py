"""The report as one self-contained page, with its pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from hfprune.files import write_whole
from hfprune.publishing.figures import THEME, Picture, pictures
from hfprune.publishing.rendering import template
from hfprune.publishing.report import Report

FIGURES = "figures"
"""The folder of the pictures, beside the page."""

_SECTIONS = {
    "What stays, and how important it was": ("kept", "importance"),
    "Quality, speed and time": ("quality", "curve", "latency", "time"),
}

_OURS = tuple(name for names in _SECTIONS.values() for name in names)


def write_page(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the page, and its pictures as SVG and PNG files into `figures` beside it.

    The page needs no script and nothing from elsewhere; it is light or dark as the reader has it.
    Every file is written under a temporary name first.
    """
    page = Path(path)
    figures = page.parent / FIGURES
    figures.mkdir(parents=True, exist_ok=True)
    drawn = pictures(report)
    for picture in drawn:
        picture.save(figures)
    for old in (p for ending in ("png", "svg") for p in figures.glob(f"*.{ending}")):
        if old.stem.startswith(_OURS) and old.stem not in {p.name for p in drawn}:
            old.unlink()  # of an earlier report, which had more to draw
    write_whole(page, _html(report, drawn))


def _html(report: Report, drawn: Sequence[Picture]) -> str:
    import yaml

    header, *rows = report.cells()
    recipe = dict(report.recipe)
    # Whole lines: a path that is folded is not found when places are taken out to publish.
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=math.inf)
    sections = {
        heading: [(p, _themed(p.svg)) for p in drawn if p.name.startswith(names)]
        for heading, names in _SECTIONS.items()
    }
    return template("report.html.jinja").render(
        title=f"Pruning {recipe['model']}" if "model" in recipe else "Pruning report",
        report=report,
        theme=THEME,
        header=header,
        rows=rows,
        sections=[(heading, found) for heading, found in sections.items() if found],
        recipe=text if recipe else "",
    )


def _themed(svg: str) -> str:
    """The picture with the page's colors in the place of its own."""
    for name, color in THEME.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg
