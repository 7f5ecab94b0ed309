"""Choosing the next token on the device: greedy, or sampled with noise that only the request decides.

The noise of a token is a hash of the request's seed, the token's position and the vocabulary entry. So a request gets
the same tokens alone and in a full batch, and again when it is computed anew.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from atomcli.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How a request chooses its tokens: temperature 0 is greedy; `top_p` keeps the likeliest tokens of that mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                f"Temperature is at least 0 and top_p lies in (0, 1], not {self.temperature} and {self.top_p}"
            )


GREEDY = Sampling()


def greedy(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """The likeliest token of each row of logits (B, V): int64 (B,), in `out` if it is given."""
    return torch.argmax(logits, dim=-1, out=out)


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """A token for each row of logits (B, V), int64 (B,); greedy where its temperature is 0.

    temperature, top_p fp32 (B,); seeds, positions int64 (B,). Draws by the Gumbel-max trick.
    """
    drawn = temperature > 0
    scaled = logits.float() / torch.where(drawn, temperature, 1.0)[:, None]
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    beyond = probabilities.cumsum(dim=-1) - probabilities >= top_p[:, None]
    kept = ordered.masked_fill(beyond & drawn[:, None], -torch.inf)
    noise = _gumbel(seeds, positions, order) * drawn[:, None]
    best = (kept + noise).argmax(dim=-1, keepdim=True)
    return order.gather(1, best)[:, 0]


def _gumbel(seeds: Tensor, positions: Tensor, entries: Tensor) -> Tensor:
    """Standard Gumbel noise fp32, shaped as `entries` (B, V): a hash of each entry and its row's seed and position."""
    rows = _mixed(_mixed(seeds) ^ positions)
    uniform = ((_mixed(rows[:, None] ^ entries) & 0xFFFFFF).float() + 0.5) / (1 << 24)
    return -(-uniform.log()).log()


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finalizer on int64, whose products wrap; shifts are made logical by a mask."""
    x = x + -0x61C8864680B583EB
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & (1 << 33) - 1)
