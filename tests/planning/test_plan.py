"""Plans: JSON and back, what they say of themselves, and which models they fit."""

import dataclasses
import json

import pytest
import tiny

from hfprune.errors import HfpruneError
from hfprune.planning.budget import Budget, Limit
from hfprune.planning.plan import VERSION, PruningPlan, Spending
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.cost import layers_params
from hfprune.structure.surgery import copy_and_cut


def make(family="llama", seed=0, share=1 / 3):
    anatomy = Anatomy.of(tiny.model(family))
    lost = {group.name: 0.25 for group in anatomy}
    keep = tiny.selection(anatomy, seed)
    return PruningPlan(anatomy, keep, Budget((Limit("macs", share),)), "fisher", 9, lost, 0.01)


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "mixtral"])
def test_it_comes_back_from_json(family, tmp_path):
    plan = make(family)
    plan.save(tmp_path / "new" / "plan.json")
    again = PruningPlan.load(tmp_path / "new" / "plan.json")
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["plan.json"]
    text = (tmp_path / "new" / "plan.json").read_text()
    assert json.loads(text)["params_share"] == plan.params_share


def test_another_plan_has_another_fingerprint():
    plan = make()
    others = [make(seed=1), dataclasses.replace(plan, tokens=10), make(share=0.4)]
    assert len({p.fingerprint for p in [plan, *others]}) == 4


def test_a_plan_of_a_newer_version_is_refused():
    values = make().to_dict() | {"version": VERSION + 1}
    with pytest.raises(HfpruneError, match=f"version {VERSION + 1}.*Upgrade"):
        PruningPlan.from_dict(values)


def test_it_holds_no_tensor_and_cannot_be_changed():
    plan = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.tokens = 3
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_explain_says_what_stays_of_every_group(family):
    plan = make(family)
    said = plan.explain()
    assert str(plan) == said
    lines = {line.split()[0]: line.split() for line in said.splitlines() if line}
    for group in plan.anatomy:
        cells = lines[group.name]
        assert cells[1:4] == [str(len(plan.keep[group.name])), str(group.units), f"{group.kind}s"]
        assert cells[-1] == "25.0%"
    before, after = layers_params(plan.anatomy), layers_params(plan.anatomy, plan.keep)
    assert f"{before:,} -> {after:,}" in said
    assert "by fisher" in said
    assert f"{plan.macs_share:.1%} of their MACs (9 tokens)" in said


def test_explain_says_what_is_worth_its_cost():
    plan = make()
    name, other = list(plan.keep)[:2]
    margins = {name: (0.91, 1.204), other: (None, 0.4)}
    spent = (Spending(2_000_000, 998_000, 0.0123),)
    told = dataclasses.replace(plan, margins=margins, spending=spent)
    assert PruningPlan.from_dict(json.loads(json.dumps(told.to_dict()))) == told
    said = told.explain()
    lines = {line.split()[0]: line.split() for line in said.splitlines() if line}
    assert lines[name][-2:] == ["0.91", "1.20"] and lines[other][-2:] == ["-", "0.40"]
    assert "2 M -> 998 K (49.9%); at the margin, 1 % more would keep 1.23% more of all" in said
    assert "worth" not in plan.explain()


def test_shares_are_those_of_the_pruned_model():
    plan = make("llama")
    dense = tiny.model("llama")
    pruned = copy_and_cut(dense, plan.keep)

    def layers(model):
        return sum(p.numel() for p in model.model.layers.parameters())

    assert plan.params_share == layers(pruned) / layers(dense)


def test_diff_names_the_groups_that_differ():
    plan = make()
    name = "layers.1.mlp.down_proj"
    assert plan.keep[name] == ()
    other = dataclasses.replace(plan, keep=plan.keep | {name: (2, 5)})
    assert plan.diff(plan) == "The plans keep the same units."
    assert plan.diff(other) == f"{name}: 0 -> 2 neurons (+2 -0)"
    moved = dataclasses.replace(plan, keep=plan.keep | {name: (2, 7, 8)})
    assert other.diff(moved) == f"{name}: 2 -> 3 neurons (+2 -1)"


def test_it_says_which_layers_go():
    plan = make()
    gone = {group.name: () for group in plan.anatomy if group.layer == 1}
    shallow = dataclasses.replace(plan, keep=plan.keep | gone | {"layers": (0, 2)})
    assert "Of layers, whole layers go: 1." in shallow.explain()
    line = next(text for text in shallow.explain().splitlines() if "layers.1.self" in text)
    assert line.split()[1:6] == ["0", "4", "heads", "0%", "0%"]
    assert "layers: 3 -> 2 layers (+0 -1)" in plan.diff(shallow)
    assert shallow.dropped == {"layers": (1,)} and plan.dropped == {}


def test_it_refuses_a_model_it_was_not_made_for():
    plan = make("llama")
    plan.check_fits(Anatomy.of(tiny.model("llama")))
    with pytest.raises(HfpruneError, match=r"for a llama with 6 .*the model is a bert with 6"):
        plan.check_fits(Anatomy.of(tiny.model("bert")))
    pruned = copy_and_cut(tiny.model("llama"), plan.keep)
    with pytest.raises(HfpruneError, match="Score and plan the model that is to be pruned"):
        plan.check_fits(Anatomy.of(pruned))
    with pytest.raises(HfpruneError, match="the model is a bert"):
        plan.diff(make("bert"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda v, name: v["keep"].update({name: [0, 0]}), "distinct"),
        (lambda v, name: v["keep"].update({name: [-1]}), "lie in 0"),
        (lambda v, name: v["keep"].update({name: [999]}), "lie in 0"),
        (lambda v, name: v["keep"].update({name: [1.5]}), "distinct"),
        (lambda v, name: v["keep"].update({"layers": []}), "must stay"),
        (lambda v, name: v["keep"].update({"nothing": [0]}), "no such group"),
        (lambda v, name: v["keep"].pop(name), "does not say what stays"),
        (lambda v, name: v.update(keep=[]), "can be read"),
        (lambda v, name: v.update(margins=[1]), "can be read"),
    ],
)
def test_a_file_that_somebody_changed_is_refused(spoil, says, tmp_path):
    plan = make()
    values = plan.to_dict()
    spoil(values, next(iter(plan.anatomy)).name)
    (tmp_path / "plan.json").write_text(json.dumps(values))
    with pytest.raises(HfpruneError, match=says):
        PruningPlan.load(tmp_path / "plan.json")
