"""Every shipped recipe is run on a tiny model of its family and a few sentences, all else as it
says.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from test_data import sentences, tiny_tokenizer

import hfprune
from hfprune.planning.budget import Budget
from hfprune.planning.plan import PruningPlan
from hfprune.recipe import Data, Recipe
from hfprune.rounds import Round

ROOT = Path(__file__).parents[1] / "recipes"
SHIPPED = [p for p in sorted(ROOT.glob("*/*.yaml")) if p.parent.name != "accelerate"]
FAMILIES = {"minilm": "bert", "bert": "bert", "gemma3": "gemma3_text"}
FETCHED = [p for p in SHIPPED if "dataset:" not in p.read_text()]


def tiny_model(family, classify, folder):
    """Wide enough for budgets within 1 %, long enough for any recipe's examples."""
    config = tiny.config(family)
    config.update({"max_position_embeddings": 512, "intermediate_size": 96})
    kind = "AutoModelForSequenceClassification" if classify else "AutoModelForCausalLM"
    torch.manual_seed(0)
    getattr(transformers, kind).from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def files(data, folder):
    """A few sentences in the columns that a recipe names."""
    made = {}
    for seed, (split, count) in enumerate({"train": 200, "dev": 100, "test": 100}.items()):
        rows = []
        for row in sentences(count, seed):
            pair = {data.text_pair: row["text"]} if data.text_pair else {}
            rows.append({data.text: row["text"], data.label: row["label"], **pair})
        made[split] = folder / f"{split}.jsonl"
        made[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {split: str(path) for split, path in made.items()}


@pytest.mark.parametrize("path", [p for p in SHIPPED if p not in FETCHED], ids=lambda p: p.stem)
def test_recipes_of_the_hub_are_complete(path):
    assert Recipe.load(path).data.dataset


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_dry_run(path, tmp_path):
    import yaml

    recipe = Recipe.from_dict(yaml.safe_load(path.read_text()))
    classify = recipe.task == "text-classification"
    tiny_model(FAMILIES.get(path.parent.name, path.parent.name), classify, tmp_path / "model")
    local: Data = dataclasses.replace(
        recipe.data, dataset=None, config=None, revision=None, **files(recipe.data, tmp_path)
    )
    dry = dataclasses.replace(
        recipe,
        model=str(tmp_path / "model"),
        gguf_file=None,
        output=str(tmp_path / "run"),
        data=local,
        measure=dataclasses.replace(recipe.measure, batch_sizes=(1,)),
    )
    hfprune.run(dry, say=str, until="result")
    last = Round.of(dry)[-1]
    plan = PruningPlan.load(tmp_path / "run" / last.path("plan.json"))
    assert plan.budget == Budget.parse(recipe.prune.budgets[-1])
    result = hfprune.from_pretrained(tmp_path / "run" / last.path(last.result))
    kept = {g.name: g.units for g in hfprune.inspect(result)}
    assert kept == {g.name: len(plan.keep[g.name]) for g in plan.anatomy}
