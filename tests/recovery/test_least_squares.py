"""Every fit is what torch's own solver gives on the positions themselves; held-out ones judge."""

import pytest
import torch

from hfprune.recovery.least_squares import RIDGES, NormalEquations, best_fit, ridge, scaled

COLUMNS, OUTPUTS, UNITS = 12, 5, 4


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counted(inputs: torch.Tensor, targets: torch.Tensor, parts: int = 3) -> NormalEquations:
    made = NormalEquations.like(
        torch.zeros(inputs.shape[1] + 1, targets.shape[1], dtype=torch.float64)
    )
    for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        made.add(x, y, torch.ones(len(x)))
    return made


def with_ones(inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)


def mean_error(inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> float:
    return float((with_ones(inputs) @ weights - targets).square().sum() / len(inputs))


def test_error_is_that_of_the_positions() -> None:
    x, y, weights = (
        random(40, COLUMNS, seed=0),
        random(40, OUTPUTS, seed=1),
        random(COLUMNS + 1, OUTPUTS, seed=2),
    )
    assert counted(x, y).error(weights) == pytest.approx(mean_error(x, y, weights))


def test_autocast_does_not_round_the_products() -> None:
    x, y = random(40, COLUMNS, seed=0).float(), random(40, OUTPUTS, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = counted(x, y)
    assert inside.inputs.equal(counted(x, y).inputs)
    assert inside.cross.equal(counted(x, y).cross)


def test_a_weight_counts_as_so_many_positions() -> None:
    x, y = random(40, COLUMNS, seed=0), random(40, OUTPUTS, seed=1)
    times = torch.arange(40) % 3
    weighted = NormalEquations.like(torch.zeros(COLUMNS + 1, OUTPUTS, dtype=torch.float64))
    weighted.add(x, y, times)
    repeated = counted(x.repeat_interleave(times, dim=0), y.repeat_interleave(times, dim=0))
    torch.testing.assert_close(weighted.inputs, repeated.inputs)
    torch.testing.assert_close(weighted.cross, repeated.cross)
    assert weighted.targets == pytest.approx(repeated.targets)


def test_what_two_have_counted_is_what_one_counts_of_both() -> None:
    x, y = random(40, COLUMNS, seed=0), random(40, OUTPUTS, seed=1)
    one, other = counted(x[:15], y[:15]), counted(x[15:], y[15:])
    one.absorb(other)
    both = counted(x, y)
    torch.testing.assert_close(one.inputs, both.inputs)
    torch.testing.assert_close(one.cross, both.cross)
    assert (one.count, one.targets) == (40, pytest.approx(both.targets))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", RIDGES)
def test_a_ridge_is_least_squares_with_one_more_row_for_each_column(
    size: float, bias: bool
) -> None:
    x, y = random(60, COLUMNS, seed=0), random(60, OUTPUTS, seed=1)
    current = random(COLUMNS + 1, OUTPUTS, seed=2)
    if not bias:
        current[-1] = 0
    pull = (size * x.square().sum(dim=0).mean()).sqrt()
    rows = torch.cat([with_ones(x), torch.eye(COLUMNS, COLUMNS + 1, dtype=x.dtype) * pull])
    if not bias:
        rows = rows[:, :-1]
    expected = torch.linalg.lstsq(rows, torch.cat([y, pull * current[:-1]])).solution
    found = ridge(counted(x, y), current, size, bias)
    torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-6, atol=1e-6)
    assert bias or not found[-1].any()


def test_scales_are_least_squares_of_what_each_unit_gives() -> None:
    x, y = random(200, COLUMNS, seed=0), random(200, OUTPUTS, seed=1)
    current = random(COLUMNS + 1, OUTPUTS, seed=2)
    width = COLUMNS // UNITS
    given = [
        (x[:, u : u + width] @ current[u : u + width]).flatten() for u in range(0, COLUMNS, width)
    ]
    scales = torch.linalg.lstsq(
        torch.stack(given, dim=1), (y - current[-1]).flatten()[:, None]
    ).solution
    expected = current.clone()
    expected[:-1] *= scales.repeat_interleave(width, dim=0)
    found = scaled(counted(x, y), current, UNITS)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # its ridge


@pytest.mark.parametrize("units", [0, 3])
def test_nothing_to_scale(units: int) -> None:
    x, y = torch.zeros(9, units, dtype=torch.float64), random(9, OUTPUTS, seed=1)
    current = random(units + 1, OUTPUTS, seed=2)
    torch.testing.assert_close(scaled(counted(x, y), current, units), current)


def noisy(count: int, truth: torch.Tensor, noise: float, seed: int) -> tuple:
    x = random(count, COLUMNS, seed=seed)
    y = with_ones(x) @ truth + noise * random(count, OUTPUTS, seed=seed + 1)
    return x, y


def test_positions_that_were_held_out_choose_the_ridge() -> None:
    truth = random(COLUMNS + 1, OUTPUTS, seed=0)
    current = truth + 0.3 * random(COLUMNS + 1, OUTPUTS, seed=1)
    few, many = noisy(16, truth, 2.0, seed=2), noisy(500, truth, 2.0, seed=4)
    errors = {r: mean_error(*many, ridge(counted(*few), current, r, True)) for r in RIDGES}
    best = min(errors, key=errors.__getitem__)
    assert best > RIDGES[0]  # the positions that were fitted to would choose the least
    chosen = best_fit(counted(*few), counted(*many), current, COLUMNS, True)
    assert mean_error(*many, chosen(counted(*few))) <= errors[best] + 1e-9


def test_an_outlet_that_is_right_on_held_out_positions_stays_as_it_is() -> None:
    current = random(COLUMNS + 1, OUTPUTS, seed=0)
    wrong, right = noisy(16, -current, 2.0, seed=2), noisy(500, current, 0.1, seed=4)
    chosen = best_fit(counted(*wrong), counted(*right), current, COLUMNS, True)
    assert chosen(counted(*wrong)).equal(current)


def test_units_are_scaled_where_that_does_best() -> None:
    current = random(COLUMNS + 1, OUTPUTS, seed=0)
    truth = current.clone()
    truth[:-1] *= torch.tensor([0.2, 3.0, 1.0, -1.0]).repeat_interleave(3)[:, None]
    few, many = noisy(14, truth, 0.5, seed=2), noisy(500, truth, 0.5, seed=4)
    chosen = best_fit(counted(*few), counted(*many), current, UNITS, True)
    torch.testing.assert_close(chosen(counted(*few)), scaled(counted(*few), current, UNITS))
    assert mean_error(*many, chosen(counted(*few))) < min(
        mean_error(*many, ridge(counted(*few), current, size, True)) for size in RIDGES
    )
