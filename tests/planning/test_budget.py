"""Budgets: what is read, what is refused, and that a printed budget is the same budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfprune.errors import BudgetError
from hfprune.planning.budget import Budget


@pytest.mark.parametrize(
    ("text", "resource", "share"),
    [
        ("macs=50%", "macs", 0.5),
        ("params=0.6", "params", 0.6),
        (" macs = 12.5 % ", "macs", 0.125),
        ("macs=1", "macs", 1.0),
        ("params=100%", "params", 1.0),
        ("macs=5e-1", "macs", 0.5),
    ],
)
def test_what_is_read(text, resource, share):
    assert Budget.parse(text) == Budget(resource, share)
    assert Budget.parse(Budget(resource, share)) == Budget(resource, share)


@pytest.mark.parametrize("text", ["", "macs", "50%", "macs=", "macs=half", "macs=%", "=", 0.5])
def test_what_cannot_be_read(text):
    with pytest.raises(BudgetError, match=r"Cannot read the budget .*'macs=50%' or 'params=0\.6'"):
        Budget.parse(text)


@pytest.mark.parametrize("share", ["0", "0%", "-1", "101%", "50", "nan", "inf"])
def test_a_share_out_of_range(share):
    with pytest.raises(BudgetError, match="more than 0 and at most 1"):
        Budget.parse(f"macs={share}")


def test_an_unknown_resource_names_the_nearest():
    with pytest.raises(BudgetError, match=r"Unknown budget 'mac'\. Did you mean 'macs'\?"):
        Budget.parse("mac=50%")
    with pytest.raises(BudgetError, match="Available: macs, params"):
        Budget.parse("seconds=50%")


@given(st.sampled_from(["macs", "params"]), st.floats(0, 1, exclude_min=True))
def test_a_printed_budget_is_the_same_budget(resource, share):
    budget = Budget(resource, share)
    assert Budget.parse(str(budget)) == budget


def test_round_shares_are_printed_as_people_write_them():
    assert [str(Budget("macs", s)) for s in (0.5, 0.07, 0.125)] == [
        "macs=50%",
        "macs=7%",
        "macs=12.5%",
    ]
