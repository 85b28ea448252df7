"""The whole walk on tiny models: what it leaves, what it does not repeat, how it survives."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from html import unescape
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from counters import counting
from datasets import Dataset, load_from_disk
from test_data import sentences, tiny_tokenizer, write

import hfprune
from hfprune import pipeline, steps
from hfprune.errors import DataError, HfpruneError, RecipeError
from hfprune.evaluation import hardware
from hfprune.evaluation.evaluate import evaluate_classification
from hfprune.files import alone_in
from hfprune.findings import Findings
from hfprune.importance.scores import Scores
from hfprune.pipeline import evaluation_batches
from hfprune.planning.latency import Curve
from hfprune.planning.plan import PruningPlan
from hfprune.processes import Processes
from hfprune.publishing.report import Report
from hfprune.publishing.units import Pruning
from hfprune.recipe import Recipe
from hfprune.structure.cost import counted_macs

pytestmark = pytest.mark.xdist_group("the walk")  # one worker makes the finished run, once

STEPS = {
    "dense": "Fine-tuning the dense model",
    "scores": "Scoring heads and neurons",
    "plan.json": "Planning",
    "kept.png": "Drawing what stays",
    "pruned": "Removing",
    "compensated": "Compensating by least squares",
    "distilled": "Distilling",
    "reloaded.json": "Reloading in a fresh process",
    "report.json": "Evaluating and measuring",
    "report.html": "Drawing the report",
}


def make(folder: Path, family="bert", **changes) -> Recipe:
    """A recipe for a tiny random model and a few made-up sentences, all in one folder."""
    folder.mkdir(exist_ok=True)
    head = "AutoModelForSequenceClassification" if family == "bert" else None
    tiny.model(family, head).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    files = write(folder, train=sentences(40), dev=sentences(8, 1), test=sentences(12, 2))
    values = {
        "model": str(folder / "model"),
        "output": str(folder / "run"),
        "data": {n: getattr(files, n) for n in ("train", "dev", "test")} | {"max_length": 12},
        "finetune": {"epochs": 1, "learning_rate": 1e-3, "batch_size": 8},
        "score": {"examples": 24, "batch_size": 4},
        "prune": {"budget": "macs=50%"},
        "distill": {"epochs": 1, "learning_rate": 1e-3, "batch_size": 8},
        "measure": {"batch_sizes": [1, 4], "lengths": [6, 24], "repeats": 2},
    }
    return Recipe.from_dict(values | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that went through: (recipe, report, what it said)."""
    recipe = make(tmp_path_factory.mktemp("finished"))
    said = []
    return recipe, hfprune.run(recipe, say=said.append), said


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to go on with: the recipe whose output it is."""
    recipe = finished[0]
    shutil.copytree(recipe.output, tmp_path / "run")
    return dataclasses.replace(recipe, output=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def compared(finished, tmp_path_factory):
    """The finished run, judged further: by other criteria and on other data."""
    folder = tmp_path_factory.mktemp("compared") / "run"
    shutil.copytree(finished[0].output, folder)
    recipe = changed(
        dataclasses.replace(finished[0], output=str(folder)),
        "measure",
        curve=("macs=80%", "macs=50%"),
        also={"others": finished[0].data.dev},
        lengths=(),
    )
    said = []
    return recipe, hfprune.run(recipe, say=said.append), said


def at(recipe: Recipe, name: str = "") -> Path:
    return Path(recipe.output, name)


def changed(recipe: Recipe, section: str, **values) -> Recipe:
    part = dataclasses.replace(getattr(recipe, section), **values)
    return dataclasses.replace(recipe, **{section: part})


def done_before(said):
    return [name for name, text in STEPS.items() if f"{text}: done before" in said]


def times(recipe: Recipe, *names):
    """When each file was last written, by its path in the run's folder."""
    paths = [p for name in names for p in (at(recipe, name), *at(recipe, name).rglob("*"))]
    return {p.relative_to(recipe.output): p.stat().st_mtime_ns for p in paths}


def leftovers(recipe: Recipe):
    return [p.name for p in at(recipe).iterdir() if p.name[0] == "." or p.name.endswith(".tmp")]


