"""Random signs before a Hadamard: another rotation for every seed, at the price of a sign per channel."""

import hashlib

import torch
from torch import Tensor


def random_signs(channels: int, seed: int, where: str) -> Tensor:
    """Signs (channels,) int8 of +-1 for one input, named `where` (3.down); the same on every machine.

    A Hadamard spreads a large channel evenly over its block; signs decide how several large channels add up there
    (the randomized Hadamard transform of QuIP#, Tseng et al., ICML 2024).
    """
    digest = hashlib.sha256(f"{seed} {where}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return (torch.randint(0, 2, (channels,), generator=generator) * 2 - 1).to(torch.int8)
