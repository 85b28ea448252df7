"""The walk on real pretrained models, on a few batches; scripts/fetch_quickstart.py brings them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path

import gguf
import pytest
import torch

import hfprune
from hfprune.data import Batches, load_splits
from hfprune.evaluation.evaluate import evaluate_perplexity
from hfprune.examples import blocks
from hfprune.recipe import Recipe
from hfprune.structure.fitness import forget_gguf
from hfprune.tasks import TASKS

ROOT = Path(__file__).parent.parent
CACHE = Path(os.environ.get("HFPRUNE_CACHE", ROOT / ".cache"))

pytestmark = pytest.mark.slow


def fetched(name):
    if not (CACHE / name).is_dir():
        pytest.fail(f"{CACHE / name} is missing: run scripts/fetch_quickstart.py {name}")
    return CACHE / name


def test_minilm_from_fine_tuning_to_report(tmp_path):
    model, movie = fetched("minilm"), fetched("movie")
    for split, lines in (("train", 160), ("dev", 64), ("test", 64)):
        text = (movie / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:lines]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(text) + "\n", encoding="utf-8")
    recipe = Recipe.from_dict(
        {
            "model": str(model),
            "output": str(tmp_path / "run"),
            "data": {s: str(tmp_path / f"{s}.jsonl") for s in ("train", "dev", "test")},
            "finetune": {"epochs": 1},
            "score": {"examples": 64},
            "prune": {"budget": "macs=25%"},  # what is refitted is small, and soon
            "distill": {"epochs": 1},
            "measure": {"batch_sizes": [1], "repeats": 3},
        }
    )
    report = hfprune.run(recipe)
    dense, *smaller = report.variants
    assert [v.name for v in smaller] == ["pruned", "compensated", "distilled"]
    for variant in smaller:
        assert variant.params < dense.params
        assert 0.2 < variant.macs / dense.macs < 0.3  # the layers are nearly all of MiniLM's MACs
    found = json.loads((tmp_path / "run" / "reloaded.json").read_text())
    assert found["largest_logit_difference"] == {"hfprune": 0.0, "remote-code": 0.0}


def test_gemma_prunes_compensates_reloads_and_generates(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # It takes 20 seconds, and would be done for the tokenizer, the config and the weights.
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
    folder, file = fetched("gemma3-270m"), "gemma-3-270m-q4_k_m.gguf"
    fetched("movie-text")
    fetched("movie")
    recipe = Recipe.load(ROOT / "recipes" / "gemma3" / "270m-movie.yaml")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    short = dataclasses.replace(recipe.data, max_length=64)
    data = blocks(load_splits(short), tokenizer, short)
    collate = TASKS["text-generation"].collator(tokenizer, None)
    calibration = list(Batches(data["train"], collate, 2, 6))
    test = list(Batches(data["test"], collate, 2, 4))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    forget_gguf(model)

    criterion = recipe.prune.criterion
    scores = hfprune.score(model, calibration, criterion)
    # The last layer: to compensate all eighteen would take minutes.
    last = hfprune.Constraints(protect=tuple(f"layers.{n}" for n in range(17)))
    plan = hfprune.plan(model, scores, "params=98%", criterion, last)
    pruned = hfprune.remove(model, plan)
    compensated = hfprune.remove(model, plan, compensate=calibration)

    dense_value, pruned_value, compensated_value = (
        evaluate_perplexity(m, test).value for m in (model, pruned, compensated)
    )
    assert dense_value < compensated_value < pruned_value

    compensated.save_pretrained(tmp_path / "smaller")
    again = hfprune.from_pretrained(tmp_path / "smaller")
    prompt = tokenizer("The film is", return_tensors="pt")
    said = [
        m.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=cache)
        for m, cache in ((compensated, True), (again, True), (again, False))
    ]
    assert torch.equal(said[0], said[1])
    assert torch.equal(said[1], said[2])