def test_a_run_leaves_every_artefact(finished):
    recipe, _, said = finished
    found = {p.name for p in at(recipe).iterdir()}
    assert found == {*STEPS, "steps.json", "recipe.yaml", "report.md", "figures"}
    assert not done_before(said)
    for text in STEPS.values():
        assert f"{text} ..." in said
    assert Recipe.from_dict(yaml.safe_load(at(recipe, "recipe.yaml").read_text())) == recipe
    reloaded = json.loads(at(recipe, "reloaded.json").read_text())
    assert reloaded["model"] == "distilled"
    assert reloaded["largest_logit_difference"] == {"hfprune": 0, "remote-code": 0}
    assert at(recipe, "kept.png").read_bytes().startswith(b"\x89PNG")
    plan = PruningPlan.load(at(recipe, "plan.json"))
    assert 0.49 < plan.macs_share <= 0.5
    assert plan.explain() in said
    scores = Scores.load(at(recipe, "scores"))
    assert {"fisher", "magnitude", "random"} <= scores.importance.keys()
    assert scores.examples == 24


@pytest.mark.slow
def test_criteria_are_compared_at_the_budgets_of_the_curve(compared):
    recipe, report, _ = compared
    points = report.curve
    series = [point.series for point in points]
    assert series == ["dense", *(["reconstruction"] * 2), *(["magnitude"] * 2), *(["random"] * 2)]
    dense, scores = hfprune.from_pretrained(at(recipe, "dense")), Scores.load(at(recipe, "scores"))
    test = evaluation_batches(recipe)
    for point in points[1:]:
        budget = f"macs={0.8 if point.budget > 0.6 else 0.5}"
        smaller = hfprune.remove(dense, hfprune.plan(dense, scores, budget, point.series))
        assert evaluate_classification(smaller, test).value == point.mean
        assert point.low <= point.mean <= point.high
    assert "curve.svg" in {p.name for p in at(recipe, "figures").iterdir()}


def test_every_variant_is_a_model_with_its_tokenizer(finished):
    recipe, _, _ = finished
    plan = PruningPlan.load(at(recipe, "plan.json"))
    weights = {}
    for name in ("dense", "pruned", "compensated", "distilled"):
        model = hfprune.from_pretrained(at(recipe, name))
        kept = {g.name: g.units for g in hfprune.inspect(model)}
        if name == "dense":
            assert kept == {g.name: g.units for g in plan.anatomy}
        else:
            assert kept == {g: len(units) for g, units in plan.keep.items()}
        assert at(recipe, f"{name}/tokenizer.json").is_file()
        weights[name] = model.base_model.encoder.layer[2].output.dense.weight
    assert not weights["pruned"].equal(weights["compensated"])


def test_the_report_is_of_these_models(finished):
    recipe, report, _ = finished
    assert [v.name for v in report.variants] == ["dense", "pruned", "compensated", "distilled"]
    assert report == Report.from_dict(json.loads(at(recipe, "report.json").read_text()))
    assert at(recipe, "report.md").read_text() == report.markdown()
    for variant in report.variants:
        model = hfprune.from_pretrained(at(recipe, variant.name))
        assert variant.params == model.num_parameters()
        assert variant.measured.latency.keys() == {1, 4}
        assert variant.measured.latency_by_length[4].keys() == {6, 24}
        assert variant.quality.examples == 12
        weights = at(recipe, f"{variant.name}/model.safetensors")
        assert variant.measured.file_bytes == weights.stat().st_size
    plan = PruningPlan.load(at(recipe, "plan.json"))
    assert report.pruning == Pruning.of(plan, Scores.load(at(recipe, "scores")))
    assert report.recipe == json.loads(json.dumps(recipe.to_dict()))
    page = at(recipe, "report.html").read_text()
    assert all(cell in unescape(page) for row in report.cells()[1:] for cell in row)
    assert at(recipe, "figures/latency-length-4.svg").is_file()
    assert report.variants[1].macs < report.variants[0].macs
    assert report.seconds.keys() == set(STEPS) - {"report.html"}


