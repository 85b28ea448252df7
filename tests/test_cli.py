"""The command line as a user meets it: help at once, errors in one line."""

import subprocess
import sys
from pathlib import Path

import pytest
import saved
import tiny
import torch
import yaml
from test_data import sentences, tiny_tokenizer, write
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    FNetConfig,
    FNetModel,
    ViTImageProcessorPil,
)

from hfprune import cli
from hfprune.importance.scores import Scores
from hfprune.importance.scoring import score
from hfprune.planning.plan import PruningPlan
from hfprune.pruning import remove
from hfprune.publishing import rehearsal
from hfprune.structure import checkpoint, modeling_hfprune
from hfprune.structure.checkpoint import from_pretrained
from hfprune.structure.modeling_hfprune import StructureError

COMMANDS = {
    *("distill", "prune", "run", "inspect", "score", "latency", "plan", "remove", "push", "check")
}


def hfprune(monkeypatch, capsys, *arguments):
    """(exit status, standard output, standard error) of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["hfprune", *map(str, arguments)])
    capsys.readouterr()  # what the test's own setup said
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *arguments: hfprune(monkeypatch, capsys, *arguments)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.model("bert", "AutoModelForSequenceClassification").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, model):
    """A recipe file for a tiny model."""
    files = write(tmp_path, train=sentences(16), dev=sentences(4, 1), test=sentences(4, 2))
    values = {
        "model": str(model),
        "output": str(tmp_path / "run"),
        "data": {"train": files.train, "dev": files.dev, "test": files.test},
        "score": {"moments": True},
        "measure": {"batch_sizes": [1]},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


HELP = """
import sys
from hfprune.cli import app
try:
    app(["--help"])
except SystemExit as end:
    heavy = {"torch", "transformers", "datasets", "numpy"} & sys.modules.keys()
    print("loaded:", *sorted(heavy))
    sys.exit(end.code)
