"""Every shipped recipe is run on a tiny model of its family and a few made-up examples, all else as
it says.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import yaml
from test_data import sentences, tiny_tokenizer

import hfprune
from hfprune.importance.criteria import CRITERIA
from hfprune.importance.scores import Scores
from hfprune.pipeline import evaluation_batches
from hfprune.planning.budget import Budget
from hfprune.planning.plan import PruningPlan
from hfprune.recipe import Data, Recipe
from hfprune.rounds import Round
from hfprune.tasks import TASKS

ROOT = Path(__file__).parents[1] / "recipes"
SHIPPED = [p for p in sorted(ROOT.glob("*/*.yaml")) if p.parent.name != "accelerate"]
FAMILIES = {"minilm": "bert", "gemma3": "gemma3_text"}
FETCHED = [p for p in SHIPPED if "dataset:" not in p.read_text()]
SPLITS = {"train": 200, "dev": 100, "test": 100}
# One of every kind of what is read and of what may go; the others take longer to tell no more.
QUICK = {"bert/wikiann", "vit/beans", "mixtral/8x7b-text"}
# Models that are called with other things than texts, or answer with others.
WHOLE = {"bert/squad", "vit/beans", "t5/small-cnn"}


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


def tiny_model(family, task, folder):
    """Wide enough for budgets within 1 %, long enough for any recipe's examples."""
    config = tiny.config(family)
    longer = {"max_position_embeddings": 512, "intermediate_size": 96, "d_ff": 96}
    longer["num_local_experts"] = 8
    config.update({name: size for name, size in longer.items() if hasattr(config, name)})
    torch.manual_seed(0)
    getattr(transformers, TASKS[task].auto_class).from_config(config).save_pretrained(folder)
    if TASKS[task].reads == "images":
        size = {"height": config.image_size, "width": config.image_size}
        processor = {"image_processor_type": "ViTImageProcessor", "size": size}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    else:
        tiny_tokenizer().save_pretrained(folder)


def answered(row, data):
    """A question about one of the words of a context."""
    words = row["text"].split()
    answers = {"text": [words[-1]], "answer_start": [len(row["text"]) - len(words[-1])]}
    return {data.text: "is the film good", data.text_pair: row["text"], data.label: answers}


def tagged(row, data):
    """The words of a sentence; those that rate are of class 1."""
    words = row["text"].split()
    rates = ("good", "great", "fine", "bad", "awful", "dull")
    return {data.text: words, data.label: [int(word in rates) for word in words]}


