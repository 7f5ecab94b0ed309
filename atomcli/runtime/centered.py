"""Storing keys without their center, what all keys of a head share: the softmax never notices that it is missing."""

import torch
from torch import Tensor

from atomcli.formats.groups import apply_hadamard, hadamard_sizes
from atomcli.kernels.attention import append
from atomcli.kernels.pages import PageFormat


def append_centered(
    pool: Tensor,
    fmt: PageFormat,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    hadamard: bool,
    rotate_keys: bool,
    center: Tensor | None,
) -> Tensor:
    """`kernels.attention.append`; with a center (Hkv, D), in the cache's basis, keys are stored without it.

    The append kernel rotates and quantizes in one go. To come in between, the rotations are torch's then, and the
    kernel gets none to do.
    """
    if center is None:
        return append(pool, fmt, query, key, value, cos, sin, slots, hadamard, rotate_keys)
    turned = [_rotated(x, cos, sin, hadamard) for x in (query, key)]
    query, key = turned[0].to(query.dtype), (turned[1] - center.float()).to(key.dtype)
    return append(pool, fmt, query, key, value, torch.ones_like(cos), torch.zeros_like(sin), slots)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, hadamard: bool) -> Tensor:
    """RoPE and, if asked for, the Hadamard over head_dim of x (T, heads, D), fp32."""
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    x = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
    dim = x.shape[-1]
    return apply_hadamard(x, hadamard_sizes(dim, 1 << (dim.bit_length() - 1))) if hadamard else x
