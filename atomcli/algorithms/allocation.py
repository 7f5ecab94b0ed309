"""Which candidate each group of linears gets: an exact integer program under one budget.

Every group takes exactly one of its candidates. What the plan loses is to be small and what it costs must stay within
a budget; either side can be bytes, seconds or predicted divergence, since both are sums over the groups. This is the
multiple-choice knapsack problem, the form in which HAWQ-V3 (Yao et al., ICML 2021) chooses bit widths; HiGHS
(scipy.optimize.milp) solves it to optimality.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from atomcli.errors import UsageError

Table = Sequence[Sequence[float]]
"""A number for each candidate of each group: table[group][candidate]."""

# HiGHS proves optimality within absolute tolerances of about 1e-6; totals are scaled so that these mean nothing.
_SCALE = 1e4
# A sum of costs may pass the budget by the rounding of that sum.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Allocation:
    """The candidate of each group, by its index, and what all of them together lose and cost."""

    choice: tuple[int, ...]
    loss: float
    cost: float


class OutOfReach(UsageError):
    """A budget that no choice meets; `nearest` is the smallest one that can be met."""

    def __init__(self, budget: float, nearest: float) -> None:
        super().__init__(f"a budget of {budget:g} can't be met: the nearest that can is {nearest:g}")
        self.budget, self.nearest = budget, nearest


def allocate(losses: Table, costs: Table, budget: float) -> Allocation:
    """The candidates with the smallest total loss whose total cost is at most `budget`.

    losses and costs have one row per group and one finite number per candidate. Raises OutOfReach when even the
    cheapest candidates cost more than the budget.
    """
    cheapest = cost_range(costs)[0]
    allowed = budget + _ROUNDING * abs(budget)
    if cheapest > allowed:
        raise OutOfReach(budget, cheapest)
    kept = [_undominated(loss, cost) for loss, cost in zip(losses, costs, strict=True)]
    limit = budget
    while True:
        picked = _solve(losses, costs, kept, limit)
        if picked is None:
            # The tolerances leave nothing above the cheapest choice.
            picked = [row[0] for row in kept]
        found = _total(losses, costs, picked)
        if found.cost <= allowed:
            return found
        # A binary that the solver took for whole may be off by 1e-6 of its cost.
        limit = min(limit, budget) - (found.cost - budget)


def frontier(losses: Table, costs: Table, points: int = 16) -> list[Allocation]:
    """The best allocations for `points` budgets, each larger by the same factor, from the cheapest choice to the best.

    Costs are positive; they ascend and losses descend strictly; budgets that buy nothing more are left out.
    """
    low, high = cost_range(costs)
    found: list[Allocation] = []
    for step in range(points):
        share = step / max(1, points - 1)
        best = allocate(losses, costs, high if share == 1 else low * (high / low) ** share)
        if not found or best.loss < found[-1].loss:
            found.append(best)
    return found


def cost_range(costs: Table) -> tuple[float, float]:
    """The least and the most that a choice can cost."""
    return sum(min(row) for row in costs), sum(max(row) for row in costs)


def _undominated(losses: Sequence[float], costs: Sequence[float]) -> list[int]:
    """The candidates of a group that no other one beats or equals in both; cheapest first."""
    kept: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i])):
        if not kept or losses[index] < losses[kept[-1]]:
            kept.append(index)
    return kept


def _total(losses: Table, costs: Table, choice: Sequence[int]) -> Allocation:
    return Allocation(
        tuple(choice),
        sum(row[index] for row, index in zip(losses, choice, strict=True)),
        sum(row[index] for row, index in zip(costs, choice, strict=True)),
    )


def _solve(losses: Table, costs: Table, kept: Sequence[Sequence[int]], budget: float) -> list[int] | None:
    """The best choice among the `kept` candidates, or None when the solver finds none."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    groups = np.repeat(np.arange(len(kept)), [len(row) for row in kept])
    loss = np.array([losses[group][index] for group, row in enumerate(kept) for index in row])
    cost = np.array([costs[group][index] for group, row in enumerate(kept) for index in row])
    # Only differences inside a group decide anything: without the cheapest candidate's cost the numbers stay small.
    least = np.array([costs[group][row[0]] for group, row in enumerate(kept)])
    extra, left = cost - least[groups], budget - float(least.sum())
    unit = max(float(extra.sum()), 1e-300) / _SCALE
    one_each = csr_array((np.ones(len(groups)), (groups, np.arange(len(groups)))))
    spread = max(float(loss.sum() - loss.min()), 1e-300)
    with _silent():
        result = milp(
            loss / (spread / _SCALE),
            integrality=np.ones(len(groups)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(extra[None] / unit, -np.inf, left / unit)],
            options={"mip_rel_gap": 0.0},
        )
    if result.x is None:
        return None
    picked: list[int] = []
    for group, row in enumerate(kept):
        picked.append(row[int(np.argmax(result.x[groups == group]))])
    return picked


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing reaches stdout: HiGHS 1.x prints debugging lines there, past Python and whatever its options say."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
