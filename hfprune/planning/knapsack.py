"""The multiple-choice knapsack: one option per group, the least loss, every cost within its limit.

Under one limit it is solved as Kellerer, Pferschy and Pisinger (2004, chapter 11) do: the
Lagrangian relaxation gives a price of cost, a feasible choice and a bound; then dynamic programming
over the few options that the bound cannot exclude is exact. Under several limits the
best choice under one of them is the best of all if it respects the others. Otherwise the relaxation
has a price for each (found by cutting planes, Kelley 1960), and branch and bound (HiGHS) goes
through what the bound cannot exclude.

Where options are coarse, the best choice may stay far below every limit. A floor then asks for one
that uses a limit nearly up. No price leads there, so dynamic programming alone looks for it, among
the choices whose bound is below a ceiling that rises until there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_MOST_STATES = 200_000
_MOST_OPTIONS = 20_000  # that branch and bound is asked to go through
_MOST_NODES = 500
_MOST_CUTS = 200
_CEILINGS = 4.0 ** np.arange(-8, 1)  # of what may be lost at most


class Choice(NamedTuple):
    """What the knapsack takes.

    Attributes:
        picks: the option of each group.
        gap: a bound on how much more it loses than the best choice that is allowed (0: it is the
            best).
        prices: loss per unit of each cost at the margin, floors aside; 0 for a limit that does not
            bind.
    """

    picks: list[int]
    gap: float
    prices: list[float]


def choose(
    costs: Sequence[Ints],
    losses: Sequence[Floats],
    limits: Sequence[int],
    floors: Sequence[int] | None = None,
) -> Choice | None:
    """Pick one option per group with the least total loss, every total cost within its limit.

    Args:
        costs: per group, (options, limits) what each option costs.
        losses: per group, the loss of each option.
        limits: of each cost.
        floors: of each cost, one of which at least is to be reached; by default none need be.

    Returns:
        The choice; None if none is within the limits. Under several limits, and where no option of
        a group is the cheapest by all of them, None may also mean that none was found. Where none
        was found that reaches a floor, it is one that comes near.
    """
    if not costs:
        return Choice([], 0.0, [0.0] * len(limits))
    best = _choose_within(costs, losses, limits)
    if best is None or floors is None or _reaches(costs, best.picks, floors):
        return best
    bound = _total(losses, best.picks) - best.gap
    most = sum(float(loss.max()) for loss in losses)
    for ceiling in bound + (most - bound) * _CEILINGS:
        picks, sure = _search(costs, losses, np.array(best.prices), limits, ceiling, floors)
        if picks:
            gap = 0.0 if sure else max(0.0, _total(losses, picks) - bound)
            return best._replace(picks=picks, gap=gap)
        bound = ceiling if sure else bound
    fullest = _fullest(costs, limits, best.picks)
    return best._replace(picks=fullest, gap=max(0.0, _total(losses, fullest) - bound))


def _choose_within(
    costs: Sequence[Ints], losses: Sequence[Floats], limits: Sequence[int]
) -> Choice | None:
    """As `choose`, without floors."""
    if (np.sum([cost.min(axis=0) for cost in costs], axis=0) > limits).any():
        return None
    for n, limit in enumerate(limits):
        picks, gap, price = _under_one([cost[:, [n]] for cost in costs], losses, limit)
        if _within(costs, picks, np.array(limits)):
            return Choice(picks, gap, [price if m == n else 0.0 for m in range(len(limits))])
    return _under_several(costs, losses, np.array(limits))


def _fullest(costs: Sequence[Ints], limits: Sequence[int], known: list[int]) -> list[int]:
    """Of a choice that is known and of those that spend the most of each cost, all within the
    limits, the one that comes nearest to a limit.
    """
    found = [known]
    for n in range(len(limits)):
        unspent = [(cost[:, n].max() - cost[:, n]).astype(float) for cost in costs]
        choice = _choose_within(costs, unspent, limits)
        found += [choice.picks] if choice else []
    return max(found, key=lambda picks: float((_spent(costs, picks) / np.maximum(limits, 1)).max()))


def _under_one(
    costs: Sequence[Ints], losses: Sequence[Floats], limit: int
) -> tuple[list[int], float, float]:
    """As `choose`, under one limit."""
    price, chosen = _price([cost[:, 0] for cost in costs], losses, limit)
    chosen = _fill(costs, losses, chosen, np.array([limit]))
    best = _total(losses, chosen)
    reduced = _priced(costs, losses, np.array([price]))
    bound = sum(float(r.min()) for r in reduced) - price * limit
    better, sure = _search(costs, losses, np.array([price]), [limit], best)
    return better or chosen, 0.0 if sure else max(0.0, best - bound), price


def _price(costs: Sequence[Ints], losses: Sequence[Floats], limit: int) -> tuple[float, list[int]]:
    """The lowest price of cost at which the groups, each choosing for itself, meet the limit."""

    def at(price: float) -> list[int]:
        # Of equally good options the cheaper one, so that a high enough price is always feasible.
        picks = []
        for cost, loss in zip(costs, losses, strict=True):
            value = loss + price * cost
            ties = np.flatnonzero(value <= value.min())
            picks.append(int(ties[np.argmin(cost[ties])]))
        return picks

    def spent(picks: Sequence[int]) -> int:
        return sum(int(cost[i]) for cost, i in zip(costs, picks, strict=True))

    if spent(picks := at(0.0)) <= limit:
        return 0.0, picks
    low, high = 0.0, 1e-12 + max(float(loss.max()) for loss in losses) / max(1, limit)
    while spent(at(high)) > limit:
        low, high = high, high * 4
        if not np.isfinite(high):
            return low, [int(np.argmin(cost)) for cost in costs]
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if spent(at(middle)) > limit else (low, middle)
    return high, at(high)


def _fill(
    costs: Sequence[Ints], losses: Sequence[Floats], chosen: Sequence[int], limits: Ints
) -> list[int]:
    """Spend what the relaxation left over, each time on the change that saves the most loss."""
    chosen = list(chosen)
    left = limits - _spent(costs, chosen)
    while True:
        saving, where = 0.0, None
        for g, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
            affordable = np.flatnonzero((cost <= cost[chosen[g]] + left).all(axis=1))
            option = int(affordable[np.argmin(loss[affordable])])
            if loss[chosen[g]] - loss[option] > saving:
                saving, where = float(loss[chosen[g]] - loss[option]), (g, option)
        if where is None:
            return chosen
        g, option = where
        left -= costs[g][option] - costs[g][chosen[g]]
        chosen[g] = option


def _search(
    costs: Sequence[Ints],
    losses: Sequence[Floats],
    prices: Floats,
    limits: Sequence[int],
    best: float,
    floors: Sequence[int] | None = None,
) -> tuple[list[int], bool]:
    """Dynamic programming over the options whose bound at the prices is below `best`.

    Returns:
        The best choice that was found, [] if none is better than `best`; and whether that is sure.
        It is not where there are too many states: with floors, the most promising are followed,
        and without, none.
    """
    slack = 1e-9 * (abs(best) + 1e-300)
    reduced = _priced(costs, losses, prices)
    rest = np.concatenate([np.cumsum([r.min() for r in reduced][::-1])[::-1], [0.0]])
    ceiling = best - slack + float(prices @ limits)
    dearest = np.array([cost.max(axis=0) for cost in costs])
    cost, loss, sure = np.zeros((1, len(limits)), dtype=np.int64), np.zeros(1), True
    # Per group: which earlier state and which option led to a state.
    steps: list[tuple[Ints, Ints]] = []
    for g, (option_cost, option_loss) in enumerate(zip(costs, losses, strict=True)):
        floor_before = float(np.min(loss + cost @ prices))
        options = np.flatnonzero(floor_before + reduced[g] + rest[g + 1] <= ceiling)
        many = min(_MOST_STATES, 50 * _MOST_STATES // max(1, len(options)))
        if len(cost) > many:
            if floors is None:
                return [], False
            promising = np.argsort(loss + cost @ prices, kind="stable")[:many]
            cost, loss, sure = cost[promising], loss[promising], False
            steps[-1] = (steps[-1][0][promising], steps[-1][1][promising])
        new_cost = (cost[:, None] + option_cost[options][None]).reshape(-1, len(limits))
        new_loss = (loss[:, None] + option_loss[options][None]).ravel()
        alive = (new_cost <= limits).all(axis=1)
        alive &= new_loss + new_cost @ prices + rest[g + 1] <= ceiling
        if floors is not None:
            alive &= (new_cost + dearest[g + 1 :].sum(axis=0) >= floors).any(axis=1)
        living = np.flatnonzero(alive)
        order = living[np.lexsort((new_loss[living], *new_cost[living].T))]
        first = np.ones(len(order), dtype=bool)
        if floors is None:
            falls = np.minimum.accumulate(new_loss[order]) if len(order) else np.zeros(0)
            first[1:] = falls[1:] < falls[:-1]  # dearer and no better: dominated
        else:  # what is dearer may reach a floor
            first[1:] = (new_cost[order[1:]] != new_cost[order[:-1]]).any(axis=1)
        order = order[first]
        if not len(order):
            return [], sure
        steps.append((order // len(options), options[order % len(options)]))
        cost, loss = new_cost[order], new_loss[order]
    state, picks = int(np.argmin(loss)), []
    if loss[state] >= best - slack:
        return [], sure
    for parents, chosen in reversed(steps):
        picks.append(int(chosen[state]))
        state = int(parents[state])
    return picks[::-1], sure


def _under_several(costs: Sequence[Ints], losses: Sequence[Floats], limits: Ints) -> Choice | None:
    units = np.maximum(limits, 1)
    shares = [cost / units for cost in costs]  # so that prices are of one size
    least = [int(np.argmin(share.sum(axis=1))) for share in shares]
    if not _within(costs, least, limits):
        found = _branch_and_bound(
            shares, losses, limits / units, [np.arange(len(c)) for c in costs]
        )
        if found is None or not _within(costs, found[0], limits):
            return None
        least = found[0]
    prices, bound, tried = _prices(shares, losses, limits / units, least)
    feasible = [picks for picks in tried if _within(costs, picks, limits)]
    filled = [_fill(costs, losses, picks, limits) for picks in feasible]
    chosen = min(filled, key=lambda picks: _total(losses, picks))
    best = _total(losses, chosen)
    reduced = _priced(shares, losses, prices)
    open_to = [np.flatnonzero(r - r.min() <= best - bound) for r in reduced]
    if all(map(len, open_to)) and sum(map(len, open_to)) <= _MOST_OPTIONS:
        found = _branch_and_bound(shares, losses, limits / units, open_to)
        if found is not None:
            bound = max(bound, found[1])
            if _within(costs, found[0], limits) and _total(losses, found[0]) < best:
                chosen, best = found[0], _total(losses, found[0])
    return Choice(chosen, max(0.0, best - bound), list(prices / units))


def _prices(
    shares: Sequence[Floats], losses: Sequence[Floats], room: Floats, least: list[int]
) -> tuple[Floats, float, list[list[int]]]:
    """The prices of the best Lagrangian bound, the bound, and every choice that was tried.

    A choice that is best at some prices bounds the dual function from above by a plane; the next
    prices are where the planes so far leave most room.
    """
    from scipy.optimize import linprog

    tried = [least]
    prices, best_prices, bound = np.zeros(len(room)), np.zeros(len(room)), -np.inf
    for _ in range(_MOST_CUTS):
        values = _priced(shares, losses, prices)
        picks = [int(np.argmin(value)) for value in values]
        value = sum(float(v[i]) for v, i in zip(values, picks, strict=True)) - float(prices @ room)
        if value > bound:
            bound, best_prices = value, prices
        tried.append(picks)
        planes = [np.append(-1.0, _spent(shares, t) - room) for t in tried]
        result = linprog(
            np.append(-1.0, np.zeros(len(room))),
            A_ub=-np.array(planes),
            b_ub=[_total(losses, t) for t in tried],
            bounds=[(None, None), *[(0, None)] * len(room)],
        )
        if not result.success or -result.fun - bound <= 1e-9 * abs(bound):
            break
        prices = np.maximum(result.x[1:], 0.0)
    return best_prices, bound, tried


def _branch_and_bound(
    shares: Sequence[Floats], losses: Sequence[Floats], room: Floats, options: Sequence[Ints]
) -> tuple[list[int], float] | None:
    """The best choice among the given options of each group that was found, and a lower bound."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    sizes = [len(own) for own in options]
    loss = np.concatenate([values[own] for values, own in zip(losses, options, strict=True)])
    share = np.concatenate([values[own] for values, own in zip(shares, options, strict=True)])
    group = np.repeat(np.arange(len(sizes)), sizes)
    member = csr_array((np.ones(len(group)), (group, np.arange(len(group)))))
    unit = max(float(np.ptp(loss)), 1e-300)
    result = milp(
        loss / unit,
        integrality=np.ones(len(loss)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(member, 1, 1), LinearConstraint(share.T, -np.inf, room)],
        options={"node_limit": _MOST_NODES, "mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    starts = np.cumsum([0, *sizes])
    picks = [
        int(own[np.argmax(result.x[start : start + len(own)])])
        for own, start in zip(options, starts[:-1], strict=True)
    ]
    return picks, float(result.mip_dual_bound) * unit


def _priced(costs: Sequence[NDArray], losses: Sequence[Floats], prices: Floats) -> list[Floats]:
    """Per group, what each option loses and pays for its costs."""
    return [loss + cost @ prices for loss, cost in zip(losses, costs, strict=True)]


def _total(losses: Sequence[Floats], picks: Sequence[int]) -> float:
    return sum(float(loss[i]) for loss, i in zip(losses, picks, strict=True))


def _spent(costs: Sequence[NDArray], picks: Sequence[int]) -> NDArray:
    return np.sum([cost[i] for cost, i in zip(costs, picks, strict=True)], axis=0)


def _within(costs: Sequence[Ints], picks: Sequence[int], limits: Ints) -> bool:
    return bool((_spent(costs, picks) <= limits).all())


def _reaches(costs: Sequence[Ints], picks: Sequence[int], floors: Sequence[int]) -> bool:
    return bool((_spent(costs, picks) >= floors).any())
