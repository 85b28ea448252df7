"""Pictures that show what the figures say, to those who see all colors and to those who do not."""

import dataclasses
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from reports import make, plan_of, scores_of

from hfprune.evaluation.evaluate import Quality
from hfprune.publishing.figures import THEME, draw_curve, draw_kept, kept_as_text, pictures
from hfprune.publishing.panels import (
    GONE,
    KEPT,
    draw_importance,
    draw_points,
    draw_qualities,
)
from hfprune.publishing.report import CurvePoint
from hfprune.publishing.units import Pruning, Units
from hfprune.publishing.wording import duration

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("family", ["bert", "t5", "olmo2", "mixtral"])
def test_the_drawing_in_the_terminal_counts_what_stays(family):
    plan = plan_of(family)
    parts = (*plan.anatomy, *plan.anatomy.experts)
    lines = kept_as_text(plan).splitlines()
    assert len({line.split("  ")[0] for line in lines}) == len(parts)  # every label is its own
    for part, line in zip(parts, lines, strict=True):
        kept = plan.keep.get(part.name, range(part.units))
        assert line.endswith(f"  {len(kept)}/{part.units}")
        drawing = line.split()[-2]
        if part.kind == "neuron":
            assert drawing.count("█") / len(drawing) == pytest.approx(
                len(kept) / part.units, abs=1 / len(drawing)
            )
        else:
            assert [i for i, mark in enumerate(drawing) if mark == "█"] == list(kept)


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
    assert min(some.shape[:2]) > 200
    assert share_of(some, KEPT) > 0.02
    assert share_of(some, GONE) > 0.02
    assert share_of(whole, GONE) < 0.001
    both = share_of(some, KEPT) + share_of(some, GONE)
    assert share_of(whole, KEPT) == pytest.approx(both, rel=0.05)
    assert [p.name for p in tmp_path.glob("*tmp*")] == []


@pytest.fixture(scope="module")
def drawn():
    """Every picture of a made-up report, by name."""
    return {picture.name: picture for picture in pictures(make())}


def tree(picture):
    return ElementTree.fromstring(picture.svg)


def words(picture):
    return [" ".join(node.itertext()).strip() for node in tree(picture).iter(f"{SVG}text")]


def test_a_report_has_every_picture(drawn):
    assert list(drawn) == [
        "kept-heads", "kept-neurons", "importance-heads", "importance-neurons",
        "quality", "curve", "latency", "latency-length-1", "time",
    ]  # fmt: skip
    plain = pictures(make(pruning=None, curve=(), seconds={}))
    assert [p.name for p in plain if "length" not in p.name] == ["quality", "latency"]
    plan = plan_of("mixtral")
    moe = pictures(make(pruning=Pruning.of(plan, scores_of(plan))))
    assert {"kept-experts", "importance-experts"} <= {p.name for p in moe}


def test_energy_is_told_beside_the_time_where_it_was_read(drawn):
    assert "kWh" not in drawn["time"].caption
    read = make(pruning=None, curve=(), energy={"dense": 7.2e6}, carbon_intensity=50.0)
    (time,) = (p for p in pictures(read) if p.name == "time")
    assert "drew 2 kWh by the processors' own counters, at 50 g of CO2" in time.caption


def test_every_picture_is_told_in_words(drawn):
    for picture in drawn.values():
        root = tree(picture)
        assert root.get("role") == "img"
        ids = [node.get("id") for node in root.iter() if node.get("id")]
        assert len(set(ids)) == len(ids)
        assert all(name.startswith(f"{picture.name}-") for name in ids)
        told = {node.get("id"): node.text for node in root}
        assert [told[name] for name in root.get("aria-labelledby").split()] == [
            picture.title,
            picture.description,
        ]
        assert picture.title in words(picture)  # the file alone says what it is
        assert len(picture.description) > 40 and len(picture.caption) > 20


def test_only_colors_with_a_purpose_are_used(drawn):
    """A page with a dark theme replaces these; any other would stay as it is, black on black."""
    for picture in drawn.values():
        assert set(re.findall(r"#[0-9a-f]{6}\b", picture.svg)) <= set(THEME.values()), picture.name


def test_the_same_report_gives_the_same_files(drawn):
    again = pictures(make(pruning=None))
    assert [picture.svg for picture in again] == [drawn[picture.name].svg for picture in again]


def test_the_axes_have_names_with_units(drawn):
    for name, labels in {
        "kept-heads": ["number of the head", "layer"],
        "kept-neurons": ["share of the neurons that stays", "layer"],
        "importance-heads": ["importance by fisher", "layer"],
        "quality": ["accuracy (%)"],
        "curve": ["MACs of the layers that stay (%)", "accuracy (%)"],
        "latency": ["batch size (examples)", "latency of a batch (ms)"],
        "latency-length-1": ["length of the examples (tokens)", "latency of a batch (ms)"],
        "time": ["seconds"],
    }.items():
        assert set(labels) <= set(words(drawn[name])), name


def test_the_counts_stand_beside_the_layers(drawn):
    for row in make().pruning.units:
        assert f"{row.kept}/{row.total}" in words(drawn[f"kept-{row.kind}s"])


def test_the_importance_of_few_units_is_a_dot_each(drawn):
    for kind in ("head", "neuron"):
        dots = [
            node.get("style", "") for node in tree(drawn[f"importance-{kind}s"]).iter(f"{SVG}use")
        ]
        kept, total = make().pruning.count(kind)
        assert sum(f"fill: {KEPT}" in style for style in dots) == kept
        assert sum(f"fill: {GONE}" in style for style in dots) == total - kept