def pictured(row, data, folder):
    """A small image, bright or dark, by its path."""
    from PIL import Image

    light = 60 + 130 * row["label"] + len(row["text"])
    path = folder / f"{light}.png"
    Image.new("RGB", (10, 8), (light, light // 2, 10)).save(path)
    return {data.image: str(path), data.label: row["label"]}


def row_of(task, row, data, folder):
    """A rated sentence as an example of a task, in the columns that a recipe names."""
    if task == "question-answering":
        return answered(row, data)
    if task == "token-classification":
        return tagged(row, data)
    if task == "image-classification":
        return pictured(row, data, folder)
    if task in ("summarization", "translation"):
        return {data.text: row["text"], data.label: " ".join(row["text"].split()[-2:])}
    pair = {data.text_pair: row["text"]} if data.text_pair else {}
    return {data.text: row["text"], data.label: row["label"], **pair}


def files(task, data, folder):
    """A few examples in the columns that a recipe names."""
    made = {}
    for seed, (split, count) in enumerate(SPLITS.items()):
        rows = [row_of(task, row, data, folder) for row in sentences(count, seed)]
        made[split] = folder / f"{split}.jsonl"
        made[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {split: str(path) for split, path in made.items()}


def dry(path, folder):
    """A shipped recipe with a model, data, an output and sizes of its own."""
    recipe = Recipe.from_dict(yaml.safe_load(path.read_text()))
    tiny_model(FAMILIES.get(path.parent.name, path.parent.name), recipe.task, folder / "model")
    local: Data = dataclasses.replace(
        recipe.data,
        dataset=None,
        config=None,
        revision=None,
        **files(recipe.task, recipe.data, folder),
    )
    short = {
        part: dataclasses.replace(getattr(recipe, part), epochs=1.0)
        for part in ("finetune", "distill")
        if getattr(recipe, part)
    }
    return dataclasses.replace(
        recipe,
        model=str(folder / "model"),
        gguf_file=None,
        output=str(folder / "run"),
        data=local,
        score=dataclasses.replace(recipe.score, examples=64),
        measure=dataclasses.replace(recipe.measure, batch_sizes=(1,), repeats=2),
        **short,
    )


def check_result(recipe):
    """The last model is of the structure that was planned, under the recipe's budget."""
    last = Round.of(recipe)[-1]
    plan = PruningPlan.load(Path(recipe.output) / last.path("plan.json"))
    assert plan.budget == Budget.parse(recipe.prune.budgets[-1])
    result = hfprune.from_pretrained(Path(recipe.output) / last.path(last.result))
    anatomy = hfprune.inspect(result)
    assert {g.name: g.units for g in anatomy} == {g.name: len(plan.keep[g.name]) for g in anatomy}
    if recipe.prune.experts:
        assert {block.units for block in anatomy.experts} == {recipe.prune.experts}
    auto_class = getattr(transformers, TASKS[recipe.task].auto_class)
    remote = auto_class.from_pretrained(result.name_or_path, trust_remote_code=True)
    assert all(a.equal(b) for a, b in zip(result.parameters(), remote.parameters(), strict=True))
    return result


@pytest.mark.parametrize("path", [p for p in SHIPPED if p not in FETCHED], ids=name_of)
def test_recipes_of_the_hub_are_complete(path):
    assert Recipe.load(path).data.dataset


def test_every_task_has_a_recipe_and_every_recipe_a_task():
    tasks = {yaml.safe_load(p.read_text()).get("task", "text-classification") for p in SHIPPED}
    assert tasks | {"translation"} == TASKS.keys()  # which is summarization by another name
    assert {name_of(p) for p in SHIPPED} >= QUICK


@pytest.mark.parametrize("path", [p for p in SHIPPED if name_of(p) in QUICK], ids=name_of)
def test_a_dry_run(path, tmp_path):
    recipe = dry(path, tmp_path)
    hfprune.run(recipe, say=str, until="result")
    measured = Scores.load(tmp_path / "run" / "scores").importance.keys()
    assert measured == {*(recipe.score.criteria or CRITERIA), "magnitude", "random"}
    quality = TASKS[recipe.task].judge(check_result(recipe), evaluation_batches(recipe), 0)
    assert 0 < quality.examples <= SPLITS["test"] and quality.low <= quality.value <= quality.high


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [p for p in SHIPPED if name_of(p) not in QUICK | WHOLE], ids=name_of
)
def test_a_dry_run_of_the_others(path, tmp_path):
    recipe = dry(path, tmp_path)
    hfprune.run(recipe, say=str, until="result")
    check_result(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in SHIPPED if name_of(p) in WHOLE], ids=name_of)
def test_a_dry_run_to_the_report(path, tmp_path):
    """With the reload in a fresh process, by hfprune and without it."""
    recipe = dry(path, tmp_path)
    report = hfprune.run(recipe, say=str)
    result = check_result(recipe)
    assert report.result.params == result.num_parameters() < report.dense.params
    assert report.result.macs < report.dense.macs
    assert 0 < report.result.quality.examples <= SPLITS["test"]
    matches = recipe.task == "question-answering"
    assert (report.cells()[0][3] == "exact_match") == matches
    assert (report.cells()[-1][3][-1] == "%") == matches
    found = json.loads((tmp_path / "run" / "reloaded.json").read_text())
    assert set(found["largest_logit_difference"].values()) == {0}
    assert (tmp_path / "run" / "report.html").is_file()