def test_a_finished_run_does_nothing_again(finished):
    recipe, report, _ = finished
    before, said = times(recipe, *STEPS), []
    assert hfprune.run(recipe, say=said.append) == report
    assert done_before(said) == list(STEPS)
    assert times(recipe, *STEPS) == before


def test_another_budget_keeps_the_dense_model_and_its_scores(copied):
    kept, redone = ("dense", "scores"), ("plan.json", "kept.png", "pruned", "compensated")
    before, said = times(copied, *kept, *redone), []
    other = changed(copied, "prune", budget="macs=60%")
    assert hfprune.run(other, say=said.append, until="distilled") is None
    assert done_before(said) == list(kept)
    after = times(copied, *kept, *redone)
    for path, written in before.items():
        assert (after.get(path) == written) == (path.parts[0] in kept), path
    assert PruningPlan.load(at(copied, "plan.json")).budget == hfprune.Budget.parse("macs=60%")
    # Measurements are of the old models; the next full run will see that.
    said.clear()
    hfprune.run(other, say=said.append, until="distilled")
    assert done_before(said) == [*kept, *redone, "distilled"]


def test_a_step_that_fails_leaves_nothing_half_written(copied, monkeypatch):
    other = changed(copied, "prune", budget="macs=60%")

    def fails(dense, pruned, batches, kept):
        raise RuntimeError("the power went")

    old = PruningPlan.load(at(copied, "plan.json"))
    with monkeypatch.context() as patch:
        patch.setattr(steps, "compensate", fails)
        with pytest.raises(RuntimeError, match="the power went"):
            hfprune.run(other, say=str)
    assert not leftovers(copied)
    assert "compensated" not in done_of(copied, other)
    said = []
    hfprune.run(other, say=said.append, until="compensated")
    assert done_before(said) == ["dense", "scores", "plan.json", "kept.png", "pruned"]
    assert not leftovers(copied)
    made = PruningPlan.load(at(copied, "plan.json"))
    dense = hfprune.from_pretrained(at(copied, "dense"))
    assert made == hfprune.plan(dense, Scores.load(at(copied, "scores")), "macs=60%")
    assert made.keep != old.keep
    kept = hfprune.inspect(hfprune.from_pretrained(at(copied, "compensated")))
    assert {g.name: g.units for g in kept} == {g: len(u) for g, u in made.keep.items()}


def done_of(copied, recipe):
    """Artefacts that a run of this recipe would not make again."""
    said = []

    class Stop(Exception):
        pass

    def say(line):
        if line.endswith(" ..."):
            raise Stop
        said.append(line)

    with pytest.raises(Stop):
        hfprune.run(recipe, say=say)
    return done_before(said)


def test_an_artefact_is_never_taken_for_that_of_another_recipe(copied, monkeypatch):
    """Killed after the new artefact is in place, before it is written down: then the old recipe."""
    other = changed(copied, "prune", budget="macs=60%")
    write_done = pipeline._Run._write_done

    def killed(self, done):
        if at(copied, "pruned").stat().st_mtime_ns != before:
            raise KeyboardInterrupt
        write_done(self, done)

    before = at(copied, "pruned").stat().st_mtime_ns
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline._Run, "_write_done", killed)
        hfprune.run(other, say=str, until="pruned")
    hfprune.run(copied, say=str, until="pruned")
    plan = PruningPlan.load(at(copied, "plan.json"))
    kept = hfprune.inspect(hfprune.from_pretrained(at(copied, "pruned")))
    assert {g.name: g.units for g in kept} == {g: len(u) for g, u in plan.keep.items()}


RUN = """
import sys, torch
torch.set_num_threads(1)
from hfprune import run
run(sys.argv[1], until="distilled")
"""


