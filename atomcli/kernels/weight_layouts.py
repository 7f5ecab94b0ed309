"""4-bit weights for 16-bit activations, in the order in which the threads of gemm_w4a16_sm90a.cu read them.

A block is 64 output rows of 128 channels: 4096 bytes of codes, then the rows' group scales. How codes lie in a word is
said in cuda/unpack_f16.cuh. Scales that fp16 can't hold as they are stored become exact ones times a factor of the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from atomcli.errors import UnsupportedError
from atomcli.formats.scheme import Scheme
from atomcli.formats.weights import QuantizedWeight
from atomcli.kernels.layouts import BLOCK, ROW_GROUP, pad_scale

CODE_BYTES = ROW_GROUP * BLOCK // 2
StoredScale = Literal["FP16", "E5M2", "E4M3", "MULTIPLIER"]

_STORED: dict[str, StoredScale] = {
    "fp16": "FP16",
    "e8m0": "E5M2",
    "e4m3": "E4M3",
    "two_level": "MULTIPLIER",
    "row": "MULTIPLIER",
}
_MULTIPLIER_BIAS = 128  # multipliers are stored as bytes without a sign
_E2M1_UNIT = 2.0**14  # E2M1 codes are read as fp16 numbers of 2^-14 times their value


@dataclass(frozen=True)
class ScaledWeight:
    """A weight (out_features, in_features) as the GEMM takes it, or a stack of them with one more dimension in front.

    blocks: uint8 (row groups of 64, blocks, bytes); row groups come in pairs. row_scale: fp32 (row groups * 64,), with
    all factors that the blocks leave out. `group` channels share a scale, at most 128.
    """

    shape: tuple[int, int]
    element: str
    group: int
    scale: StoredScale
    blocks: Tensor
    row_scale: Tensor


def why_not(scheme: Scheme) -> str | None:
    """The reason why weights of a scheme can't be multiplied with 16-bit activations by the kernel, or None."""
    weights = scheme.weights
    if scheme.activations.element != "float" and scheme.activations.scale != "e4m3":  # NVFP4's are fp16 numbers too
        return f"the kernel takes 16-bit activations, the scheme has {scheme.activations.element}"
    if weights.element not in ("int4", "e2m1"):
        return f"the kernel for 16-bit activations takes 4-bit weights, the scheme has {weights.element}"
    if scheme.outliers:
        return "beside 16-bit activations there is no kernel for outlier channels"
    if scheme.transform == "hadamard" and scheme.hadamard_block != BLOCK:
        return f"the kernels rotate blocks of {BLOCK} channels, not of {scheme.hadamard_block}"
    return None


