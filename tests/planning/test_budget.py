"""Budgets: what is read, what is refused, and that a printed budget is the same budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfprune.errors import BudgetError
from hfprune.planning.budget import RESOURCES, Budget, Limit


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("macs=50%", Limit("macs", 0.5)),
        ("params=0.6", Limit("params", 0.6)),
        (" macs = 12.5 % ", Limit("macs", 0.125)),
        ("macs=1", Limit("macs", 1.0)),
        ("params=100%", Limit("params", 1.0)),
        ("macs=5e-1", Limit("macs", 0.5)),
        ("macs=1.2G", Limit("macs", 1_200_000_000, absolute=True)),
        ("params=15M", Limit("params", 15_000_000, absolute=True)),
        ("memory=60%", Limit("memory", 0.6)),
        ("memory=400MB@1x128", Limit("memory", 400_000_000, absolute=True, shape=(1, 128))),
        ("memory=1.5 GiB @ 4x2048", Limit("memory", 3 * 2**29, absolute=True, shape=(4, 2048))),
        ("latency=60%@8x32", Limit("latency", 0.6, shape=(8, 32))),
        ("latency=8ms", Limit("latency", 0.008, absolute=True)),
    ],
)
def test_what_is_read(text, limit):
    assert Limit.parse(text) == limit
    assert Budget.parse(text) == Budget((limit,))
    assert Budget.parse(Budget((limit,))) == Budget((limit,))


def test_several_limits_in_one_text_or_in_a_sequence():
    both = Budget((Limit("macs", 0.5), Limit("params", 0.6)))
    assert Budget.parse("macs=50%, params=60%") == both
    assert Budget.parse(["macs=50%", "params=60%"]) == both
    three = "memory=60%@1x128, memory=70%@8x2048"
    assert str(Budget.parse(three)) == three
    with pytest.raises(BudgetError, match="macs is limited twice in macs=50%, macs=40%"):
        Budget.parse("macs=50%,macs=40%")


@pytest.mark.parametrize(
    "text", ["", "macs", "50%", "macs=", "macs=half", "macs=%", "=", 0.5, "macs=50%,", "macs=--5"]
)
def test_what_cannot_be_read(text):
    with pytest.raises(BudgetError, match=r"Cannot read the budget .*'macs=50%' or 'params=0\.6'"):
        Budget.parse(text)
    with pytest.raises(BudgetError, match="one limit at least"):
        Budget.parse([])


@pytest.mark.parametrize("amount", ["0", "0%", "-1", "101%", "150%", "50", "nan", "inf", "0M"])
def test_an_amount_out_of_range(amount):
    with pytest.raises(BudgetError, match=r"more than 0 and at most 1 .*macs=1\.2G"):
        Budget.parse(f"macs={amount}")


def test_an_unknown_name_or_unit_names_the_nearest():
    with pytest.raises(BudgetError, match=r"Unknown budget 'mac'\. Did you mean 'macs'\?"):
        Budget.parse("mac=50%")
    with pytest.raises(BudgetError, match="Available: latency, macs, memory, params"):
        Budget.parse("seconds=50%")
    with pytest.raises(BudgetError, match=r"Unknown unit of memory 'Mb'.*memory=400MB"):
        Budget.parse("memory=400Mb")
    with pytest.raises(BudgetError, match="belong to memory and latency"):
        Budget.parse("macs=50%@1x128")
    with pytest.raises(BudgetError, match="are 1 or more"):
        Budget.parse("memory=50%@0x128")


shapes = st.none() | st.tuples(st.integers(1, 64), st.integers(1, 10_000))


@st.composite
def limits(draw):
    resource = draw(st.sampled_from(RESOURCES))
    shape = draw(shapes) if resource in ("memory", "latency") else None
    if draw(st.booleans()):
        return Limit(resource, draw(st.floats(0, 1, exclude_min=True)), shape=shape)
    seconds = st.floats(1e-9, 1e6)
    amount = draw(seconds if resource == "latency" else st.integers(1, 2**48))
    return Limit(resource, amount, absolute=True, shape=shape)


@given(limits())
def test_a_printed_budget_is_the_same_budget(limit):
    assert Budget.parse(str(limit)) == Budget((limit,))


def test_round_amounts_are_printed_as_people_write_them():
    for text in (
        "macs=50%",
        "macs=7%",
        "macs=12.5%",
        "params=15M",
        "params=0.5K",
        "memory=400MB@1x128",
        "latency=8ms",
        "latency=0.5us",
    ):
        assert str(Budget.parse(text)) == text
