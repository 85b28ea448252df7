"""The README is executed: its Python as a user would paste it, its commands as they are typed."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from typer.main import get_command

from hfprune.cli import app
from hfprune.structure.architectures import family_table
from tests import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def labelled(model):
    return {**tiny.batch(model), "labels": torch.tensor([0, 1])}


def test_the_python_prunes_saves_and_reloads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny.model("bert", "AutoModelForSequenceClassification")
    walk, stock = blocks("python")
    names = {"model": model, "batches": [labelled(model)]}
    exec(walk, names)

    inputs = tiny.batch(model)
    with torch.no_grad():
        expected = names["pruned"](**inputs).logits
        assert torch.allclose(names["again"](**inputs).logits, expected, atol=1e-6)
        exec(stock, names)
        assert torch.allclose(names["model"](**inputs).logits, expected, atol=1e-6)
    assert names["plan"].macs_share <= 0.5
    assert str(names["anatomy"]).startswith("layer")


def test_its_commands_and_files_exist():
    commands = set(get_command(app).commands)
    typed = [line.split("#")[0].split() for block in blocks("bash") for line in block.splitlines()]
    for words in filter(None, typed):
        if words[0] == "hfprune":
            assert words[1] in commands
        for word in words:
            if word.startswith(("recipes/", "scripts/", "./scripts/")):
                assert (ROOT / word).is_file(), word
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).is_file(), link


def test_its_families_are_those_of_the_table():
    between = README.split("family_table -->\n")[1].split("\n<!-- /families")[0]
    assert between.strip() == family_table().strip()
