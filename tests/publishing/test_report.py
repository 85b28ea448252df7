"""Reports: JSON and back, the tables, and what they say in words."""

import dataclasses
import io
import json
import re

import pytest
from reports import NAMES, make, variant

from hfprune.publishing.report import Judged, Report
from hfprune.publishing.wording import with_interval


def test_it_comes_back_from_json():
    report = make()
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_report_from_before_pictures_is_read():
    values = make().to_dict()
    for key in ("pruning", "recipe", "curve"):
        del values[key]
    report = Report.from_dict(json.loads(json.dumps(values)))
    assert report == make(pruning=None, recipe={}, curve=())
    assert report.markdown()


def table_of(markdown):
    lines = markdown.splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]


def test_lengths_of_encoder_and_decoder_are_written_and_read():
    plain = make()
    pruning = dataclasses.replace(plain.pruning, tokens=(39.8, 5.4))
    report = dataclasses.replace(plain, tokens=(40, 5), pruning=pruning)
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert "MACs (40 and 5 tokens)" in report.cells()[0]
    assert any("of 40 and 5 tokens on average" in line for line in report.caveats())
    earlier = plain.to_dict()
    earlier["pruning"]["tokens"] = 11.4  # as hfprune 0.1.0 wrote it
    assert Report.from_dict(earlier) == plain


def test_the_markdown_table_has_every_variant():
    report = make()
    header, *rows = table_of(report.markdown())
    assert [row[0] for row in rows] == list(NAMES)
    assert all(len(row) == len(header) for row in rows)
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
    ruler = next(line for line in report.markdown().splitlines() if line.startswith("|---"))
    assert ruler.count("|") == len(header) + 1


def test_the_markdown_says_how_and_how_sure():
    report = make()
    text = report.markdown()
    assert "1,032 test examples" in report.caption()
    assert "also stand in" not in report.caption()
    seen = Report.from_dict(dataclasses.replace(report, seen=0.25).to_dict())
    assert "25.0% of the test texts also stand in the training split." in seen.caption()
    assert "median of 7 interleaved runs" in report.caption()
    assert "CPU a fine one, threads 2" in report.caption()
    for piece in (report.caption(), *report.caveats(), *(f.note for f in report.facts())):
        assert piece in text


def test_data_of_another_kind_have_columns_and_a_headline():
    others = (variant(name, 1 - 0.2 * n, low=-9.0, high=-8.0) for n, name in enumerate(NAMES))
    judged = [{"news": Judged(v.quality, v.difference)} for v in others]
    plain = make()
    both = zip(plain.variants, judged, strict=True)
    report = make(variants=tuple(dataclasses.replace(v, also=also) for v, also in both))
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    header, *rows = table_of(report.markdown())
    column = header.index("on news [95 %]")
    assert [row[column] for row in rows][::3] == ["90.0% [88.0%, 92.0%]", "36.0% [34.0%, 38.0%]"]
    assert [row[column + 1] for row in rows][::3] == ["", "-54.0 [-900.0, -800.0]"]
    (fact,) = (fact for fact in report.facts() if fact.title == "Quality on news")
    assert fact.value == "-54.0 points of accuracy" and "36.0%" in fact.note
    assert "worse than the dense model's" in fact.note
    assert not any("news" in title for title in plain.cells()[0])


def test_names_of_data_do_not_break_the_table():
    plain = make()
    also = {"a|b <i>": Judged(plain.dense.quality, None)}
    report = make(variants=tuple(dataclasses.replace(v, also=also) for v in plain.variants))
    lines = [line for line in report.markdown().splitlines() if line.startswith("|")]
    assert "on a\\|b &lt;i> [95 %]" in lines[0]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_perplexity_is_no_percentage():
    report = make("perplexity")
    header, first, second = report.cells()[:3]
    assert header[1] == "perplexity [95 %]"
    assert first[1] == "12.50 [12.48, 12.52]"
    assert second[2] == "+1.39 [-0.05, +0.01]"
    assert facts_of(report)["Quality"].value == "+5.36 of perplexity"
    assert "is known to about ±0.02. The" in report.caveats()[0]
    vast = dataclasses.replace(report.dense.quality, value=1.5e6, low=1e6, high=2e6)
    assert with_interval(vast) == "1,500,000.00 [1,000,000.00, 2,000,000.00]"


