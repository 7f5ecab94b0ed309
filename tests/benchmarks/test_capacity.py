"""The serving bench on tiny models: as many sequences as the bytes allow, and honest rows where there are none."""

import itertools
import statistics

import pytest

from atomcli.benchmarks.capacity import Workload, bench_capacity, places
from atomcli.benchmarks.model import weight_bytes
from atomcli.benchmarks.systems import System
from atomcli.errors import RunError, UsageError
from tests.benchmarks.test_model import make_model

SHORT = Workload(prompt=5, output=20, context=64)


def test_requests_have_the_stated_means_and_fit() -> None:
    requests = list(itertools.islice(Workload().requests(100), 3000))
    assert statistics.mean(len(request.prompt) for request in requests) == pytest.approx(23, rel=0.05)
    # The longest are cut off at the context.
    assert statistics.mean(request.new_tokens for request in requests) == pytest.approx(960, rel=0.05)
    assert max(len(request.prompt) + request.new_tokens for request in requests) == 2048
    assert requests[:5] == list(itertools.islice(Workload().requests(100), 5))


def test_reserved_places_are_the_largest_power_of_two_that_fits() -> None:
    model = make_model()
    sequence = model.pool_bytes(32)

    def fitting(sequences: float, reserve: int | None = 2048) -> tuple[int, int]:
        return places(model, (weight_bytes(model) + sequences * sequence) / 1e9, reserve, Workload())

    assert fitting(7.9) == (4, 4 * 32)
    assert fitting(8.01) == (8, 8 * 32)
    with pytest.raises(RunError, match="leave no room"):
        fitting(0.9)
    with pytest.raises(RunError, match="leave no room"):
        fitting(-1)
    # Paged: 635 tokens that a sequence has on average, in pages of 64 of which one is part empty.
    assert fitting(8.01, None) == (int(8 * 32 / (635.1 / 64 + 1)), 8 * 32)


def test_held_is_the_average_over_the_steps_of_a_place() -> None:
    """One place of a batch, request after request: what lies in its cache, step by step."""
    held = [
        len(request.prompt) + said
        for request in itertools.islice(Workload().requests(100), 4000)
        for said in range(request.new_tokens)
    ]
    assert Workload().held() == pytest.approx(statistics.mean(held), rel=0.05)


def test_rows_compare_systems_under_each_budget() -> None:
    model = make_model()
    small = (weight_bytes(model) + 2.1 * model.pool_bytes(1)) / 1e9
    systems = [System(name, lambda name=name: make_model(name)) for name in ("bf16", "atom w4a8")]  # type: ignore[misc]
    rows = bench_capacity(systems, [small, 0.5 * small], 64, SHORT, seconds=0.4)
    assert [(row.labels["budget"], row.labels["model"]) for row in rows] == [
        (f"{budget:g} GB", name) for budget in (small, 0.5 * small) for name in ("bf16", "atom w4a8")
    ]
    bf16, ours, none, _ = rows
    assert bf16.note.startswith("2 places; ")
    assert ours.measures["sequences"].median > bf16.measures["sequences"].median  # type: ignore[union-attr]
    assert bf16.measures["ratio"].median == 1  # type: ignore[union-attr]
    assert none.measures["throughput"] is None
    assert "leave no room" in none.note


def test_a_paged_server_is_kept_busy() -> None:
    model = make_model()
    budget = (weight_bytes(model) + 6.1 * model.pool_bytes(1)) / 1e9
    (row,) = bench_capacity([System("one", lambda: model)], [budget], None, SHORT, seconds=0.4)
    assert row.labels["cache"] == "paged"
    assert row.measures["sequences"].median > 3  # type: ignore[union-attr]


def test_a_reserve_that_is_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match="--reserve 100"):
        bench_capacity([], [1.0], 100)


def test_a_model_of_fewer_positions_is_refused() -> None:
    with pytest.raises(UsageError, match="2048 tokens, prompt and new ones, exceed the 128 positions of one"):
        bench_capacity([System("one", make_model)], [1.0])
