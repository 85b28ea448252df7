"""Families of plans: nested, each within its budget, and nearly as good as plans made alone."""

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_solve import kept, scored

from hfprune.errors import BudgetError
from hfprune.planning.budget import Budget
from hfprune.planning.constraints import Constraints
from hfprune.planning.solve import plan, plan_family
from hfprune.structure.surgery import copy_and_cut

MODELS = {family: tiny.model(family) for family in ("bert", "llama", "gpt2", "t5")}
COARSE = {"tolerance": 0.06}  # the units of a tiny model


def check_nested(larger, smaller):
    for part in (*larger.anatomy, *larger.anatomy.blocks):
        whole = tuple(range(part.units))
        assert set(smaller.keep.get(part.name, whole)) <= set(larger.keep.get(part.name, whole))


@settings(max_examples=12)
@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(["macs", "params", "memory"]),
    st.integers(0, 2**31),
    st.sampled_from(
        [
            {},
            {"round_to": 4},
            {"layers": 2},
            {"uniform": True},
            {"min_heads": 2},
            {"min_neurons": 0},
        ]
    ),
)
def test_plans_of_a_family_are_nested_and_meet_their_budgets(family, resource, seed, options):
    model = MODELS[family]
    if family != "llama":
        options = {name: value for name, value in options.items() if name != "uniform"}
    constraints = Constraints(**options | ({"tolerance": 1.0} if options else COARSE))
    shares = (0.75, 0.9, 0.85)
    made = plan_family(
        model, scored(model, seed), [f"{resource}={s:.0%}" for s in shares],
        constraints=constraints,
    )  # fmt: skip
    for share, one in zip(shares, made, strict=True):
        (spent,) = one.spending
        assert share * (1 - constraints.tolerance) <= spent.kept / spent.dense <= share + 1e-4
        assert one.budget.limits[0].amount == pytest.approx(share)
        copy_and_cut(model, one.keep)  # surgery takes it
    smallest, largest, middle = made
    check_nested(largest, middle)
    check_nested(middle, smallest)


def test_the_largest_is_planned_as_if_alone_and_the_others_lose_little():
    """Over many scores: what nesting costs the smaller plans, beside what the budget costs."""
    model = MODELS["llama"]
    budgets = ["macs=80%", "macs=60%", "macs=40%"]
    costs = []
    for seed in range(20):
        scores = scored(model, seed)
        importance = scores.by("reconstruction")
        total = sum(float(v.sum()) for v in importance.values())
        family = plan_family(model, scores, budgets)
        alone = [plan(model, scores, budget) for budget in budgets]
        assert family[0] == alone[0]
        for nested, free in zip(family[1:], alone[1:], strict=True):
            costs.append((kept(free, importance) - kept(nested, importance)) / total)
            assert -1e-9 <= costs[-1] <= nested.gap + 1e-9  # and the plan says so
    print(
        f"nesting costs {sum(costs) / len(costs):.2%} of all importance, at most {max(costs):.2%}"
    )
    assert max(costs) > 0  # or this test would see nothing
    assert sum(costs) / len(costs) < 0.02


def test_several_limits_and_what_is_no_family():
    model = MODELS["bert"]
    scores = scored(model)
    larger, smaller = plan_family(
        model, scores, ["macs=80%, params=75%", "macs=60%, params=70%"],
        constraints=Constraints(**COARSE),
    )  # fmt: skip
    check_nested(larger, smaller)
    assert smaller.macs_share <= 0.6 and smaller.params_share <= 0.7
    for wrong in (
        ["macs=80%", "params=60%"],
        ["macs=80%, params=60%", "macs=60%, params=80%"],
        ["memory=60%@1x8", "memory=60%@2x8"],
        ["params=50%", "params=15M"],
    ):
        with pytest.raises(BudgetError, match="cannot be of one family"):
            plan_family(model, scores, wrong)
    with pytest.raises(BudgetError, match="one budget at least"):
        plan_family(model, scores, [])


@pytest.mark.parametrize("budget", ["macs=60%", Budget.parse("macs=60%")])
def test_a_single_budget_is_a_family_of_one(budget):
    model = MODELS["bert"]
    scores = scored(model)
    assert plan_family(model, scores, budget) == [plan(model, scores, budget)]


def test_equal_budgets_explain_themselves_alike():
    model = MODELS["llama"]
    scores = scored(model)
    for budgets in (["macs=60%", "macs=60%"], ["macs=60%", "macs=59.95%"]):
        one, other = plan_family(model, scores, budgets)
        assert one.keep == other.keep and one.spending == other.spending
        assert one.spending[0].price > 0 and other.margins == one.margins
        assert [str(one.budget), str(other.budget)] == budgets


def test_what_only_nesting_forbids_is_said_so():
    model = MODELS["llama"]
    scores, coarse = scored(model), Constraints(round_to=4)
    plan(model, scores, "macs=44%", constraints=coarse)
    with pytest.raises(BudgetError, match=r"Among what macs=60% keeps, .* By itself macs=44% can"):
        plan_family(model, scores, ["macs=80%", "macs=60%", "macs=44%"], constraints=coarse)


def test_a_single_text_is_a_family_of_one():
    model = MODELS["bert"]
    scores = scored(model)
    assert plan_family(model, scores, "macs=60%") == [plan(model, scores, "macs=60%")]