@pytest.mark.slow
def test_a_killed_distillation_goes_on_where_it_was(copied, tmp_path):
    shutil.rmtree(at(copied, "distilled"))
    longer = changed(copied, "distill", epochs=6.0)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(longer.to_dict()))
    plan = at(copied, "plan.json").read_bytes()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path / "recipe.yaml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 90
    while not list(
        at(copied).glob(".*-checkpoints/checkpoint-10/trainer_state.json")
    ):  # of 30 steps
        assert time.monotonic() < deadline and process.poll() is None, "it did not get there"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not at(copied, "distilled").exists()
    (checkpoints,) = at(copied).glob(".*-checkpoints")
    before = times(copied, checkpoints.name)

    whole = dataclasses.replace(longer, output=str(tmp_path / "whole"))
    ignore = shutil.ignore_patterns(".*")
    shutil.copytree(at(copied), tmp_path / "whole", ignore=ignore)
    hfprune.run(whole, say=str, until="distilled")

    hfprune.run(longer, say=str, until="distilled")
    assert before and not leftovers(copied)
    assert at(copied, "plan.json").read_bytes() == plan
    models = [hfprune.from_pretrained(at(r, "distilled")) for r in (longer, whole)]
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: name + m)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture
def recipe(tmp_path):
    return make(tmp_path)


def test_a_folder_that_is_no_run_is_not_touched(recipe):
    at(recipe).mkdir()
    at(recipe, "thesis.tex").write_text("the only copy")
    start = time.monotonic()
    with pytest.raises(RecipeError, match="exists and is not the folder of a run"):
        hfprune.run(recipe, say=str)
    assert time.monotonic() - start < 1
    assert files(at(recipe)) == ["thesis.tex"]


@pytest.mark.parametrize("left", ["", '{"dense": {"key', "[1]", "7"])
def test_a_damaged_list_of_what_is_done_is_named(left, recipe):
    at(recipe).mkdir()
    at(recipe, "steps.json").write_text(left)
    with pytest.raises(RecipeError, match=r"^output: .*steps\.json is damaged .* remove this one"):
        hfprune.run(recipe, say=str)
    assert at(recipe, "steps.json").read_text() == left


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("prune", {"criterion": "fischer"}, "Did you mean 'fisher'"),
        ("prune", {"budget": "mac=50%"}, "Did you mean 'macs'"),
        ("score", {"examples": 0}, "score.examples must be more than 0"),
        ("data", {"train": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
    ],
)
def test_a_wrong_recipe_writes_nothing(section, values, message, recipe):
    with pytest.raises(HfpruneError, match=message):
        hfprune.run(changed(recipe, section, **values), say=str)
    assert not at(recipe).exists()


def test_an_impossible_budget_leaves_what_was_finished(copied):
    with pytest.raises(HfpruneError, match="No structure keeps only macs=1%"):
        hfprune.run(changed(copied, "prune", budget="macs=1%"), say=str)
    assert not leftovers(copied)
    said = []
    hfprune.run(copied, say=said.append, until="distilled")
    assert {"dense", "scores"} <= set(done_before(said))


def test_files_that_changed_are_read_again(copied, tmp_path):
    """Data that are judged besides are read by the report only, and the model by everything."""
    other = write(tmp_path, dev=sentences(8, 3)).dev
    also = changed(copied, "measure", also={"other": other})
    before = keys(also)
    write(tmp_path, dev=sentences(8, 4))
    assert differ(before, keys(also)) == ["report.json", "report.html"]
    folder = tmp_path / "model"
    shutil.copytree(copied.model, folder)
    of_copy = dataclasses.replace(also, model=str(folder))
    before = keys(of_copy)
    (folder / "optimizer.pt").touch()
    (folder / "config.json").touch()
    assert keys(of_copy) == before
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert differ(before, keys(of_copy)) == list(STEPS)
    of_gguf = dataclasses.replace(of_copy, gguf_file="model.gguf")
    (folder / "model.gguf").write_bytes(b"one")
    before = keys(of_gguf)
    (folder / "model.gguf").write_bytes(b"two")
    assert differ(before, keys(of_gguf)) == list(STEPS)


def keys(recipe):
    """What a run would make every artefact under."""
    run, key, found = pipeline._Run(recipe, str, Processes()), "", {}
    for step in run.steps.listed():
        found[step.artefact] = key = run._key(step, key)
    return found


def differ(before, after):
    return [artefact for artefact, key in before.items() if after[artefact] != key]


