"""The law of growth: found again where it is known."""

from pathlib import Path

import pytest

from atomcli.benchmarks.scaling import Run, fit, plot


def runs(once=2.0, per_block=3.0, exponent=2.5, depth=1000):
    return [
        Run(hidden, blocks, 0, once + blocks * per_block * (hidden / 1024) ** exponent, 10**8 + depth * blocks)
        for hidden in (512, 1024)
        for blocks in (1, 2, 4, 8, 16)
    ]


def test_a_law_is_found_in_what_follows_it():
    law = fit(runs())
    assert (law.once, law.per_block, law.exponent) == pytest.approx((2.0, 3.0, 2.5), rel=1e-4)
    assert law.depth_bytes == pytest.approx(1000)
    assert law.error < 1e-4


def test_memory_that_grows_with_the_depth_shows():
    assert fit(runs(depth=10**7)).depth_bytes == pytest.approx(10**7)


def test_a_plot_is_the_same_file_twice(tmp_path: Path):
    made = runs()
    for name in ("a.svg", "b.svg"):
        plot(made, fit(made), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.svg").read_text().lstrip().startswith("<?xml")
