"""Groups: how channels are cut into runs that share a scale, and the Hadamard transform inside them."""

import math

import torch
from torch import Tensor


def group_count(channels: int, group: int | None) -> int:
    """Number of groups that `channels` are cut into: the last may be ragged, and group None is one of everything."""
    return -(-channels // (group or channels)) if channels else 0


def expand(per_group: Tensor, channels: int, group: int | None) -> Tensor:
    """Repeat one value per group (..., G) to one per channel (..., channels)."""
    if group is None:
        return per_group.expand(*per_group.shape[:-1], channels)
    return per_group.repeat_interleave(group, dim=-1)[..., :channels]


def split(x: Tensor, group: int | None) -> Tensor:
    """View x (..., channels) as groups (..., G, group), the ragged last one filled up with zeros."""
    size = group or x.shape[-1]
    missing = -x.shape[-1] % size
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.unflatten(-1, (-1, size))


def hadamard_sizes(channels: int, group: int) -> list[int]:
    """Block sizes of the group Hadamard: one block a group, a ragged group cut into its powers of two, largest first.

    `group` must be a power of two.
    """
    whole, ragged = divmod(channels, group)
    powers = [1 << bit for bit in reversed(range(ragged.bit_length())) if ragged >> bit & 1]
    return [group] * whole + powers


def apply_hadamard(x: Tensor, sizes: list[int]) -> Tensor:
    """Multiply x (..., sum(sizes)) by a block-diagonal orthonormal Hadamard (Sylvester order), in fp32.

    The blocks are symmetric, so applying it twice gives x back. Butterflies run from distance 1 upwards and the factor
    1/sqrt(size) is applied last: this order is part of the contract, the kernels reproduce it bit for bit.
    """
    out = torch.empty_like(x, dtype=torch.float32)
    start = 0
    while start < x.shape[-1]:
        size = sizes[0]
        count = next((i for i, other in enumerate(sizes) if other != size), len(sizes))
        stop = start + size * count
        out[..., start:stop] = _butterflies(x[..., start:stop].float(), size)
        sizes, start = sizes[count:], stop
    return out


def _butterflies(x: Tensor, size: int) -> Tensor:
    distance = 1
    while distance < size:
        pairs = x.unflatten(-1, (-1, 2, distance))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        distance *= 2
    return x * (1.0 / math.sqrt(size))