def block_bytes(group: int, scale: StoredScale) -> int:
    """Bytes of a block of 64 x 128 weights."""
    return CODE_BYTES + ROW_GROUP * (BLOCK // group) * (2 if scale == "FP16" else 1)


def prepare(weight: QuantizedWeight) -> ScaledWeight:
    """Repack a weight; UnsupportedError names what the GEMM can't take."""
    format, codes = weight.scheme.weights, weight.body_codes()
    reason = why_not(weight.scheme)
    if reason:
        raise UnsupportedError(f"Scheme {weight.scheme.name} can't be repacked: {reason}.")
    scales, row_scale = _scales(weight)
    group = min(format.group or BLOCK, BLOCK)
    if format.group is None or format.group > BLOCK:  # one scale for several blocks, or for all
        scales = scales.repeat_interleave((format.group or codes.shape[1] + BLOCK) // BLOCK, 1)
    scales = scales[:, : -(-codes.shape[1] // group)]
    packed = (_pack_e2m1 if format.element == "e2m1" else _pack_int4)(_words(codes, format.element == "e2m1"))
    stored = _STORED[format.scale]
    tail = _pack_scales(scales, packed.shape[1], BLOCK // group, _MULTIPLIER_BIAS if stored == "MULTIPLIER" else 0)
    blocks = torch.cat([packed, tail], dim=2).contiguous()
    return ScaledWeight(weight.shape, format.element, group, stored, blocks, pad_scale(row_scale))


def stack(weights: Sequence[ScaledWeight]) -> ScaledWeight:
    """Weights of one shape and kind as one, for inputs that each take one of them."""
    blocks, row_scale = (torch.stack([getattr(weight, name) for weight in weights]) for name in ("blocks", "row_scale"))
    return replace(weights[0], blocks=blocks, row_scale=row_scale)


def _scales(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Group scales (N, G) as they are stored in a block, and the row scales fp32 (N,) that go with them."""
    format, stored, unit, rows = weight.scheme.weights, weight.group_scales, weight.unit, weight.shape[0]
    if stored is None:  # one scale per row
        assert unit is not None
        return unit.new_full((rows, 1), _MULTIPLIER_BIAS + 1, dtype=torch.uint8), unit
    if format.scale == "two_level":
        assert unit is not None
        return (stored.short() + _MULTIPLIER_BIAS).to(torch.uint8), unit
    if format.scale == "e4m3":  # read as fp16 numbers of 2^-8 times their value
        assert unit is not None
        return stored.view(torch.uint8), unit.expand(rows) * 2.0**8 * _E2M1_UNIT
    if format.scale == "e8m0":  # the largest of a row becomes 2^15; what is 2^31 smaller vanishes
        largest = stored.amax(1, keepdim=True).int()
        exponent = stored.int() - largest + 15
        e5m2 = torch.where(exponent > -15, (exponent + 15) << 2, torch.where(exponent > -17, exponent + 17, 0))
        return e5m2.to(torch.uint8), torch.ldexp(_ones(stored), largest[:, 0] - 127 - 15) * _E2M1_UNIT
    # fp16: the largest of a row is brought to what leaves its products the most bits.
    _, exponent = torch.frexp(stored.float().abs().amax(1))
    shift = (15 if format.element == "e2m1" else 11) - exponent
    scales = torch.ldexp(stored.float(), shift[:, None]).half()
    row_scale = torch.ldexp(_ones(stored), -shift)
    return scales.view(torch.int16), row_scale * _E2M1_UNIT if format.element == "e2m1" else row_scale


def _ones(scales: Tensor) -> Tensor:
    """Ones fp32 (N,)."""
    return torch.ones(scales.shape[0], device=scales.device)


def _words(codes: Tensor, is_e2m1: bool) -> Tensor:
    """Codes int8 (N, K) by the threads that hold them.

    int16 (row groups, blocks, half of the steps, warp, g, c, step, parity, register), zeros of the format for padding.
    """
    rows, channels = codes.shape
    filled = pad(codes, (0, -channels % BLOCK, 0, -rows % (2 * ROW_GROUP)))
    nibbles = filled.short() & 15 if is_e2m1 else filled.short() + 8
    # row group, warp, row half, g, block, half of the steps, step, k half, c, parity
    parts = nibbles.view(-1, 4, 2, 8, filled.shape[1] // BLOCK, 2, 4, 2, 4, 2)
    return parts.permute(0, 4, 5, 1, 3, 8, 6, 9, 7, 2).flatten(-2)


def _pack_int4(words: Tensor) -> Tensor:
    """Register r's code in the r-th nibble of a half word."""
    packed = words[..., 0] | words[..., 1] << 4 | words[..., 2] << 8 | words[..., 3] << 12
    return _bytes(packed)


def _pack_e2m1(words: Tensor) -> Tensor:
    """Signs in bits 15, 12, 14, 13 of a half word, codes from bit 9, 6, 3, 0 on."""
    packed = torch.zeros_like(words[..., 0])
    for register, (sign, place) in enumerate(((15, 9), (12, 6), (14, 3), (13, 0))):
        code = words[..., register]
        packed |= (code >> 3 << sign) | (code & 7) << place
    return _bytes(packed)


def _bytes(packed: Tensor) -> Tensor:
    return packed.contiguous().view(torch.uint8).reshape(*packed.shape[:2], CODE_BYTES)


def _pack_scales(scales: Tensor, blocks: int, groups: int, zero: int) -> Tensor:
    """Scales (N, G) -> uint8 (row groups, blocks, bytes): those of rows g and g + 8 of a warp behind each other.

    `zero` is the stored scale of channels and rows that don't exist.
    """
    missing = (0, blocks * groups - scales.shape[1], 0, -scales.shape[0] % (2 * ROW_GROUP))
    filled = pad(scales, missing, value=zero)
    parts = filled.view(-1, 4, 2, 8, blocks, groups).permute(0, 4, 1, 3, 2, 5).contiguous()
    return parts.view(torch.uint8).reshape(-1, blocks, ROW_GROUP * groups * scales.element_size())
