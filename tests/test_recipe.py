"""Recipes: the shipped ones parse; what is wrong with one is said by name before anything loads."""

import ast
import copy
import dataclasses
import math
import os
from pathlib import Path

import pytest
import yaml

import hfprune
from hfprune.data import SPLITS
from hfprune.errors import BudgetError, HfpruneError, RecipeError
from hfprune.recipe import Data, Distill, Finetune, Measure, Prune, Recipe, Score

ROOT = Path(__file__).parents[1]
SHIPPED = [p for p in (ROOT / "recipes").glob("*/*.yaml") if p.parent.name != "accelerate"]
CLASSES = (Recipe, Data, Finetune, Score, Prune, Distill, Measure)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_the_shipped_recipes_parse(path):
    recipe = Recipe.from_dict(yaml.safe_load(path.read_text()))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


def test_there_are_recipes():
    assert len(SHIPPED) >= 2


@pytest.fixture
def values(tmp_path):
    """A complete recipe as plain values; its files exist."""
    files = {}
    for split in SPLITS:
        files[split] = str(tmp_path / f"{split}.jsonl")
        Path(files[split]).write_text('{"text": "good", "label": 1}\n')
    return {
        "model": "somewhere",
        "output": str(tmp_path / "runs" / "one"),
        "data": files,
        "finetune": {},
        "distill": {},
        "score": {},
        "prune": {},
        "measure": {},
    }


def put(values, path, value):
    """The recipe with one value changed; "score.examples" is in the section score."""
    changed = copy.deepcopy(values)
    *sections, key = path.split(".")
    inner = changed
    for section in sections:
        inner = inner[section]
    inner[key] = value
    return changed


def load(values, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return Recipe.load(path)


def test_defaults_make_a_whole_recipe(values, tmp_path):
    recipe = load(values, tmp_path)
    assert recipe.score == Score() and recipe.distill == Distill()
    few = {key: values[key] for key in ("model", "output", "data")}
    assert load(few, tmp_path).finetune is None
    assert load(few, tmp_path).distill is None
    assert load(put(values, "distill", None), tmp_path).distill is None


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("modle", "model"),
        ("data.tests", "test"),
        ("finetune.epoch", "epochs"),
        ("prune.criterium", "criterion"),
        ("prune.budgets", "budget"),
        ("distill.temprature", "temperature"),
        ("measure.repeat", "repeats"),
    ],
)
def test_an_unknown_key_names_its_place_and_the_nearest(path, near, values, tmp_path):
    section, _, key = path.rpartition(".")
    message = f"Unknown key in {section or 'recipe'} '{key}'. Did you mean '{near}'?"
    with pytest.raises(RecipeError) as caught:
        load(put(values, path, 1), tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("seed", "none"),
        ("seed", 1.5),
        ("seed", True),
        ("model", None),
        ("model", 5),
        ("data", "train.jsonl"),
        ("data", None),
        ("data.train", None),
        ("data.train", ["a"]),
        ("data.max_length", "128"),
        ("finetune", 3),
        ("finetune.epochs", "three"),
        ("finetune.epochs", True),
        ("finetune.freeze_embeddings", 1),
        ("finetune.freeze_embeddings", "yes please"),
        ("score", None),
        ("score.examples", 10.0),
        ("prune.budget", 0.5),
        ("prune.budget", None),
        ("prune.budget", []),
        ("prune.budget", ["macs=60%", 0.5]),
        ("prune.compensate", "no way"),
        ("distill.learning_rate", [1e-4]),
        ("measure.batch_sizes", 8),
        ("measure.batch_sizes", []),
        ("measure.batch_sizes", [1, "2"]),
        ("prune.protect", "encoder.layer.0"),
        ("prune.uniform", "yes please"),
        ("task", "translating"),
        ("task", 3),
        ("task", ["text-generation"]),
    ],
)
def test_a_value_of_the_wrong_type_is_named(path, wrong, values, tmp_path):
    with pytest.raises(RecipeError) as caught:
        load(put(values, path, wrong), tmp_path)
    assert str(caught.value).startswith(path)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("seed", -1),
        ("seed", 2**32),
        ("data.max_length", 0),
        ("finetune.epochs", 0),
        ("finetune.epochs", math.nan),
        ("finetune.learning_rate", -1e-5),
        ("finetune.learning_rate", math.inf),
        ("finetune.weight_decay", -0.1),
        ("finetune.warmup", 1.5),
        ("score.examples", 0),
        ("score.batch_size", -1),
        ("prune.min_heads", -1),
        ("prune.min_neurons", -1),
        ("prune.round_to", 0),
        ("distill.temperature", 0),
        ("distill.hidden_weight", -1),
        ("distill.warmup", -0.1),
        ("distill.skew", 1.0),
        ("measure.batch_sizes", [1, 0]),
        ("measure.repeats", 0),
        ("measure.threads", -1),
    ],
)
def test_a_number_out_of_range_is_named(path, wrong, values, tmp_path):
    with pytest.raises(RecipeError) as caught:
        load(put(values, path, wrong), tmp_path)
    assert str(caught.value).startswith(f"{path} must be")


