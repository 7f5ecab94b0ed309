"""The draws have the means that they are known by, and are the same for everybody."""

import statistics
from typing import Any

import pytest

from atomcli.benchmarks.workloads import draw, token_ids
from atomcli.errors import UsageError


@pytest.mark.parametrize(("name", "prompt", "output"), [("paper", 23.3, 1001), ("chat", 160, 340)])
def test_means(name: Any, prompt: float, output: float) -> None:
    requests = draw(name, 20_000)
    assert statistics.mean(request.prompt for request in requests) == pytest.approx(prompt, rel=0.04)
    assert statistics.mean(request.output for request in requests) == pytest.approx(output, rel=0.03)
    assert all(request.prompt >= 1 and request.output >= 1 for request in requests)
    assert max(request.prompt + request.output for request in requests) <= 2048


def test_the_papers_total_is_uniform() -> None:
    totals = sorted(request.prompt + request.output for request in draw("paper", 20_000))
    quartiles = [totals[len(totals) * share // 4] for share in (1, 2, 3)]
    assert quartiles == pytest.approx([512, 1024, 1536], rel=0.03)


def test_a_seed_is_a_draw() -> None:
    assert draw("paper", 50) == draw("paper", 50)
    assert draw("paper", 50) != draw("paper", 50, seed=1)
    assert token_ids(draw("chat", 1)[0], 3, 100) == token_ids(draw("chat", 1)[0], 3, 100)
    assert token_ids(draw("chat", 1)[0], 3, 100) != token_ids(draw("chat", 1)[0], 4, 100)


def test_scaled_down() -> None:
    small = draw("paper", 5_000, scale=1 / 64)
    assert max(request.prompt + request.output for request in small) <= 32
    assert statistics.mean(request.output for request in small) == pytest.approx(995 / 64, rel=0.1)


@pytest.mark.parametrize("wrong", [{"name": "poem"}, {"requests": 0}, {"scale": 0.0}, {"scale": 1.5}, {"scale": 1e-4}])
def test_no_workload(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        draw(**({"name": "paper"} | wrong))
