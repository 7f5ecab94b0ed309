"""Weights with a float scale per group, in the order in which the tensor cores' threads read them.

A block is 64 output rows of one k-block of 128 channels, followed by its scales, so that a kernel takes it in one copy.
Warp w, lane 4 g + c of a warpgroup owns rows 16 w + g and 16 w + g + 8; see cuda/unpack.cuh and cuda/gemm_sm80.cuh.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from atomcli.errors import InputError
from atomcli.formats.weights import QuantizedWeight

ROWS, CHANNELS = 64, 128
Codes = Literal["e4m3", "s4"]


class PackedGroups(NamedTuple):
    """A weight (rows, channels) as gemm_groups_sm90a.cu ("e4m3") or gemm_w4a4_exact_sm80.cu ("s4") reads it.

    blocks: uint8 (row groups, k-blocks, bytes). row_scale: fp32 (rows,), or None where group scales say it all.
    outliers: uint8 (row groups, 8192) and outlier_scale fp32 (rows,), or None.
    """

    blocks: Tensor
    row_scale: Tensor | None
    outliers: Tensor | None
    outlier_scale: Tensor | None
    rows: int
    codes: Codes


def pack_groups(weight: QuantizedWeight, codes: Codes) -> PackedGroups:
    """Repack a weight with fp16, E8M0 or E4M3 group scales; "s4" takes INT4 in groups of 128 alone."""
    format, rows = weight.scheme.weights, weight.shape[0]
    assert weight.group_scales is not None, f"{weight.scheme.name} has no scales per group"
    assert format.group is not None
    padded = _pad(weight.body_codes(), ROWS, CHANNELS)
    packed = _e4m3_blocks(padded, format.element == "e2m1") if codes == "e4m3" else _s4_blocks(padded)
    blocks = packed.shape[1]
    scales = _pad(weight.group_scales.view(torch.uint8 if format.scale != "fp16" else torch.int16), ROWS, 1)
    scales = torch.nn.functional.pad(scales, (0, blocks * (CHANNELS // format.group) - scales.shape[1]))
    scales = scales.view(-1, ROWS, blocks, CHANNELS // format.group).transpose(1, 2).contiguous()
    tail = scales.view(torch.uint8).reshape(*packed.shape[:2], -1)
    row_scale = weight.unit.expand(rows).contiguous() if weight.unit is not None else None
    outliers = pack_int8(weight.outlier_codes) if weight.outlier_codes is not None else None
    return PackedGroups(
        torch.cat([packed, tail], dim=-1).contiguous(), row_scale, outliers, weight.outlier_scale, rows, codes
    )


def pack_int8(codes: Tensor) -> Tensor:
    """INT8 codes (rows, channels) as uint8 (row groups, k-blocks * 8192): four registers per k32 step and thread."""
    fragment = _fragments(_pad(codes, ROWS, CHANNELS).view(torch.uint8), steps=4, per_register=4)
    # row group, warp, half, g, k-block, step, k half, c, byte
    return fragment.permute(0, 4, 5, 1, 3, 7, 6, 2, 8).reshape(fragment.shape[0], -1).contiguous()


def _pad(codes: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % columns, 0, -codes.shape[0] % rows))


def _fragments(codes: Tensor, steps: int, per_register: int) -> Tensor:
    """View (rows, channels) as (row group, warp, half, g, k-block, step, k half, c, channel of a register)."""
    return codes.view(-1, 4, 2, 8, codes.shape[1] // CHANNELS, steps, 2, 4, per_register)


def _e4m3_blocks(codes: Tensor, is_e2m1: bool) -> Tensor:
    """A byte holds row g's code and row g + 8's: {sign a, sign b, magnitude b, magnitude a}."""
    if not is_e2m1 and bool((codes == -8).any()):
        raise InputError("A weight with fp16 group scales holds the code -8; its grid is -7 ... 7.")
    magnitude = codes & 7 if is_e2m1 else codes.abs()
    sign = codes >> 3 & 1 if is_e2m1 else (codes < 0).to(torch.int8)
    fragment = (magnitude.to(torch.uint8) | sign.to(torch.uint8) << 7).contiguous()
    upper, lower = _fragments(fragment, steps=4, per_register=4).unbind(2)
    packed = upper | (lower & 7) << 3 | lower >> 1 & 0x40
    # row group, warp, g, k-block, step pair, step, k half, c, byte
    packed = packed.unflatten(4, (2, 2)).permute(0, 3, 4, 1, 2, 7, 5, 6, 8)
    return packed.reshape(packed.shape[0], packed.shape[1], -1)


def _s4_blocks(codes: Tensor) -> Tensor:
    """Eight two's complement nibbles to a register, low ones first; four registers for each k64 step and thread."""
    nibbles = _fragments(codes.view(torch.uint8) & 15, steps=2, per_register=8)
    packed = nibbles[..., ::2] | nibbles[..., 1::2] << 4
    packed = packed.permute(0, 4, 5, 1, 3, 7, 6, 2, 8)
    return packed.reshape(packed.shape[0], packed.shape[1], -1)