@pytest.mark.parametrize("path", ["prune.min_heads", "distill.task_weight", "finetune.warmup"])
def test_some_numbers_may_be_0(path, values, tmp_path):
    load(put(values, path, 0), tmp_path)


def test_a_distillation_learns_something(values, tmp_path):
    values["distill"] = dict.fromkeys(("task_weight", "logits_weight", "hidden_weight"), 0)
    with pytest.raises(RecipeError, match=r"^distill: task_weight, logits_weight, .* are all 0"):
        load(values, tmp_path)
    load(put(values, "distill.hidden_weight", 0.1), tmp_path)


@pytest.mark.parametrize("floor", ["min_heads", "min_neurons"])
def test_uniform_layers_keep_something(floor, values, tmp_path):
    values["prune"] = {"uniform": True, floor: 0}
    with pytest.raises(RecipeError, match=r"^prune\.uniform needs prune\.min_heads and"):
        load(values, tmp_path)


def test_numbers_as_yaml_writes_them(values, tmp_path):
    path = tmp_path / "recipe.yaml"
    text = yaml.safe_dump(values).replace("finetune: {}", "finetune: {learning_rate: 5e-5}")
    path.write_text(text)
    assert yaml.safe_load(text)["finetune"]["learning_rate"] == "5e-5"  # YAML 1.1
    assert Recipe.load(path).finetune.learning_rate == 5e-5
    whole = load(put(values, "finetune.epochs", 2), tmp_path).finetune.epochs
    assert (whole, type(whole)) == (2.0, float)


def test_budgets_and_criteria_are_checked(values, tmp_path):
    with pytest.raises(BudgetError, match="Did you mean 'macs'"):
        load(put(values, "prune.budget", "mac=50%"), tmp_path)
    with pytest.raises(HfpruneError, match=r"'fischer'\. Did you mean 'fisher'"):
        load(put(values, "prune.criterion", "fischer"), tmp_path)


def test_the_criterion_that_chooses_is_measured(values, tmp_path):
    values["score"], values["prune"] = {"criteria": ["fisher"]}, {"criterion": "taylor"}
    with pytest.raises(RecipeError, match=r"score\.criteria are fisher: add taylor"):
        load(values, tmp_path)
    for criterion in ("fisher", "magnitude", "random"):
        load(put(values, "prune.criterion", criterion), tmp_path)
    with pytest.raises(HfpruneError, match=r"'fischer'\. Did you mean 'fisher'"):
        load(put(values, "score.criteria", ["taylor", "fischer"]), tmp_path)


def test_a_list_of_budgets_is_one_for_each_round(values, tmp_path):
    assert load(values, tmp_path).prune.budgets == ("macs=50%",)
    rounds = load(put(values, "prune.budget", ["macs=80%, params=70%", "macs=60%"]), tmp_path)
    assert rounds.prune.budgets == ("macs=80%, params=70%", "macs=60%")
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(rounds.to_dict()))) == rounds


