"""Reports: JSON and back, the tables, and pictures that show what the plan says."""

import dataclasses
import io
import json

import numpy as np
import pytest
import tiny

from hfprune.evaluation.evaluate import Difference, Quality
from hfprune.evaluation.measure import Latency, Measurement
from hfprune.planning.budget import Budget
from hfprune.planning.plan import PruningPlan
from hfprune.publishing.figures import GONE, KEPT, draw_kept, kept_as_text
from hfprune.publishing.report import Report, Variant
from hfprune.structure.anatomy import Anatomy

NAMES = ("dense", "pruned", "compensated", "distilled")


def make(metric="accuracy"):
    def variant(name, scale):
        value = 0.9 * scale if metric == "accuracy" else 12.5 / scale
        latency = {32: Latency(0.05 * scale, 0.04, 0.06, 7), 1: Latency(0.002 * scale, 0.001, 1, 7)}
        return Variant(
            name=name,
            quality=Quality(metric, value, value - 0.02, value + 0.02, 1032),
            difference=None
            if name == "dense"
            else Difference(metric, value - 0.9, -0.05, 0.01, 1032),
            params=int(22_700_000 * scale),
            macs=int(480_000_000 * scale),
            measured=Measurement("cpu", 2, latency, 3_000_000 if scale < 1 else None, 91_000_000),
        )

    variants = tuple(variant(name, 1 - 0.1 * i) for i, name in enumerate(NAMES))
    return Report(variants, 23, {"CPU": "a fine one", "threads": "2"}, {"dense": 61.5})


def test_it_comes_back_from_json():
    report = make()
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_the_markdown_table_has_every_variant():
    report = make()
    lines = report.markdown().splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    header, *rows = table
    assert [row[0] for row in rows] == list(NAMES)
    assert all(len(row) == len(header) for row in rows)
    assert lines[1].count("|") == lines[0].count("|")
    first = dict(zip(header, rows[0], strict=True))
    last = dict(zip(header, rows[-1], strict=True))
    assert first["accuracy [95 %]"] == "90.0% [88.0%, 92.0%]"
    assert first["vs dense [95 %]"] == ""
    assert last["vs dense [95 %]"] == "-27.0 [-5.0, +1.0]"  # points
    assert first["parameters"] == "22.70 M"
    assert first["MACs (23 tokens)"] == "480 M"
    assert first["latency, batch 1"] == "2.0 ms"
    assert last["latency, batch 32"] == "35.0 ms"
    assert first["file"] == "91.0 MB"
    assert [row[-1] for row in rows] == ["not measured", "3.0 MB", "3.0 MB", "3.0 MB"]
    assert "1,032 test examples" in lines[-1]
    assert "median of 7 interleaved runs" in lines[-1]
    assert "CPU a fine one, threads 2" in lines[-1]


def test_perplexity_is_no_percentage():
    report = make("perplexity")
    header, first, second = report.cells()[:3]
    assert header[1] == "perplexity [95 %]"
    assert first[1] == "12.50 [12.48, 12.52]"
    assert second[2] == "+13.0 [-0.1, +0.0]"


def test_the_terminals_table_has_every_cell():
    from rich.console import Console

    report = make()
    console = Console(width=220, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    for cell in (cell for row in report.cells()[1:] for cell in row):
        assert cell in text


def plan_of(family, **changes):
    anatomy = Anatomy.of(tiny.model(family))
    keep = tiny.selection(anatomy) | changes
    return PruningPlan(anatomy, keep, Budget("macs", 0.5), "fisher", 9)


@pytest.mark.parametrize("family", ["bert", "t5", "olmo2"])
def test_the_drawing_in_the_terminal_counts_what_stays(family):
    plan = plan_of(family)
    lines = kept_as_text(plan).splitlines()
    assert len(lines) == len(plan.anatomy.groups)
    assert len({line.split("  ")[0] for line in lines}) == len(lines)  # every label is its own
    for group, line in zip(plan.anatomy, lines, strict=True):
        kept = plan.keep[group.name]
        assert line.endswith(f"  {len(kept)}/{group.units}")
        drawing = line.split()[-2]
        if group.kind == "head":
            assert [i for i, mark in enumerate(drawing) if mark == "█"] == list(kept)
        else:
            assert drawing.count("█") / len(drawing) == pytest.approx(
                len(kept) / group.units, abs=1 / len(drawing)
            )


def test_removed_layers_are_drawn_as_such():
    text = kept_as_text(plan_of("bert", **{"encoder.layer": (0, 2)}))
    assert [line for line in text.splitlines() if "(removed)" in line] == [
        line for line in text.splitlines() if line.startswith("layer 1")
    ]


def share_of(pixels, color):
    """Share of an image's pixels (height, width, 4) in one color."""
    wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return float((np.abs(pixels[..., :3] - wanted).max(axis=-1) < 0.01).mean())


@pytest.mark.parametrize("family", ["bert", "t5", "olmo2"])
def test_the_picture_shows_what_stays(family, tmp_path):
    from matplotlib.image import imread

    plan = plan_of(family)
    draw_kept(plan, tmp_path / "some.png")
    everything = dataclasses.replace(plan, keep=plan.anatomy.everything)
    draw_kept(everything, tmp_path / "all.png")
    some, whole = (imread(tmp_path / name) for name in ("some.png", "all.png"))
    assert some.shape == whole.shape
    assert min(some.shape[:2]) > 200
    assert share_of(some, KEPT) > 0.02
    assert share_of(some, GONE) > 0.02
    assert share_of(whole, GONE) < 0.001
    both = share_of(some, KEPT) + share_of(some, GONE)
    assert share_of(whole, KEPT) == pytest.approx(both, rel=0.05)


def test_a_drawing_as_svg_says_the_counts(tmp_path):
    plan = plan_of("bert")
    draw_kept(plan, tmp_path / "kept.svg")
    text = (tmp_path / "kept.svg").read_text()
    assert KEPT in text and GONE in text
    for group in plan.anatomy:
        assert f"<!-- {len(plan.keep[group.name])}/{group.units} -->" in text
