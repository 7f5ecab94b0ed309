"""Packing: two 4-bit codes in a byte, the first in the low nibble."""

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack int8 codes (..., n), each in -8...15, into uint8 (..., ceil(n / 2)); an odd tail is filled with code 0."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    nibbles = codes.view(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, count: int, signed: bool) -> Tensor:
    """Unpack uint8 (..., ceil(count / 2)) into int8 codes (..., count); `signed` reads nibbles as two's complement."""
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)[..., :count]
    codes = nibbles.view(torch.int8) if nibbles.is_contiguous() else nibbles.contiguous().view(torch.int8)
    return (codes ^ 8) - 8 if signed else codes