@pytest.mark.parametrize(
    "budgets", [["macs=60%", "macs=60%"], ["macs=60%", "params=50%"], ["macs=60%", "macs=1K"]]
)
def test_a_round_must_leave_less_than_the_one_before(budgets, values, tmp_path):
    with pytest.raises(RecipeError, match=r"^prune\.budget: the round to .* must leave less than"):
        load(put(values, "prune.budget", budgets), tmp_path)


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"budget": "latency=8ms@1x8, latency=9ms@2x8"}, "the latency of one batch only"),
        ({"latency_table": "here"}, "prune.latency_table needs a prune.budget of latency"),
        ({"latency_table": "nowhere", "budget": "latency=50%"}, "there is no file nowhere"),
        (
            {"latency_table": "here", "budget": ["latency=9ms", "latency=8ms"]},
            "is of the dense model, and later rounds prune others",
        ),
        ({"budget": ["latency=80%", "latency=60%"]}, "latency=60% has no meaning: write the lat"),
        ({"budget": ["memory=80%", "memory=60%"]}, "memory=60% has no meaning: write the memory"),
    ],
)
def test_latency_that_no_table_tells(prune, message, values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").write_text("{}")
    values["prune"] = prune
    with pytest.raises(RecipeError, match=message):
        load(values, tmp_path)


def test_budgets_of_latency_are_written_like_others(values, tmp_path):
    values["prune"] = {"budget": ["latency=9ms@1x8", "latency=8ms@1x8"]}
    assert load(values, tmp_path).prune.latency_table is None


def test_lengths_are_of_texts(values, tmp_path):
    values |= {"task": "image-classification", "measure": {"lengths": [128]}}
    with pytest.raises(RecipeError, match=r"measure\.lengths are of texts, and image-cl.* images"):
        load(values, tmp_path)


def test_questions_need_contexts(values, tmp_path):
    values["task"] = "question-answering"
    with pytest.raises(RecipeError, match=r"data\.text_pair is missing: every question-answering"):
        load(values, tmp_path)


def test_an_unknown_task_names_the_nearest(values, tmp_path):
    with pytest.raises(RecipeError, match=r"task 'token-clasification'\. Did you mean 'token-cl"):
        load(put(values, "task", "token-clasification"), tmp_path)


def test_missing_keys_are_named(values, tmp_path):
    for key in ("model", "output", "data"):
        with pytest.raises(RecipeError, match=f"^{key} is missing"):
            load({k: v for k, v in values.items() if k != key}, tmp_path)
    del values["data"]["dev"]
    with pytest.raises(RecipeError, match=r"^data\.dev is missing"):
        load(values, tmp_path)


@pytest.mark.parametrize("model", ["./nope", "/nope", "two/or/three"])
def test_a_model_that_is_nowhere_is_named(model, values, tmp_path):
    message = rf"^model: There is no folder {model}, and it is no Hub id\. Give"
    with pytest.raises(RecipeError, match=message):
        load(put(values, "model", model), tmp_path)
    (tmp_path / "local models").mkdir()
    load(put(values, "model", str(tmp_path / "local models")), tmp_path)


@pytest.mark.parametrize("split", SPLITS)
def test_a_file_without_a_name_is_missing(split, values, tmp_path):
    with pytest.raises(RecipeError, match=rf"data\.{split}: there is no file \."):
        load(put(values, f"data.{split}", ""), tmp_path)


@pytest.mark.parametrize("split", SPLITS)
def test_missing_files_are_named(split, values, tmp_path):
    os.remove(values["data"][split])
    with pytest.raises(RecipeError, match=rf"data\.{split}: there is no file .*{split}\.jsonl"):
        load(values, tmp_path)


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ({"news": "no.jsonl"}, r"measure\.also\.news: there is no file no\.jsonl"),
        ({"news": 3}, r"measure\.also\.news must be of type str, not 3"),
        (["news.jsonl"], r"measure\.also must be a mapping of names, not"),
    ],
)
def test_other_test_data_are_named_files(also, message, values, tmp_path):
    values["measure"] = {"also": also}
    with pytest.raises(RecipeError, match=message):
        load(values, tmp_path)


