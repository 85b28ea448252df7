"""The knapsack against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfprune.planning import knapsack
from hfprune.planning.knapsack import choose


def brute_force(costs, losses, limits, floors=(-np.inf,)):
    """The least loss within the limits that reaches a floor, None if nothing does."""
    found = [
        sum(loss[i] for loss, i in zip(losses, picks, strict=True))
        for picks in itertools.product(*(range(len(c)) for c in costs))
        if (spent(costs, picks) <= limits).all() and (spent(costs, picks) >= floors).any()
    ]
    return min(found, default=None)


def spent(costs, picks):
    return np.sum([cost[i] for cost, i in zip(costs, picks, strict=True)], axis=0)


def share_spent(costs, picks, limits):
    """How near a choice comes to one of the limits."""
    return (spent(costs, picks) / np.maximum(limits, 1)).max()


def lost(losses, picks):
    return sum(loss[i] for loss, i in zip(losses, picks, strict=True))


@st.composite
def knapsacks(draw, resources, alike=False):
    """(costs, losses, limits) of a few groups; losses are sixteenths: exact sums.

    Alike: an option that is dearer by one cost is dearer by all, as with units that stay.
    """
    costs, losses = [], []
    for _ in range(draw(st.integers(1, 5))):
        size = draw(st.integers(1, 5))
        columns = st.lists(st.integers(0, 30), min_size=size, max_size=size)
        own = np.array([draw(columns) for _ in range(resources)]).T
        costs.append(np.sort(own, axis=0) if alike else own)
        loss = np.array(draw(st.lists(st.integers(0, 64), min_size=size, max_size=size)))
        losses.append((np.sort(loss)[::-1] if alike else loss) / 16)
    least, most = (sum(f(c) for c in costs) for f in (lambda c: c.min(0), lambda c: c.max(0)))
    limits = [draw(st.integers(int(a), int(b) + 2)) for a, b in zip(least, most, strict=True)]
    return costs, losses, limits


@settings(max_examples=150)
@given(knapsacks(1))
def test_under_one_limit_it_is_the_best_there_is(problem):
    costs, losses, limits = problem
    picks, gap, _ = choose(costs, losses, limits)
    assert (spent(costs, picks) <= limits).all()
    assert lost(losses, picks) == pytest.approx(brute_force(costs, losses, limits))
    assert gap == 0


@settings(max_examples=100)
@given(st.integers(2, 3).flatmap(lambda n: knapsacks(n, alike=True)))
def test_under_several_limits_it_is_the_best_of_options_that_are_cheap_by_all_costs(problem):
    costs, losses, limits = problem
    picks, gap, prices = choose(costs, losses, limits)
    assert (spent(costs, picks) <= limits).all()
    best = brute_force(costs, losses, limits)
    assert lost(losses, picks) == pytest.approx(best, abs=1e-6)
    assert gap <= 1e-6 and min(prices) >= 0


@settings(max_examples=100)
@given(knapsacks(2))
def test_under_several_limits_what_it_says_holds(problem):
    costs, losses, limits = problem
    best = brute_force(costs, losses, limits)
    choice = choose(costs, losses, limits)
    assert (choice is None) == (best is None)
    if choice is not None:
        assert (spent(costs, choice.picks) <= limits).all()
        assert best - 1e-9 <= lost(losses, choice.picks) <= best + choice.gap + 1e-9


@settings(max_examples=150)
@given(
    st.integers(1, 2).flatmap(lambda n: knapsacks(n, alike=True)),
    st.lists(st.integers(0, 8), min_size=2, max_size=2),
)
def test_with_floors_it_is_the_best_that_reaches_one(problem, below):
    costs, losses, limits = problem
    floors = [limit - less for limit, less in zip(limits, below, strict=False)]
    choice = choose(costs, losses, limits, floors)
    assert (spent(costs, choice.picks) <= limits).all()
    best = brute_force(costs, losses, limits, floors)
    assert (best is not None) == (spent(costs, choice.picks) >= floors).any()
    if best is None:
        assert share_spent(costs, choice.picks, limits) == max(
            share_spent(costs, picks, limits)
            for picks in itertools.product(*(range(len(c)) for c in costs))
            if (spent(costs, picks) <= limits).all()
        )
    else:
        assert lost(losses, choice.picks) == pytest.approx(best, abs=1e-6)
        assert choice.gap <= 1e-6


@pytest.mark.parametrize("resources", [1, 2])
def test_a_search_for_a_floor_too_large_to_finish_is_good_and_says_so(resources, monkeypatch):
    monkeypatch.setattr(knapsack, "_MOST_STATES", 20)
    generator = np.random.default_rng(0)
    gaps, regrets = [], []
    for _ in range(60):
        costs, losses, limits = random_problem(generator, resources)
        floors = [limit - 2 for limit in limits]
        best = brute_force(costs, losses, limits, floors)
        choice = choose(costs, losses, limits, floors)
        if best is None or choice is None or (spent(costs, choice.picks) < floors).all():
            continue
        assert (spent(costs, choice.picks) <= limits).all()
        regrets.append(lost(losses, choice.picks) - best)
        assert -1e-9 <= regrets[-1] <= choice.gap + 1e-9
        gaps.append(choice.gap)
    assert len(gaps) > 20 and max(gaps) > 0
    assert np.mean(regrets) < 0.01  # 0.6 if it were any choice that reaches a floor


def random_problem(generator, resources):
    costs = [generator.integers(1, 40, (4, resources)) for _ in range(5)]
    losses = [generator.random(4) for _ in range(5)]
    return costs, losses, [int(n) for n in np.sum([c.mean(0) for c in costs], axis=0)]


@pytest.mark.parametrize(
    ("resources", "too_small"),
    [
        (1, {"_MOST_STATES": 2}),
        (2, {"_MOST_OPTIONS": 0}),
        (2, {"_MOST_CUTS": 2, "_MOST_OPTIONS": 0}),
    ],
)
def test_a_search_too_large_to_finish_says_how_far_it_may_be_off(resources, too_small, monkeypatch):
    monkeypatch.setattr(knapsack, "_MOST_STATES", 2)
    for name, value in too_small.items():
        monkeypatch.setattr(knapsack, name, value)
    generator = np.random.default_rng(0)
    gaps = []
    for _ in range(30):
        costs, losses, limits = random_problem(generator, resources)
        choice = choose(costs, losses, limits)
        if choice is None:
            continue
        assert (spent(costs, choice.picks) <= limits).all()
        best = brute_force(costs, losses, limits)
        assert best - 1e-9 <= lost(losses, choice.picks) <= best + choice.gap + 1e-9
        gaps.append(choice.gap)
    assert len(gaps) > 20 and max(gaps) > 0


def test_a_price_says_what_more_room_would_save():
    """Under the relaxation, whose prices they are, the saving is at most the price."""
    generator = np.random.default_rng(1)
    weights, losses = generator.integers(50, 90, 4), np.sort(generator.random(300))
    counts = np.arange(301)[:, None]
    costs = [counts * np.array([w, 10 * w + 7]) for w in weights]
    saved = [np.append(0, np.cumsum(np.sort(losses * (n + 1))[::-1])) for n in range(4)]
    losses = [s.max() - s for s in saved]
    limits = [int(sum(c[:, 0].max() for c in costs) * 0.4), 10**9]
    here = choose(costs, losses, limits)
    assert here.prices[0] > 0 and here.prices[1] == 0
    more = choose(costs, losses, [limits[0] + 1000, limits[1]])
    gained = lost(losses, here.picks) - lost(losses, more.picks)
    assert gained == pytest.approx(1000 * here.prices[0], rel=0.05)