def test_what_other_recipes_left_half_made_goes(copied):
    other = changed(copied, "prune", budget="macs=60%")
    for name in ("plan.json", "pruned", "distilled-checkpoints"):
        at(copied, f".0123456789abcdef-{name}").mkdir()
    at(copied, ".mine").touch()
    hfprune.run(other, say=str, until="plan.json")
    assert leftovers(copied) == [".mine"]


def test_papers_are_written_whole(copied, monkeypatch):
    def half(path, text, **options):
        path.write_bytes(text.encode()[:9])
        raise OSError("the disk is full")

    before = [at(copied, name).read_bytes() for name in ("recipe.yaml", "report.md")]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full"):
        patch.setattr(Path, "write_text", half)
        hfprune.run(copied, say=str)
    assert [at(copied, name).read_bytes() for name in ("recipe.yaml", "report.md")] == before
    assert not leftovers(copied)


def test_a_folder_of_data_is_known_by_its_files(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"one")
    first = pipeline._digest(tmp_path)
    assert pipeline._digest(tmp_path) == first
    (tmp_path / "cat" / "1.png").write_bytes(b"two")
    second = pipeline._digest(tmp_path)
    (tmp_path / "cat").rename(tmp_path / "dog")
    assert len({first, second, pipeline._digest(tmp_path)}) == 3


def test_what_is_made_of_a_saved_dataset_does_not_change_it(tmp_path):
    saved = tmp_path / "saved"
    Dataset.from_list(sentences(4)).save_to_disk(saved)
    first = pipeline._digest(saved)
    load_from_disk(saved).map(lambda row: {"words": row["text"].split()})
    assert list(saved.glob("cache-*")) and pipeline._digest(saved) == first
    Dataset.from_list(sentences(5)).save_to_disk(saved)
    assert pipeline._digest(saved) != first


def test_a_curve_that_no_plan_can_meet_is_seen_before_anything_is_removed(copied):
    impossible = changed(copied, "measure", curve=("macs=50%", "macs=1%"))
    impossible = changed(impossible, "prune", budget="macs=60%")
    with pytest.raises(HfpruneError, match=r"measure\.curve: No structure keeps only macs=1%"):
        hfprune.run(impossible, say=str, until="pruned")
    assert not leftovers(copied)
    assert done_of(copied, impossible) == ["dense", "scores"]


def test_a_budget_of_latency_is_planned_by_one_table(copied, tmp_path):
    """Measured once and kept, or brought from elsewhere; the same table gives the same plan."""
    recipe = changed(copied, "prune", budget="latency=100%@2x12, params=80%")
    recipe = changed(recipe, "measure", threads=2)
    said = []
    hfprune.run(recipe, say=said.append, until="plan.json")
    assert "Measuring latency ..." in said
    table = hfprune.LatencyTable.load(at(copied, "latency.json"))
    assert (table.batch_size, table.tokens, table.machine["threads"]) == (2, 12, 2)
    measured = at(copied, "latency.json").stat().st_mtime_ns
    dense, scores = hfprune.from_pretrained(at(copied, "dense")), Scores.load(at(copied, "scores"))

    def planned_by(table, budget):
        plan = PruningPlan.load(at(copied, "plan.json"))
        return plan == hfprune.plan(dense, scores, budget, latency=table)

    assert planned_by(table, "latency=100%@2x12, params=80%")
    less = changed(recipe, "prune", budget="latency=100%@2x12, params=60%")
    hfprune.run(less, say=str, until="plan.json")
    assert at(copied, "latency.json").stat().st_mtime_ns == measured
    assert planned_by(table, "latency=100%@2x12, params=60%")

    less = changed(recipe, "prune", budget="latency=70%@2x12")
    brought = changed(less, "prune", latency_table=str(tmp_path / "table.json"))
    with pytest.raises(RecipeError, match=r"prune\.latency_table: there is no file"):
        hfprune.run(brought, say=str)
    slow = dict.fromkeys(table.groups, Curve((0.0, 1.0), (0.0, 1.0)))
    elsewhere = dataclasses.replace(table, groups=slow)
    elsewhere.save(tmp_path / "table.json")
    said.clear()
    hfprune.run(brought, say=said.append, until="plan.json")
    assert not any("Measuring latency" in line for line in said)
    assert planned_by(elsewhere, "latency=70%@2x12")


