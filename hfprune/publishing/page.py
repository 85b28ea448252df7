"""The report as files: one self-contained page, the same in Markdown, and its pictures."""

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
"""The folder of the pictures."""

_SECTIONS = {
    "What stays, and how important it was": ("kept", "importance"),
    "Quality, speed and time": ("quality", "curve", "latency", "time"),
}


def write_report(report: Report, folder: str | os.PathLike[str]) -> None:
    """Write report.md, report.html and figures/*.svg and *.png into a folder.

    Every file is written under a temporary name first.
    """
    path = Path(folder)
    drawn = pictures(report)
    (path / FIGURES).mkdir(parents=True, exist_ok=True)
    for picture in drawn:
        picture.save(path / FIGURES)
    for name, text in (("report.md", report.markdown()), ("report.html", html(report, drawn))):
        temporary = path / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path / name)


def html(report: Report, drawn: Sequence[Picture]) -> str:
    """The page: no script, nothing from elsewhere, light or dark as the reader has it."""
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
