"""Rounds: two plans one after the other are one plan for the dense model, under its budget."""

import dataclasses
import json

import pytest
import tiny
import torch
from test_pipeline import at, changed, generation

import hfprune
from hfprune.errors import BudgetError
from hfprune.planning.budget import Budget
from hfprune.planning.constraints import Constraints
from hfprune.planning.plan import PruningPlan
from hfprune.recipe import Data, Distill, Prune, Recipe
from hfprune.rounds import Round, budget_on_given, constraints_on_given, in_all
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.cost import layers_macs, layers_params

TOKENS = 9
ROUNDS = ["round-1/compensated", "round-2/compensated"]


def plan_of(model, keep, share=0.5):
    return PruningPlan(Anatomy.of(model), keep, Budget.parse(f"macs={share}"), "fisher", TOKENS)


def uneven(model, seed, dropped=()):
    """A random plan, which drops the given layers of the first stack."""
    anatomy = Anatomy.of(model)
    keep = tiny.selection(anatomy, seed)
    if dropped:
        stack = anatomy.stacks[0]
        keep[stack.name] = tuple(set(range(stack.units)) - set(dropped))
        keep |= {g.name: () for g in anatomy if g.stack == 0 and g.layer in dropped}
    for block in anatomy.experts:
        if block.layer not in dropped:
            keep[block.name] = tuple(n for n in range(block.units) if n != (seed + block.layer) % 3)
    return plan_of(model, keep)


@pytest.mark.parametrize("dropped", [(), (1,)])
@pytest.mark.parametrize("family", ["bert", "llama", "mixtral", "t5"])
def test_two_cuts_are_the_one_that_the_sum_makes(family, dropped):
    dense = tiny.model(family)
    first = uneven(dense, 0, dropped)
    given = hfprune.remove(dense, first)
    second = uneven(given, 1, (0,) if dropped else ())
    ones = {g.name: torch.ones(g.units, dtype=torch.float64) for g in first.anatomy}
    whole = in_all(first, second, ones, Budget.parse("macs=30%"))
    twice, once = hfprune.remove(given, second), hfprune.remove(dense, whole)
    assert Anatomy.of(twice) == Anatomy.of(once)
    for (name, tensor), other in zip(
        twice.state_dict().items(), once.state_dict().values(), strict=True
    ):
        assert tensor.equal(other), name
    for group in whole.anatomy:
        if group.units:
            assert whole.lost[group.name] == 1 - len(whole.keep[group.name]) / group.units
    assert whole.budget == Budget.parse("macs=30%")
    assert PruningPlan.from_dict(whole.to_dict()) == whole


@pytest.mark.parametrize(("resource", "cost"), [("macs", layers_macs), ("params", layers_params)])
def test_a_budget_stays_a_share_of_the_dense_model(resource, cost):
    dense = tiny.model("llama")
    first = uneven(dense, 0)
    on_given = budget_on_given(Budget.parse(f"{resource}=25%"), first.anatomy, TOKENS)
    whole = cost(first.anatomy, TOKENS) if resource == "macs" else cost(first.anatomy)
    (limit,) = on_given.limits
    assert limit.absolute and limit.amount == round(whole / 4)


def test_a_budget_in_amounts_stays_and_one_that_cannot_be_told_is_refused():
    anatomy = Anatomy.of(tiny.model("llama"))
    amounts = Budget.parse("params=3K, memory=1MB")
    assert budget_on_given(amounts, anatomy, TOKENS) == amounts
    with pytest.raises(BudgetError, match="memory=50% has no meaning: write the memory as"):
        budget_on_given(Budget.parse("memory=50%"), anatomy, TOKENS)


def test_protected_layers_are_found_under_their_new_numbers():
    model = tiny.model("bert")
    stack = Anatomy.of(model).stacks[0].name
    earlier = uneven(model, 0, dropped=(0,))
    protect = (f"{stack}.2", f"{stack}.1.attention", stack, "pooler")
    given = constraints_on_given(Constraints(protect=protect, layers=2), earlier)
    assert given.protect == (f"{stack}.1", f"{stack}.0.attention", stack, "pooler")
    assert dataclasses.replace(given, protect=protect) == Constraints(protect=protect, layers=2)
    assert constraints_on_given(Constraints(protect=protect), uneven(model, 0)).protect == protect