@pytest.mark.parametrize("finetuned", [True, False])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"data\.train \(.*\) has no examples"),
        ([{"text": "good"}], "Unknown column 'label'"),
        ([{"text": "good", "label": None}], "the 'label' of example 0 is None"),
    ],
)
def test_data_that_cannot_serve(rows, message, finetuned, recipe, tmp_path):
    write(tmp_path, train=rows)
    if not finetuned:
        recipe = dataclasses.replace(recipe, finetune=None)
    with pytest.raises(DataError, match=message):
        hfprune.run(recipe, say=str)
    assert not leftovers(recipe)
    assert files(at(recipe)) == ["steps.json"]


def test_a_column_that_is_missing_is_told_by_the_fields_that_name_it(recipe, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"sentence": "good", "label": 1}\n')
    other = changed(recipe, "measure", also={"other": str(tmp_path / "other.jsonl")})
    with pytest.raises(DataError, match=r"^measure\.also\.other: Unknown .* in `data\.text`\.$"):
        hfprune.run(other, say=str)
    with pytest.raises(DataError, match=r"^data\.train: Unknown column 'txt'.* in `data\.text`\.$"):
        hfprune.run(changed(other, "data", text="txt"), say=str)


@pytest.mark.parametrize("until", ["dense", None])
def test_other_data_of_a_class_that_the_model_does_not_know(until, copied, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"text": "good", "label": 7}\n')
    other = changed(copied, "measure", also={"other": str(tmp_path / "other.jsonl")})
    if until:
        other = dataclasses.replace(other, seed=1)
    with pytest.raises(DataError, match=r"^measure\.also\.other: the labels are of 8 classes, and"):
        hfprune.run(other, say=str, until=until)