def test_a_hub_dataset_needs_no_files(values, tmp_path):
    values["data"] = {"dataset": "someone/something", "train": "a", "dev": "b", "test": "c"}
    values["measure"] = {"also": {"others": "another split"}}
    assert load(values, tmp_path).data.dataset == "someone/something"


def test_an_output_that_cannot_be_written(values, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RecipeError, match="output: cannot write below"):
            load(put(values, "output", str(output)), tmp_path)
    assert not (tmp_path / "runs").exists()  # checking writes nothing


def test_an_output_without_a_name(values, tmp_path):
    with pytest.raises(RecipeError, match=r"^output has no name: give the folder of the run"):
        load(put(values, "output", ""), tmp_path)


def test_what_is_no_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match=r"Cannot read the recipe .*No such file"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match=r"Cannot read the recipe .*directory"):
        Recipe.load(tmp_path)
    for text in ("", "- a list", "just text"):
        path.write_text(text)
        with pytest.raises(RecipeError, match="recipe must be a mapping"):
            Recipe.load(path)
    path.write_text("model: [unclosed")
    with pytest.raises(RecipeError, match="is not YAML"):
        Recipe.load(path)
    path.write_bytes(b"model: \xff\xfe")
    with pytest.raises(RecipeError, match="is not"):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("model: a\nseed: 1\n\nmodel: b\n", "model", (1, 4)),
        ("model: a\nprune:\n  layers: 2\n  layers: 4\n", "layers", (3, 4)),
        ("model: a\nprune: {layers: 2, layers: 4}\n", "layers", (2, 2)),
    ],
)
def test_a_key_that_is_there_twice_is_refused(text, key, lines, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    where = "in line {} and in line {}".format(*lines)
    with pytest.raises(RecipeError, match=rf"recipe\.yaml: .*'{key}' is there twice, {where}"):
        Recipe.load(path)


def test_a_key_may_change_what_it_is_merged_with(values, tmp_path):
    path = tmp_path / "recipe.yaml"
    del values["finetune"], values["distill"]
    training = "finetune: &training {epochs: 2, warmup: 0}\ndistill: {<<: *training, epochs: 3}\n"
    path.write_text(yaml.safe_dump(values) + training)
    recipe = Recipe.load(path)
    assert (recipe.finetune.epochs, recipe.distill.epochs, recipe.distill.warmup) == (2, 3, 0)


def test_a_recipe_goes_through_plain_values_and_back(values, tmp_path):
    recipe = load(values, tmp_path)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 3


def test_every_field_is_read_somewhere():
    """A setting that no code reads would be a promise that nobody keeps."""
    read = set(SPLITS)  # by getattr, in a loop over this tuple
    for path in Path(hfprune.__file__).parent.rglob("*.py"):
        if path.name != "recipe.py":
            tree = ast.parse(path.read_text())
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    fields = {f"{c.__name__}.{f.name}" for c in CLASSES for f in dataclasses.fields(c)}
    assert {name for name in fields if name.split(".")[1] not in read} == set()
    assert "no_such_setting" not in read


def test_every_field_is_explained():
    for cls in CLASSES:
        for field in dataclasses.fields(cls):
            assert f"{field.name}" in cls.__doc__, f"{cls.__name__}.{field.name}"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model", "hf_" + "aB3" * 12),
        ("seed", "hf_" + "aB3" * 12),  # of the wrong type, which an error would repeat
        ("data.train", "https://me:aB3aB3@example.org/train.jsonl"),
        ("score.hub_token", "aB3aB3"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(values, path, value):
    with pytest.raises(HfpruneError, match=r"recipe\..* looks like a secret") as caught:
        Recipe.from_dict(put(values, path, value))
    assert path in str(caught.value) and "aB3aB3" not in str(caught.value)
