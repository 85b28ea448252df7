"""The pages of docs/ are executed from top to bottom, as a reader would."""

import re
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from hfprune.structure.architectures import ROWS

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


def test_links_lead_somewhere():
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#]+)\)", prose):
            assert link.startswith("http") or (DOCS / link).is_file(), link