@pytest.mark.slow
def test_the_commit_that_a_hub_id_stood_for_is_kept(recipe, tmp_path):
    """From the Hub's cache, laid out as the client lays it out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--me--tiny"
    shutil.copytree(recipe.model, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    of_hub = dataclasses.replace(recipe, model="me/tiny", finetune=None)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(of_hub.to_dict()))
    code = "import sys; from hfprune import run; run(sys.argv[1], until='dense')"
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "recipe.yaml"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    done = json.loads(at(recipe, "steps.json").read_text())
    assert done["dense"]["commits"] == {"model": commit}


def test_a_batch_that_the_test_split_cannot_fill(recipe):
    with pytest.raises(RecipeError, match="12 examples, too few for a batch of 13"):
        hfprune.run(changed(recipe, "measure", batch_sizes=(1, 13)), say=str)
    assert files(at(recipe)) == ["steps.json"]


def test_a_length_that_the_model_does_not_run_at(recipe):
    with pytest.raises(DataError, match=r"65 tokens .*max_position_embeddings is 64"):
        hfprune.run(changed(recipe, "measure", lengths=(65, 8)), say=str)
    assert files(at(recipe)) == ["steps.json"]


def test_a_loss_that_is_not_a_number(recipe):
    broken = tiny.model("bert", "AutoModelForSequenceClassification")
    with torch.no_grad():
        broken.classifier.weight[0, 0] = torch.nan
    broken.save_pretrained(recipe.model)
    recipe = dataclasses.replace(recipe, finetune=None)
    with pytest.raises(DataError, match="loss of calibration batch 0 is nan"):
        hfprune.run(recipe, say=str)
    assert not leftovers(recipe)
    assert {p.name for p in at(recipe).iterdir()} == {"steps.json", "dense"}


def test_fine_tuning_that_diverges_leaves_no_checkpoint(recipe):
    wild = changed(recipe, "finetune", learning_rate=1e30)
    with pytest.raises(DataError, match=r"not finite at global step \d, batch 1 of 1 on process 0"):
        hfprune.run(wild, say=str)
    assert not list(at(recipe).rglob("checkpoint-*")) and not at(recipe, "dense").exists()


def generation(folder, **changes):
    return make(folder, "llama", **{"task": "text-generation", "finetune": None} | changes)


def test_a_language_model(tmp_path):
    recipe = generation(tmp_path, prune={"budget": "params=70%"})
    assert hfprune.run(recipe, say=str, until="distilled") is None
    plan = PruningPlan.load(at(recipe, "plan.json"))
    assert 0.69 < plan.params_share <= 0.7
    assert plan.tokens == 12
    model = hfprune.from_pretrained(at(recipe, "distilled"))
    layers = [hfprune.from_pretrained(at(recipe, n)).model.layers for n in ("dense", "distilled")]
    dense, pruned = (sum(p.numel() for p in stack.parameters()) for stack in layers)
    assert pruned / dense == pytest.approx(plan.params_share)
    compensated = hfprune.from_pretrained(at(recipe, "compensated"))
    assert not compensated.lm_head.weight.equal(model.lm_head.weight)
    tokens = model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=4, min_new_tokens=4)
    assert tokens.shape == (1, 7)


def test_an_encoder_decoder_that_classifies_is_trained_and_counted(tmp_path):
    recipe = make(tmp_path, "t5")
    hfprune.run(recipe, say=str, until="dense")
    one = Findings(steps.Steps(recipe, str, Processes()))._one_of((6, 7))
    assert counted_macs(hfprune.from_pretrained(at(recipe, "dense")), one)


@pytest.mark.slow
def test_a_language_models_whole_run(tmp_path):
    recipe = generation(tmp_path, distill=None)
    report = hfprune.run(recipe, say=str)
    assert [v.name for v in report.variants] == ["dense", "pruned", "compensated"]
    assert {v.quality.metric for v in report.variants} == {"perplexity"}
    assert json.loads(at(recipe, "reloaded.json").read_text())["model"] == "compensated"


def test_the_energy_of_every_step_is_kept_where_it_can_be_read(tmp_path, monkeypatch):
    recipe = make(tmp_path, distill=None)
    (tmp_path / "powercap").mkdir()
    monkeypatch.setattr(hardware, "POWERCAP", tmp_path / "powercap")
    with counting(tmp_path / "powercap", **{"package-0": 20}):
        hfprune.run(recipe, say=str, until="result")
    done = steps.steps_done(at(recipe))
    energy = steps.Steps(recipe, str, Processes()).energy
    assert energy.keys() == done.keys() == set(list(STEPS)[:6])
    assert sum(energy.values()) == pytest.approx(
        20 * sum(entry["seconds"] for entry in done.values()), rel=0.2, abs=10
    )
    del done["scores"]["joules"]  # of a step that was made where no counter can be read
    at(recipe, "steps.json").write_text(json.dumps(done))
    assert steps.Steps(recipe, str, Processes()).energy == {}


@pytest.mark.slow
def test_data_of_another_kind_are_judged_besides(compared):
    recipe, report, said = compared
    assert done_before(said) == list(STEPS)[:-2]
    others = dataclasses.replace(recipe.data, test=recipe.data.dev)
    batches = evaluation_batches(dataclasses.replace(recipe, data=others))
    for variant in report.variants:
        model = hfprune.from_pretrained(at(recipe, variant.name))
        found = variant.also["others"]
        assert found.quality == evaluate_classification(model, batches)
        assert found.quality.examples == 8 and variant.quality.examples == 12
        assert (found.difference is None) == (variant.name == "dense")
    assert "Quality on others" in at(recipe, "report.md").read_text()


@pytest.mark.slow
def test_a_uniform_run_needs_no_hfprune_to_load(tmp_path):
    prune = {"budget": "params=70%", "uniform": True, "protect": []}
    recipe = generation(tmp_path, prune=prune, distill=None)
    said = []
    assert hfprune.run(recipe, say=said.append, until="reloaded.json") is None
    differences = json.loads(at(recipe, "reloaded.json").read_text())["largest_logit_difference"]
    assert set(differences) == {"hfprune", "stock"}
    assert any("by plain transformers without hfprune" in line for line in said)
    assert not list(at(recipe).rglob("modeling_hfprune.py"))


def test_constraints_that_do_not_fit_are_refused_before_training(tmp_path):
    recipe = make(tmp_path, prune={"protect": ["encoder.layer.9"]})
    with pytest.raises(HfpruneError, match=r"protect 'encoder.layer.9'. Did you mean 'encoder"):
        hfprune.run(recipe, say=str)
    assert not at(recipe, "dense").exists()
    with pytest.raises(HfpruneError, match=r"uniform needs .*min_heads"):
        hfprune.run(changed(recipe, "prune", uniform=True, min_heads=0), say=str)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("prune", "budget", "latency=50%@1x65"), ("measure", "curve", ("latency=50%@1x65",))],
)
def test_a_budget_that_cannot_be_counted_is_refused_before_training(
    section, field, value, tmp_path
):
    recipe = changed(make(tmp_path), section, **{field: value})
    with pytest.raises(HfpruneError, match="65 tokens are more than the model's 64 positions"):
        hfprune.run(recipe, say=str)
    assert not at(recipe, "dense").exists()


def test_a_budget_that_cannot_be_counted_is_refused_before_scoring(tmp_path):
    recipe = make(tmp_path)
    hfprune.run(recipe, say=str, until="dense")
    with pytest.raises(HfpruneError, match="65 tokens are more than the model's 64 positions"):
        hfprune.run(changed(recipe, "prune", budget="latency=50%@1x65"), say=str)
    assert not at(recipe, "scores").exists()


def test_a_test_split_that_also_teaches_is_told(tmp_path):
    recipe = make(tmp_path)
    rows = Path(recipe.data.test).read_text().splitlines(keepends=True)
    Path(recipe.data.train).write_text("".join(rows[:3]) + '{"text": "one", "label": 1}\n')
    said = []
    hfprune.run(changed(recipe, "data", test=recipe.data.train), say=said.append, until="dense")
    told = "  Warning: 4 of 4 examples of data.test (100.0%) also stand in data.train"
    assert said[1].startswith(told)
    told = "  Warning: 3 of 12 examples of data.test (25.0%) also stand in data.train"
    hfprune.run(recipe, say=said.append, until="dense")
    assert any(line.startswith(told) for line in said)


def test_classes_that_nothing_teaches_are_told(tmp_path):
    recipe, said = make(tmp_path), []
    with open(recipe.data.test, "a") as test:
        test.write('{"text": "good", "label": 9}\n')
    hfprune.run(recipe, say=said.append, until="dense")
    told = "  Warning: data.test has examples of classes that data.train has none of: 9 (LABEL_9)."
    assert [line for line in said if "Warning" in line and line.startswith(told)]
    assert not any("data.dev" in line for line in said)


@pytest.mark.parametrize("also", [False, True])
def test_texts_longer_than_the_model_reads_are_refused_before_training(also, tmp_path):
    recipe = changed(make(tmp_path), "data", max_length=80)
    other = tmp_path / "other.jsonl"
    with open(other if also else recipe.data.train, "a") as file:
        file.write(json.dumps({"text": "good " * 90, "label": 1}) + "\n")
    if also:
        recipe = changed(recipe, "measure", also={"other": str(other)})
    message = r"^data\.max_length is 80: .* on examples of 80 tokens .*embeddings is 64"
    with pytest.raises(RecipeError, match=message):
        hfprune.run(recipe, say=str, until="dense")
    assert not list(at(recipe).glob(".*checkpoints"))


def test_two_runs_do_not_work_in_one_folder_at_once(copied, tmp_path):
    with (
        alone_in(copied.output),
        pytest.raises(RecipeError, match=r"^output: another run is at work in .*run; wait until"),
    ):
        hfprune.run(copied, say=str)
    assert hfprune.run(copied, say=str) is not None


def test_a_run_that_drops_layers(tmp_path):
    recipe = make(tmp_path, prune={"budget": "macs=50%", "layers": 2})
    said = []
    assert hfprune.run(recipe, say=said.append, until="distilled") is None
    plan = PruningPlan.load(at(recipe, "plan.json"))
    (kept,) = (plan.keep[stack.name] for stack in plan.anatomy.stacks)
    assert len(kept) == 2 and 0.49 < plan.macs_share <= 0.5
    assert any("whole layers go" in line for line in said)
    for name in ("pruned", "compensated", "distilled"):
        assert len(hfprune.from_pretrained(at(recipe, name)).bert.encoder.layer) == 2
