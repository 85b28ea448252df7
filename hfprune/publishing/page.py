"""The report as one self-contained page, with its pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfprune.publishing.figures import THEME, Picture, pictures
from hfprune.publishing.report import Report

if TYPE_CHECKING:
    from jinja2 import Environment

FIGURES = "figures"
"""The folder of the pictures, beside the page; nothing else is kept in it."""

_SECTIONS = {
    "What stays, and how important it was": ("kept", "importance"),
    "Quality, speed and time": ("quality", "curve", "latency", "time"),
}


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
    for stale in {p for p in figures.iterdir() if p.stem not in {p.name for p in drawn}}:
        stale.unlink()  # of an earlier report, which had more to draw
    temporary = page.with_name(f"{page.name}.tmp")
    temporary.write_text(_html(report, drawn), encoding="utf-8")
    temporary.replace(page)


def _html(report: Report, drawn: Sequence[Picture]) -> str:
    import yaml

    header, *rows = report.cells()
    recipe = dict(report.recipe)
    sections = {
        heading: [(p, _themed(p.svg)) for p in drawn if p.name.startswith(names)]
        for heading, names in _SECTIONS.items()
    }
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            title=f"Pruning {recipe['model']}" if "model" in recipe else "Pruning report",
            report=report,
            theme=THEME,
            header=header,
            rows=rows,
            sections=[(heading, found) for heading, found in sections.items() if found],
            recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else "",
        )
    )


def _themed(svg: str) -> str:
    """The picture with the page's colors in the place of its own."""
    for name, color in THEME.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("hfprune.publishing"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