def test_the_importance_of_many_units_is_an_area():
    def row(layer, kept, total):
        values = torch.linspace(-9, -3, 60).double().exp().tolist()
        return Units("neuron", "", layer, total, kept, None, False, False, values, values)

    axes = Figure().subplots()
    draw_importance(axes, [row(0, 300, 400), row(1, 100, 400)], "fisher", 1e-4, 0.06)
    areas = []
    for patch in axes.patches:
        heights, _, base = patch.get_data()
        areas.append(float((base - heights).sum()))
    gone_0, kept_0, gone_1, kept_1 = areas
    assert kept_0 / (kept_0 + gone_0) == pytest.approx(0.75)
    assert kept_1 / (kept_1 + gone_1) == pytest.approx(0.25)
    assert kept_0 + gone_0 == pytest.approx(kept_1 + gone_1)


def test_units_that_nothing_depends_on_have_no_importance_to_draw():
    plan = plan_of("bert")
    nothing = {g.name: torch.zeros(g.units).double() for g in plan.anatomy}
    scores = dataclasses.replace(scores_of(plan), importance={"fisher": nothing})
    names = [p.name for p in pictures(make(pruning=Pruning.of(plan, scores)))]
    assert "kept-heads" in names and not any(n.startswith("importance") for n in names)


POINTS = [
    CurvePoint(1.0, 86.5, 84.3, 88.7, "dense"),
    CurvePoint(0.25, 83.0, 82.0, 84.5, "fisher"),
    CurvePoint(0.5, 86.0, 85.0, 86.5, "fisher"),
    CurvePoint(0.5, 80.0, 78.0, 83.0, "random"),
]


def test_the_curve_goes_through_the_points_with_their_bars():
    axes = Figure().subplots()
    draw_points(axes, POINTS, "accuracy (%)", "MACs (%)")
    fisher, random = axes.containers
    assert (fisher.get_label(), random.get_label()) == ("fisher", "random")
    line, _, (bars,) = fisher
    assert line.get_ydata().tolist() == [83.0, 86.0]
    assert line.get_xdata() == pytest.approx([25, 50], abs=1)
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[82, 84.5], [85, 86.5]]
    (level,) = [line for line in axes.lines if line.get_label() == "dense"]
    assert set(level.get_ydata()) == {86.5}
    styles = {(c[0].get_color(), c[0].get_marker(), c[0].get_linestyle()) for c in axes.containers}
    assert len({color for color, _, _ in styles}) == len({m for _, m, _ in styles}) == 2


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_curve_is_written_in_the_format_of_its_ending(ending, tmp_path):
    draw_curve(POINTS, tmp_path / f"curve.{ending}", quality="F1 (%)", cost="parameters (%)")
    (file,) = tmp_path.iterdir()
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert file.read_bytes().startswith(start)
    if ending == "svg":
        text = file.read_text()
        assert all(word in text for word in ("F1 (%)", "parameters (%)", "fisher", "random"))


def test_the_latency_picture_has_one_line_per_structure(drawn):
    report = make()
    same = dataclasses.replace(report.variants[2], params=report.variants[3].params, macs=1)
    last = dataclasses.replace(report.variants[3], macs=1)
    picture = next(
        p
        for p in pictures(dataclasses.replace(report, variants=(report.dense, same, last)))
        if p.name == "latency"
    )
    assert "distilled" in words(picture) and "compensated" not in words(picture)
    assert "1.4×" in words(picture)
    assert "compensated" in words(drawn["latency"])


def test_a_plan_that_removes_nothing_has_one_line_and_nothing_to_compare():
    dense = make().dense
    same = dataclasses.replace(dense, name="pruned")
    report = make(variants=(dense, same), pruning=None, curve=(), seconds={})
    for picture in pictures(report):
        assert not any("×" in word for word in words(picture)), picture.name


def test_more_structures_than_styles_are_drawn():
    rounds = [dataclasses.replace(make().dense, name=f"round-{i}", macs=i) for i in range(9)]
    report = make(variants=(make().dense, *rounds), pruning=None, curve=(), seconds={})
    latency = next(p for p in pictures(report) if p.name == "latency")
    assert {f"round-{i}" for i in range(9)} <= set(words(latency))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.52, "0.5 s"),
        (9.96, "10 s"),
        (59.6, "1 min 0 s"),
        (320.6, "5 min 21 s"),
        (7260, "2 h 1 min"),
    ],
)
def test_times_are_said_as_a_person_says_them(seconds, said):
    assert duration(seconds) == said


def test_perplexities_far_apart_are_told_apart():
    def quality_of(values):
        return {
            str(value): Quality("perplexity", value, 0.9 * value, 1.1 * value, 9)
            for value in values
        }

    for values, scale in (((12.5, 14.0, 30.0), "linear"), ((12.5, 14.0, 2.5e5), "log")):
        axes = Figure().subplots()
        draw_qualities(axes, quality_of(values))
        assert axes.get_xscale() == scale
        assert [text.get_text() for text in axes.texts][1] == "14.00"
        points = [CurvePoint(0.5, value, value, value, "fisher") for value in values]
        axes = Figure().subplots()
        draw_points(axes, points, "perplexity", "MACs")
        assert axes.get_yscale() == scale
    assert axes.yaxis.get_major_formatter()(1e5) == "100,000"