"""


def test_help_answers_without_loading_torch():
    command = [sys.executable, "-c", HELP]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1] == "loaded:"
    words = ended.stdout.split()
    assert all(command in words for command in COMMANDS)


def test_the_command_is_installed():
    command = [str(Path(sys.executable).with_name("hfprune")), "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    assert "score, plan, remove, recover, publish" in ended.stdout


def test_commands_are_those_that_are_tested_here():
    assert {c.name or c.callback.__name__ for c in cli.app.registered_commands} == COMMANDS


def test_check(run, recipe):
    status, out, err = run("check", recipe)
    assert (status, err) == (0, "")
    assert "is a complete recipe" in out


def test_inspect(run, model):
    status, out, _ = run("inspect", model)
    assert status == 0
    assert "encoder.layer.2.output.dense" in out
    assert "outside the layers" in out


def test_score_plan_and_remove(run, recipe, model, tmp_path):
    status, _, _ = run("score", recipe)
    assert status == 0
    scores, plan, small = tmp_path / "run" / "scores", tmp_path / "plan.json", tmp_path / "small"
    status, out, _ = run("plan", model, scores, "macs=60%", "--output", plan)
    assert status == 0
    made = PruningPlan.load(plan)
    assert made.explain() in out
    assert 0.594 <= made.macs_share <= 0.6
    status, out, _ = run("remove", model, plan, small)
    assert status == 0
    kept = {g.name: g.units for g in made.anatomy.of(from_pretrained(small))}
    assert kept == {name: len(units) for name, units in made.keep.items()}
    status, _, err = run("remove", model, plan, small)
    assert status == 2
    assert "exists; choose a folder that does not" in err
    status, _, _ = run("remove", model, plan, tmp_path / "refitted", "--scores", scores)
    assert status == 0
    by_hand = remove(from_pretrained(model), made, compensate=Scores.load(scores))
    refitted = from_pretrained(tmp_path / "refitted")
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(refitted.get_parameter(name), parameter, rtol=0, atol=0)
    outlet = "bert.encoder.layer.0.output.dense.weight"
    as_cut = from_pretrained(small).get_parameter(outlet)
    assert not torch.equal(as_cut, refitted.get_parameter(outlet))
    shallow = tmp_path / "shallow.json"
    options = ["--layers", 2, "--protect", "encoder.layer.2.attention", "--output", shallow]
    status, out, _ = run("plan", model, scores, "macs=60%", *options)
    assert status == 0 and "Of encoder.layer, whole layers go" in out
    made = PruningPlan.load(shallow)
    assert 2 in made.keep["encoder.layer"]
    status, _, err = run("plan", model, scores, "macs=60%", "--uniform")
    assert status == 2 and "cannot hold fewer heads" in err
    status, _, err = run("plan", model, scores, "macs=60%", "--experts", 2)
    assert status == 2 and "has no routed experts" in err


def test_score_stops_at_the_scores_of_the_first_round(run, recipe, tmp_path):
    edited(recipe, "measure:", "prune: {budget: [macs=80%, macs=60%]}\nmeasure:")
    assert run("score", recipe)[0] == 0
    assert Scores.load(tmp_path / "run" / "round-1" / "scores").moments
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "dense",
        "round-1",
        "steps.json",
    }


@pytest.fixture(scope="module")
def planned(model, tmp_path_factory):
    """Files of a plan and of scores for the model."""
    loaded = from_pretrained(model)
    plan = saved.plan_of(loaded)
    folder = tmp_path_factory.mktemp("planned")
    plan.save(folder / "plan.json")
    saved.scores_of(plan).save(folder / "scores")
    return folder


def test_plan_keeps_what_it_is_told_and_counts_as_it_is_told(run, model, planned, tmp_path):
    plan = tmp_path / "plan.json"
    options = ["--criterion", "fisher", "--min-heads", 4, "--min-neurons", 7, "--tokens", 5]
    budget = "macs=85%"
    status, _, err = run("plan", model, planned / "scores", budget, *options, "--output", plan)
    assert status == 0, err
    made = PruningPlan.load(plan)
    heads = {len(made.keep[g.name]) for g in made.anatomy if g.kind == "head"}
    neurons = {len(made.keep[g.name]) for g in made.anatomy if g.kind == "neuron"}
    assert heads == {4} and min(neurons) >= 7 and made.tokens == 5


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        ("half", [], "Cannot read the budget"),
        ("macs=50%", ["--criterion", "fischer"], "Did you mean 'fisher'"),
        ("macs=50%", ["--criterion", "taylor"], "Unknown criterion 'taylor'"),
        ("macs=50%", ["--round-to", 0], "round_to 1 or more"),
        ("macs=50%", ["--latency", "nowhere.json"], "nowhere.json is not a latency table"),
        ("macs=50%", ["--output", "."], ". is a folder; give --output the name of a file"),
    ],
)
def test_plan_looks_at_what_is_small_before_the_model(
    budget, options, message, run, model, planned, monkeypatch
):
    monkeypatch.setattr(checkpoint, "from_pretrained", lambda _: pytest.fail("the model is loaded"))
    options = ["--criterion", "fisher", *options]
    status, _, err = run("plan", model, planned / "scores", budget, *options)
    assert status == 2 and one_line(err) and message in err


@pytest.mark.parametrize("option", ["--batch-size", "--tokens", "--threads", "--repeats"])
def test_latency_is_of_one_at_least(option, run, model, tmp_path):
    status, _, err = run("latency", model, tmp_path / "table.json", option, 0)
    assert status == 2 and option in err and not (tmp_path / "table.json").exists()


def test_remove_keeps_the_tokenizer_if_there_is_one(run, model, planned, tmp_path):
    bare, small, other = tmp_path / "bare", tmp_path / "small", tmp_path / "other"
    assert run("remove", model, planned / "plan.json", small)[0] == 0
    given, kept = (AutoTokenizer.from_pretrained(folder) for folder in (model, small))
    assert kept("good film").input_ids == given("good film").input_ids
    from_pretrained(model).save_pretrained(bare)
    assert run("remove", bare, planned / "plan.json", other)[0] == 0
    assert not list(other.glob("*token*"))
    (bare / "tokenizer.json").write_text("{")
    status, _, err = run("remove", bare, planned / "plan.json", tmp_path / "third")
    assert status == 2 and one_line(err) and f"The processor of {bare} cannot be loaded" in err


def test_remove_keeps_what_reads_images(run, tmp_path):
    model, plan, small = tmp_path / "vit", tmp_path / "plan.json", tmp_path / "small"
    dense = tiny.model("vit")
    dense.save_pretrained(model)
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(model)
    saved.plan_of(dense).save(plan)
    assert run("remove", model, plan, small)[0] == 0
    assert AutoImageProcessor.from_pretrained(small).size["height"] == 24


@pytest.mark.parametrize("error", [StructureError("of other outputs"), KeyboardInterrupt()])
def test_remove_leaves_all_or_nothing(error, run, model, planned, tmp_path, monkeypatch):
    def stops(saved, reloaded):
        raise error

    arguments = ("remove", model, planned / "plan.json", tmp_path / "small")
    with monkeypatch.context() as patch:
        patch.setattr(modeling_hfprune, "compare", stops)
        status, _, err = run(*arguments)
    assert status == 130 or (status == 2 and err.endswith(f"cannot be saved: {error}\n"))
    assert not list(tmp_path.iterdir())
    assert run(*arguments)[0] == 0


def test_plan_by_a_latency_table(run, recipe, model, tmp_path):
    assert run("score", recipe)[0] == 0
    scores, table, plan = tmp_path / "run" / "scores", tmp_path / "table.json", tmp_path / "p.json"
    status, out, _ = run("latency", model, table, "--tokens", 16)
    assert status == 0 and f"{table}: use it by --latency, @1x16" in out
    options = ["--latency", table, "--output", plan]
    status, out, _ = run("plan", model, scores, "latency=100%@1x16, macs=70%", *options)
    assert status == 0 and "latency=100%@1x16: " in out
    assert PruningPlan.load(plan).macs_share <= 0.7
    status, _, err = run("plan", model, scores, "latency=60%@4x16", *options)
    assert status == 2 and "write latency=...@1x16" in err


def test_prune_and_distill_walk_a_recipe_that_far(run, recipe, tmp_path):
    for command in ("prune", "distill"):  # the recipe does not distil: both end at the same model
        status, out, _ = run(command, recipe)
        assert status == 0 and "Compensating by least squares" in out
    assert (tmp_path / "run" / "compensated" / "config.json").is_file()
    assert not (tmp_path / "run" / "report.json").exists()


def test_push_says_what_it_would_upload(run, tmp_path):
    small, dry = saved.save(tmp_path / "small"), tmp_path / "dry"
    status, out, _ = run("push", small, "me/small", "--dry-run", dry, "--license", "mit")
    assert status == 0 and "6 files" in out
    assert "license: mit" in (dry / "README.md").read_text()
    assert from_pretrained(dry).config.hfprune == from_pretrained(small).config.hfprune
    status, _, err = run("push", small, "me/small")  # the tests are offline
    assert status == 2 and "HF_HUB_OFFLINE" in err
    status, _, err = run("push", tmp_path / "nothing", "me/small")
    assert status == 2 and one_line(err)
    status, _, err = run("push", small, "bad name!", "--dry-run", tmp_path / "other")
    assert status == 2 and one_line(err) and "'bad name!' names no repository" in err
    assert not (tmp_path / "other").exists()


def test_a_rehearsal_is_of_the_arguments_that_were_given(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(rehearsal, "rehearse_push", lambda *given: told.append(given) or 0)
    arguments = ["push", str(tmp_path), "me/small", "--private"]
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, "--rehearse"])
    assert caught.value.code == 0
    assert told == [(arguments, tmp_path, "me/small")]


@pytest.mark.slow
def test_push_lays_out_a_family(run, tmp_path):
    sizes, dry = saved.family(tmp_path / "sizes", base=None), tmp_path / "dry"
    status, out, _ = run("push", sizes, "me/small", "--family", "collection", "--dry-run", dry)
    assert status == 0 and len(out.splitlines()) == 3
    assert all(from_pretrained(dry / size).config.hfprune for size in ("macs-80", "macs-40"))
    status, _, err = run("push", sizes, "me/small", "--family", "revisions", "--revision", "one")
    assert status == 2 and one_line(err) and "--revision is of one model" in err
    status, _, err = run("push", tmp_path, "me/small", "--family", "revisions")
    assert status == 2 and one_line(err) and "not the folder of a run" in err


@pytest.mark.slow
def test_a_rehearsal_pushes_and_downloads_again(tmp_path):
    small = saved.save(tmp_path / "small")
    before = sorted(small.iterdir())
    command = [str(Path(sys.executable).with_name("hfprune")), "push", str(small), "me/small"]
    options = ["--rehearse", "--revision", "macs-50", "--private"]
    ended = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    for text in (
        *("A rehearsal", "macs-50", "Nothing was published"),
        *("hfprune.from_pretrained: the same outputs", "without hfprune: the same outputs"),
    ):
        assert text in ended.stdout
    assert "hf_" not in ended.stdout + ended.stderr
    assert sorted(small.iterdir()) == before


def one_line(err):
    """Whether a message of one line is all that is said, besides the bar of a model that loads."""
    lines = [line for line in err.splitlines() if line and "Loading weights" not in line]
    return len(lines) == 1 and lines[0].startswith("hfprune: ")


def edited(recipe, old, new):
    recipe.write_text(recipe.read_text().replace(old, new))
    return recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model:", "modle:", "Did you mean 'model'"),
        ("batch_sizes", "batchsizes", "Did you mean 'batch_sizes'"),
        ("train.jsonl", "train.jsnl", "there is no file"),
        ("measure:", "prune: {budget: macs}\nmeasure:", "Cannot read the budget 'macs'"),
        ("measure:", "prune: {criterion: fischer}\nmeasure:", "Did you mean 'fisher'"),
        ("measure:", "measure: [", "is not YAML"),
    ],
)
@pytest.mark.parametrize("command", ["check", "run"])
def test_a_wrong_recipe_is_one_line(command, old, new, message, run, recipe, tmp_path):
    status, out, err = run(command, edited(recipe, old, new))
    assert (status, out) == (2, "")
    assert one_line(err), err
    assert message in err
    assert not (tmp_path / "run").exists()


def test_what_is_not_there_is_one_line(run, model, tmp_path):
    nowhere = tmp_path / "nowhere"
    model_scores = tmp_path / "scores"
    batch = tiny.batch(from_pretrained(model))
    batch["labels"] = batch["input_ids"][:, 0] % 2
    score(from_pretrained(model), [batch]).save(model_scores)
    for arguments in (
        ("check", nowhere),
        ("run", nowhere),
        ("inspect", nowhere),
        ("plan", nowhere, model_scores, "macs=50%"),
        ("plan", model, nowhere, "macs=50%"),
        ("plan", model, model_scores, "macs=0.1%"),
        ("plan", model, model_scores, "half"),
        ("plan", model, model_scores, "macs=50%", "--criterion", "fischer"),
        ("plan", model, model_scores, "macs=50%", "--round-to", "0"),
        ("remove", model, nowhere, tmp_path / "out"),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, ""), arguments
        assert one_line(err), (arguments, err)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_nowhere_is_told_as_such(run, recipe):
    for arguments in (
        ("inspect", "./nope"),
        ("check", edited(recipe, yaml.safe_load(recipe.read_text())["model"], "./nope")),
    ):
        status, _, err = run(*arguments)
        assert status == 2 and one_line(err)
        assert "There is no folder ./nope, and it is no Hub id" in err


def test_a_file_that_is_something_else_is_one_line(run, model, tmp_path):
    plan = tmp_path / "plan.json"
    for text in ("", "{", "{}", "[1]"):
        plan.write_text(text)
        status, _, err = run("remove", model, plan, tmp_path / "out")
        assert status == 2, text
        assert one_line(err), err


def test_a_family_without_a_row_is_one_line(run, tmp_path):
    settings = FNetConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    FNetModel(settings).save_pretrained(tmp_path)
    status, out, err = run("inspect", tmp_path)
    assert (status, out) == (2, "")
    assert one_line(err), err
    assert "Unknown model family 'fnet'" in err


def test_an_unknown_command_is_no_traceback(run):
    status, _, err = run("prine")
    assert status == 2
    assert "No such command" in err
    assert "Traceback" not in err
