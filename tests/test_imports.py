"""Imports point down the floors of the house only, wherever in a file they stand."""

import ast
from pathlib import Path

import hfprune

ROOT = Path(hfprune.__file__).parent
FLOORS = (
    {"errors", "files"},
    {"structure", "processes"},
    {"importance"},
    {"planning"},
    {"recovery", "evaluation"},
    {"publishing"},
    {
        "data",
        "examples",
        "tasks",
        "recipe",
        "pruning",
        "rounds",
        "training",
        "findings",
        "steps",
        "pipeline",
    },
    {"cli"},
    {"hfprune"},  # the public names
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TOGETHER = FLOORS[6]  # modules of one floor that may know each other


def room_of(module: str) -> str:
    """The room of a dotted module name, "hfprune" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imports(source: str, package: str) -> list[str]:
    """Every hfprune module that a source imports, in functions and for type checking too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return [name for name in found if name.split(".")[0] == "hfprune"]


def upward(source: str, module: str) -> list[str]:
    """The imports of a module that do not point down."""
    own = room_of(module)
    wrong = []
    for name in imports(source, module.rpartition(".")[0] or module):
        room = room_of(name)
        down = FLOOR.get(room, FLOOR["hfprune"]) < FLOOR[own]
        if not (down or room == own or {room, own} <= TOGETHER):
            wrong.append(f"{module} imports {name}")
    return wrong


def modules() -> dict[str, Path]:
    named = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("hfprune", *path.relative_to(ROOT).with_suffix("").parts)
        named[".".join(p for p in parts if p != "__init__")] = path
    return named


def test_every_file_is_on_a_floor_and_imports_point_down():
    found = modules()
    assert len(found) > 30
    assert {room_of(module) for module in found} == FLOOR.keys()
    wrong = [line for module, path in found.items() for line in upward(path.read_text(), module)]
    assert not wrong


def test_an_upward_import_would_be_seen():
    for source in (
        "from hfprune.planning.plan import PruningPlan",
        "def f():\n    import hfprune.cli",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hfprune import recipe",
        "from ..recovery import losses",
        "import hfprune",
        "from hfprune import score",
    ):
        assert len(upward(source, "hfprune.importance.scoring")) == 1, source
    for source in (
        "import torch, json",
        "from hfprune.errors import HfpruneError",
        "from hfprune.structure.cost import Selection",
        "from .gates import gated",
        "from ..structure import cost",
    ):
        assert not upward(source, "hfprune.importance.scoring"), source
    assert upward("import hfprune.recovery.losses", "hfprune.evaluation.measure")
    assert not upward("from hfprune.recipe import Data", "hfprune.data")
    assert upward("from hfprune.errors import HfpruneError", "hfprune.errors") == []


def test_the_label_without_a_loss_is_defined_once():
    homes = [
        module
        for module, path in modules().items()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and "IGNORED" in map(ast.unparse, node.targets)
    ]
    assert homes == ["hfprune.importance.batches"]


def test_errors_import_nothing_of_the_house():
    assert not imports((ROOT / "errors.py").read_text(), "hfprune")


def test_the_public_names_are_where_they_are_said_to_be():
    for name in hfprune.__all__:
        assert getattr(hfprune, name).__name__ == name
    assert set(hfprune.__all__) == hfprune._HOMES.keys()
