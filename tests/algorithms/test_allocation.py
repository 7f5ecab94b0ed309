"""Precision selection: the integer program is exact, its frontier monotonic, and quick for large models."""

import itertools
import time

import numpy as np
import pytest

from atomcli.algorithms.allocation import OutOfReach, allocate, cost_range, frontier


def random_tables(seed: int, groups: int, candidates: int, ragged: bool = False) -> tuple[list, list]:
    generator = np.random.default_rng(seed)
    losses, costs = [], []
    for _ in range(groups):
        count = int(generator.integers(1, candidates + 1)) if ragged else candidates
        losses.append((generator.lognormal(0, 1.5, count) * 1e-4).tolist())
        costs.append(generator.integers(1, 50, count).astype(float).tolist())
    return losses, costs


def by_brute_force(losses: list, costs: list, budget: float) -> float:
    best = float("inf")
    for choice in itertools.product(*(range(len(row)) for row in costs)):
        if sum(row[i] for row, i in zip(costs, choice, strict=True)) <= budget:
            best = min(best, sum(row[i] for row, i in zip(losses, choice, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_it_finds_the_optimum(seed):
    losses, costs = random_tables(seed, groups=5, candidates=4, ragged=True)
    low, high = cost_range(costs)
    for share in (0.0, 0.07, 0.33, 0.8, 1.0):
        budget = low + share * (high - low)
        found = allocate(losses, costs, budget)
        assert found.cost <= budget
        assert found.cost == sum(row[i] for row, i in zip(costs, found.choice, strict=True))
        assert found.loss == pytest.approx(by_brute_force(losses, costs, budget), rel=1e-9)


def test_the_two_sides_can_change_places():
    """The smallest model within a divergence: bytes are what is lost, divergence is what is spent."""
    losses, costs = random_tables(7, groups=5, candidates=4)
    found = allocate(costs, losses, 4e-4)
    assert found.loss == by_brute_force(costs, losses, 4e-4)


def test_a_budget_out_of_reach_names_the_nearest():
    losses, costs = random_tables(1, groups=8, candidates=3)
    low = cost_range(costs)[0]
    with pytest.raises(OutOfReach, match="nearest that can") as caught:
        allocate(losses, costs, low - 1)
    assert caught.value.nearest == low
    assert allocate(losses, costs, caught.value.nearest).cost == low


def test_the_frontier_is_monotonic():
    losses, costs = random_tables(2, groups=30, candidates=5)
    points = frontier(losses, costs, 12)
    assert len(points) > 5
    assert points[0].cost == pytest.approx(cost_range(costs)[0])
    assert points[-1].loss == pytest.approx(sum(min(row) for row in losses))
    for before, after in itertools.pairwise(points):
        assert after.loss < before.loss
        assert after.cost > before.cost


def test_eighty_layers_take_seconds_and_leave_stdout_alone(capfd):
    """Four groups a layer, eight candidates from 4.13 to 16 bits, sizes of a 70B model; the goal is ten seconds."""
    generator = np.random.default_rng(0)
    bits = np.array([4.13, 4.25, 4.4, 4.5, 4.9, 8.0, 8.1, 16.0])
    losses, costs = [], []
    for _ in range(80):
        for parameters in (84e6, 67e6, 470e6, 235e6):
            loss = generator.lognormal() * 5e-4 * 2.0 ** (-1.6 * (bits - 4)) * generator.lognormal(0, 0.15, 8)
            losses.append([*loss.tolist()[:-1], 0.0])
            costs.append((bits * parameters / 8).round().tolist())
    budget = 4.5 / 8 * 80 * 856e6
    started = time.process_time()
    found = allocate(losses, costs, budget)
    assert time.process_time() - started < 10
    assert found.cost <= budget
    uniform = sum(row[3] for row in losses)
    assert found.loss < uniform
    assert capfd.readouterr().out == ""