def test_rounds_start_from_what_the_round_before_ended_with():
    data = Data("a", "b", "c")
    recipe = Recipe("m", "o", data, prune=Prune(budget=("macs=80%", "macs=60%")), distill=Distill())
    one, two = Round.of(recipe)
    assert (one.given, one.path(one.result)) == ("dense", "round-1/distilled")
    assert (two.given, two.path("scores"), two.start) == (
        "round-1/distilled",
        "round-2/scores",
        "compensated",
    )
    assert one.first and not two.first
    (only,) = Round.of(Recipe("m", "o", data, prune=Prune(compensate=False)))
    assert (only.given, only.path(only.result), only.start) == ("dense", "pruned", "pruned")


def in_layers(model, anatomy):
    """Parameters of the layers of a real model."""
    return sum(p.numel() for p in model.parameters()) - anatomy.outside_params


def test_a_run_in_rounds_goes_on_from_each_and_meets_shares_of_the_dense_model(tmp_path):
    distill = {"epochs": 1, "learning_rate": 1e-3, "batch_size": 8}
    budgets = ["params=80%", "params=60%"]
    recipe = generation(tmp_path, prune={"budget": budgets}, distill=distill)
    assert hfprune.run(recipe, say=str, until="result") is None
    plans = [PruningPlan.load(at(recipe, f"round-{n}/plan.json")) for n in (1, 2)]
    cut = PruningPlan.load(at(recipe, "round-2/cut.json"))
    dense = hfprune.from_pretrained(at(recipe, "dense"))
    for number, (plan, share) in enumerate(zip(plans, (0.8, 0.6), strict=True), 1):
        result = hfprune.from_pretrained(at(recipe, f"round-{number}/distilled"))
        assert plan.anatomy == Anatomy.of(dense)
        assert {g.name: g.units for g in Anatomy.of(result)} == {
            g.name: len(plan.keep[g.name]) for g in plan.anatomy
        }
        left = in_layers(result, Anatomy.of(result)) / in_layers(dense, plan.anatomy)
        assert share * 0.99 <= left <= share
        assert left == pytest.approx(plan.params_share)
        assert plan.budget == Budget.parse(budgets[number - 1])
    assert cut.anatomy == Anatomy.of(hfprune.from_pretrained(at(recipe, "round-1/distilled")))
    assert all(set(plans[1].keep[name]) <= set(kept) for name, kept in plans[0].keep.items())

    said = []
    longer = changed(recipe, "prune", budget=(*budgets, "params=50%"))
    hfprune.run(longer, say=said.append, until="result")
    again = [line for line in said if line.endswith(" ...")]
    assert again and all(", round 3 ..." in line for line in again), "rounds 1 and 2 were there"
    assert PruningPlan.load(at(recipe, "round-3/plan.json")).params_share <= 0.5


@pytest.mark.slow
def test_a_report_of_rounds_has_a_row_for_each(tmp_path):
    budgets = ["macs=80%", "macs=60%"]
    recipe = generation(tmp_path, prune={"budget": budgets}, distill=None)
    report = hfprune.run(recipe, say=str)
    assert [v.name for v in report.variants] == ["dense", *ROUNDS]
    assert [v.macs for v in report.variants] == sorted(v.macs for v in report.variants)[::-1]
    assert [point.budget for point in report.curve] == pytest.approx([1, 0.8, 0.6], abs=0.01)
    for variant, point in zip(report.variants, report.curve, strict=True):
        assert point.mean == variant.quality.value
    assert json.loads(at(recipe, "reloaded.json").read_text())["model"] == ROUNDS[-1]
    # The rounds are a family of sizes to publish, each with the report until there.
    sizes = {"macs-80": ROUNDS[0], "macs-60": ROUNDS[1], "main": ROUNDS[1]}
    done = hfprune.publish_family(at(recipe), "me/sizes", dry_run=tmp_path / "dry", say=str)
    assert done.keys() == sizes.keys()
    for size, name in sizes.items():
        said = json.loads((tmp_path / "dry" / size / "report.json").read_text())
        assert [v["name"] for v in said["variants"]] == ["dense", *ROUNDS][: 2 + ROUNDS.index(name)]
        model = hfprune.from_pretrained(tmp_path / "dry" / size)
        assert model.num_parameters() == said["variants"][-1]["params"]
