"""Sampling on the device: the right distribution, decided by the request alone."""

import pytest
import torch

from atomcli.errors import UsageError
from atomcli.runtime.sampling import Sampling, greedy, sample


def draws(logits: torch.Tensor, count: int, temperature: float, top_p: float) -> torch.Tensor:
    """`count` independent draws from one row of logits, as shares of the vocabulary."""
    rows = logits.expand(count, -1)
    tokens = sample(
        rows,
        torch.full((count,), temperature),
        torch.full((count,), top_p),
        torch.zeros(count, dtype=torch.int64),
        torch.arange(count),
    )
    return torch.bincount(tokens, minlength=logits.numel()) / count


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).softmax(-1)
        # 20,000 draws: four standard deviations are below 0.015.
        assert (draws(logits, 20_000, temperature, 1.0) - expected).abs().max() < 0.015
    kept = logits.softmax(-1) * torch.tensor([1, 1, 0, 0])  # 0.64 and 0.24 of it
    assert (draws(logits, 20_000, 1.0, 0.8) - kept / kept.sum()).abs().max() < 0.015
    assert draws(logits, 100, 1.0, 0.6)[0] == 1


def test_temperature_zero_is_greedy_beside_sampled_rows() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    temperature = torch.tensor([0.0, 1.0] * 3)
    tokens = sample(logits, temperature, torch.full((6,), 0.5), torch.arange(6), torch.arange(6))
    assert torch.equal(tokens[::2], greedy(logits)[::2])


def test_seeds_and_positions_decide_the_draw() -> None:
    logits = torch.zeros(2000)
    rows, ones, zeros = logits.expand(64, -1), torch.ones(64), torch.zeros(64, dtype=torch.int64)
    by_position = sample(rows, ones, ones, zeros, torch.arange(64))
    by_seed = sample(rows, ones, ones, torch.arange(64), zeros)
    assert len(by_position.unique()) > 55
    assert len(by_seed.unique()) > 55
    assert torch.equal(by_position[5:6], sample(logits[None], ones[:1], ones[:1], zeros[:1], torch.tensor([5])))


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_samplings_that_are_none_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="Temperature is at least 0"):
        Sampling(**wrong)  # type: ignore[arg-type]
