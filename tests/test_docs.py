"""The pages of docs/ are executed from top to bottom, as a reader would."""

import re
import shlex
from pathlib import Path

import pytest
import saved
import typer
import yaml
from transformers import CONFIG_MAPPING

import hfprune
from hfprune import cli
from hfprune.importance.criteria import CRITERIA
from hfprune.planning.budget import Budget
from hfprune.recipe import Recipe
from hfprune.structure.architectures import ROWS
from hfprune.tasks import TASKS

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.fixture
def registries():
    """What a page adds to the tables of families goes again."""
    rows, configs = set(ROWS), dict(CONFIG_MAPPING._extra_content)
    yield
    for name in set(ROWS) - rows:
        del ROWS[name]
    CONFIG_MAPPING._extra_content.clear()
    CONFIG_MAPPING._extra_content.update(configs)


def run(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    names = {"__name__": page.stem.replace("-", "_")}
    for block in blocks:
        exec(block, names)
    return names


def test_a_new_family_is_added_and_pruned(registries, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run(DOCS / "new-family.md")
    lines = capsys.readouterr().out.splitlines()
    assert ["layers.2.down", "neurons", "48"] in [line.split()[:3] for line in lines]
    assert "plain" in ROWS
    assert names["plan"].params_share == pytest.approx(0.6, abs=0.01)
    assert type(names["again"]).__name__ == "PlainClassifier"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # PEFT's
def test_the_page_on_recovery_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    names = run(DOCS / "recovery.md")
    assert "kept the weights of step" in capsys.readouterr().out
    assert names["gradual"].plan.params_share == pytest.approx(0.6, abs=0.06)
    for folder, model in (("out", "pruned"), ("gradual-out", "student")):
        again = hfprune.from_pretrained(tmp_path / folder)
        assert type(again).__name__ == "BertForSequenceClassification"
        assert again.num_parameters() == names[model].num_parameters()
    assert names["student"].num_parameters() < names["dense"].num_parameters()


@pytest.mark.slow
def test_a_run_is_published_as_the_page_says(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved.run(tmp_path / "runs" / "minilm-movie")
    saved.family(tmp_path / "runs" / "minilm-sizes", base=None)
    names = run(DOCS / "publishing.md")
    same = "{'hfprune': 0.0, 'remote-code': 0.0}"
    said = capsys.readouterr().out
    assert f" {same}\n" in said and f"'macs-80': {same}, 'macs-40': {same}, 'main': {same}" in said
    assert set(hub.repos) == {"me/minilm-half", "me/minilm-other", "me/minilm"}
    assert hub.repos["me/minilm-other"].private
    smaller = hfprune.from_pretrained(tmp_path / "runs" / "minilm-sizes" / "round-2" / "distilled")
    assert all(names["smaller"].state_dict()[k].equal(v) for k, v in smaller.state_dict().items())


def test_the_commands_of_the_page_on_publishing_are_understood(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "publishing.md").read_text(encoding="utf-8")
    lines = re.findall(r"^hfprune (push .*)$", text, flags=re.MULTILINE)
    commands = [shlex.split(line, comments=True) for line in lines]
    app = typer.main.get_command(cli.app)
    for name, *arguments in commands:
        app.commands[name].make_context(name, arguments)
    options = {argument for command in commands for argument in command if argument[:2] == "--"}
    assert {"--dry-run", "--rehearse", "--revision", "--family"} <= options
    push = {
        n for option in app.commands["push"].params for n in (*option.opts, *option.secondary_opts)
    }
    assert set(re.findall(r"`(--[a-z][a-z-]+)", text)) <= push
    (dry,) = (command for command in commands if "--dry-run" in command)
    saved.run(tmp_path / "runs" / "minilm-movie")
    with pytest.raises(SystemExit, match="0"):
        cli.main(dry)
    assert "What would be uploaded is in there" in capsys.readouterr().out
    assert hfprune.from_pretrained(tmp_path / "there").config.hfprune


def test_the_settings_of_the_page_on_publishing_are_a_recipes():
    (block,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "publishing.md").read_text(), re.DOTALL)
    recipe = Recipe.from_dict({**saved.RECIPE, **yaml.safe_load(block)})
    assert recipe.measure.carbon_intensity == 56


def test_a_model_is_planned_as_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run(DOCS / "planning.md")
    said = capsys.readouterr().out
    assert "No structure keeps only macs=1%" in said and "the least is macs=" in said
    assert "worth of next" in said and "at the margin" in said
    assert names["small"].macs_share <= 0.4


def test_the_page_on_scoring_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        names = run(DOCS / "scoring.md")
    finally:
        CRITERIA.pop("sharpest", None)
    assert "Zeros alone make nothing faster" in capsys.readouterr().out
    assert names["by_itself"].examples == 32
    kept = hfprune.from_pretrained(tmp_path / "sparse").bert.encoder.layer[1].output.dense.weight
    assert (kept == 0).float().mean() == 0.5


def test_the_page_on_recipes_knows_every_task_and_its_recipes_parse():
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)} - {"task"}
    assert named == TASKS.keys()
    blocks = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    recipes = [Recipe.from_dict(yaml.safe_load(block)) for block in blocks]
    assert [len(recipe.prune.budgets) for recipe in recipes] == [1, 1, 4, 1]
    for recipe in recipes:
        assert all(Budget.parse(budget) for budget in recipe.prune.budgets)


def test_links_lead_somewhere():
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#]+)\)", prose):
            assert link.startswith("http") or (DOCS / link).is_file(), link