def test_energy_has_a_column_where_it_was_read():
    assert "energy per example" not in make().cells()[0]
    first, *rest = make().variants
    read = dataclasses.replace(first.measured, energy_per_example=0.0123)
    report = make(variants=(dataclasses.replace(first, measured=read), *rest))
    column = report.cells()[0].index("energy per example")
    assert [row[column] for row in report.cells()[1:3]] == ["12.3 mJ", "not measured"]


def test_the_terminals_table_has_every_cell():
    from rich.console import Console

    plain = make()
    also = dict.fromkeys(("[/x]", "[bold]"), Judged(plain.dense.quality, None))  # rich's markup
    report = make(variants=tuple(dataclasses.replace(v, also=also) for v in plain.variants))
    console = Console(width=320, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    for cell in (cell for row in report.cells()[1:] for cell in row):
        assert cell in text
    assert "on [/x]" in text and "on [bold]" in text


def facts_of(report):
    return {fact.title: fact for fact in report.facts()}


def test_the_headline_is_what_the_table_says():
    facts = facts_of(make())
    assert facts["Removed"].value == "30% of the MACs"
    assert "30% of the parameters" in facts["Removed"].note
    stay, heads = make().pruning.count("head")
    assert f"{stay} of {heads} heads and " in facts["Removed"].note
    assert facts["Quality"].value == "-27.0 points of accuracy"
    assert facts["Speed"].value == "1.4 times as fast"
    assert "35.0 ms, dense 50.0 ms. 1.4 times at batch 1." in facts["Speed"].note
    assert facts["Size"].value == "0% smaller on disk"


@pytest.mark.parametrize(
    ("metric", "scale", "low", "high", "said"),
    [
        ("accuracy", 0.99, -0.02, 0.01, "No difference in accuracy can be shown on 1,032"),
        ("accuracy", 0.8, -0.2, -0.1, "The accuracy is worse"),
        ("accuracy", 1.1, 0.01, 0.2, "The accuracy is better"),
        ("perplexity", 0.8, 2.0, 4.0, "The perplexity is worse"),
        ("perplexity", 1.1, -2.0, -0.1, "The perplexity is better"),
    ],
)
def test_the_verdict_follows_the_paired_interval(metric, scale, low, high, said):
    ends = variant("dense", 1, metric), variant("pruned", scale, metric, low, high)
    assert facts_of(make(variants=ends))["Quality"].note.startswith(said)


def test_a_dense_model_alone_has_no_headline():
    assert make(variants=make().variants[:1]).facts() == []


def test_caveats_speak_of_this_run():
    text = "\n".join(make().caveats())
    assert "about ±2.0 points" in text
    assert "640 training examples of 11 tokens" in text
    assert "alike to 0.97" in text and "More examples" not in text
    assert "Energy was not measured" in text
    assert "cpu with 2 threads" in text
    assert "Peak memory could not be read" not in text
    shaky = dataclasses.replace(make().pruning, agreement=0.4)
    assert "More examples would change the plan" in "\n".join(make(pruning=shaky).caveats())
    blind = dataclasses.replace(make().pruning, agreement=None)
    assert "reads no gradients" in "\n".join(make(pruning=blind).caveats())


def test_a_difference_within_the_noise_of_the_machine_is_called_so():
    text = "\n".join(make().caveats())  # the quartiles of the made-up runs all overlap
    assert "At batch 1, 32 the middle halves" in text
    ends = [variant("dense", 1), variant("pruned", 0.5)]
    for i, v in enumerate(ends):
        tight = {
            size: dataclasses.replace(x, low=x.median * 0.9, high=x.median * 1.1)
            for size, x in v.measured.latency.items()
        }
        ends[i] = dataclasses.replace(v, measured=dataclasses.replace(v.measured, latency=tight))
    assert "the middle halves" not in "\n".join(make(variants=tuple(ends)).caveats())
