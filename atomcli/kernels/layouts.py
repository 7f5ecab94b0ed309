"""Weights in the order in which the integer GEMM reads them, made once when a layer is loaded.

A row group is 64 output channels, a block 128 input channels. Row groups are padded to pairs and the body to whole
blocks, both with zeros. The fragment a thread holds is described in cuda/unpack.cuh.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from atomcli.errors import UnsupportedError
from atomcli.formats.scheme import Scheme
from atomcli.formats.weights import QuantizedWeight

BLOCK = 128
ROW_GROUP = 64
INT4_BLOCK_BYTES = ROW_GROUP * BLOCK // 2 + ROW_GROUP
INT8_BLOCK_BYTES = ROW_GROUP * BLOCK
MXFP4_GROUP = 32
MXFP4_BLOCK_BYTES = ROW_GROUP * BLOCK // 2 + ROW_GROUP * BLOCK // MXFP4_GROUP

Kind = Literal["w4", "w8", "mxfp4"]  # of a weight: cuda/gemm_<kind>_sm90a.cu multiplies with it
BLOCK_BYTES: dict[Kind, int] = {"w4": INT4_BLOCK_BYTES, "w8": INT8_BLOCK_BYTES, "mxfp4": MXFP4_BLOCK_BYTES}
_LARGEST_POWER = 12  # of a row's groups of MXFP4, where the smallest that e4m3 holds as a normal number is 1
_SMALLEST_EXPONENT = 7  # biased: below it the scale of a row would be no normal number


@dataclass(frozen=True)
class GemmWeight:
    """A weight (out_features, in_features) as the GEMM takes it, or a stack of them with one more dimension in front.

    body: uint8 (row groups, blocks, BLOCK_BYTES[kind]); outliers: uint8 (row groups, INT8_BLOCK_BYTES) or None;
    row_scale, outlier_row_scale: fp32 (row groups * 64,).
    """

    kind: Kind
    shape: tuple[int, int]
    body: Tensor
    row_scale: Tensor
    outliers: Tensor | None = None
    outlier_row_scale: Tensor | None = None

    @property
    def bits(self) -> int:
        """Of a code of the body."""
        return 8 if self.kind == "w8" else 4


def scheme_reason(scheme: Scheme) -> str | None:
    """The reason why the integer GEMM can't take weights and inputs of a scheme, or None if it can."""
    weights, activations = scheme.weights, scheme.activations
    for what, element in (("weights", weights.element), ("activations", activations.element)):
        if element not in ("int4", "int8"):
            return f"the integer GEMM takes INT4 and INT8, the scheme has {element} {what}"
    if weights.element == "int4" and (weights.scale, weights.group) not in (("two_level", BLOCK), ("row", None)):
        return f"the integer GEMM needs two-level scales of {BLOCK} channels or row scales for INT4 weights"
    if weights.element == "int8" and weights.scale != "row":
        return f"the integer GEMM needs row scales for INT8 weights, not {weights.scale}"
    if activations.scale not in ("two_level", "row"):
        return f"the integer GEMM needs two-level or per-token activation scales, not {activations.scale}"
    if scheme.outliers > BLOCK:
        return f"the integer GEMM takes at most {BLOCK} outlier channels, the scheme has {scheme.outliers}"
    return None


def prepare_weight(weight: QuantizedWeight) -> GemmWeight:
    """Repack a weight with integer scales; UnsupportedError names what the GEMM can't take."""
    reason = scheme_reason(weight.scheme) or (None if weight.body else "the weight has outlier channels only")
    if reason:
        raise UnsupportedError(f"Scheme {weight.scheme.name} can't be repacked: {reason}.")
    assert weight.unit is not None
    codes = weight.body_codes()
    kind: Kind = "w4" if weight.scheme.weights.grid.bits == 4 else "w8"
    if kind == "w4":
        multipliers = weight.group_scales
        if multipliers is None:
            multipliers = codes.new_ones(codes.shape[0], -(-codes.shape[1] // BLOCK))
        body = pack_int4(codes, multipliers)
    else:
        body = pack_int8(codes)
    if weight.outlier_codes is None:
        return GemmWeight(kind, weight.shape, body, pad_scale(weight.unit))
    outliers = pack_int8(weight.outlier_codes)[:, 0]
    assert weight.outlier_scale is not None
    outlier_scale = pad_scale(weight.outlier_scale)
    return GemmWeight(kind, weight.shape, body, pad_scale(weight.unit), outliers.contiguous(), outlier_scale)


def prepare_mxfp4(weight: QuantizedWeight) -> GemmWeight | None:
    """Repack MXFP4 weights for MMAs on e4m3; None if the scales of a row lie more than 11 octaves apart.

    Products then come out as exact as with a scale per group: a code times its group's power of two is one e4m3 number.
    """
    assert weight.group_scales is not None
    codes = _padded(weight.body_codes())
    missing = codes.shape[1] // MXFP4_GROUP - weight.group_scales.shape[1]
    exponents = torch.nn.functional.pad(weight.group_scales.int(), (0, missing, 0, codes.shape[0] - weight.shape[0]))
    is_zero = (codes & 7).unflatten(1, (-1, MXFP4_GROUP)).eq(0).all(2)
    largest = torch.where(is_zero, 0, exponents).amax(1, keepdim=True).clamp(min=_SMALLEST_EXPONENT)
    powers = torch.where(is_zero, _LARGEST_POWER, exponents - largest + _LARGEST_POWER)
    if bool((powers < 1).any()):
        return None
    row_scale = torch.ldexp(torch.ones_like(largest, dtype=torch.float32), largest - 127 - (_LARGEST_POWER - 6))
    return GemmWeight("mxfp4", weight.shape, pack_mxfp4(codes, powers), row_scale[:, 0].contiguous())


def repack(weight: QuantizedWeight) -> GemmWeight | None:
    """The weight for cuda/gemm_sm90a.cuh with all scales outside the sums, or None if it is not of that kind."""
    scheme = weight.scheme
    if scheme_reason(scheme) is None:
        return prepare_weight(weight)
    is_mxfp4 = scheme.weights.scale == scheme.activations.scale == "e8m0" and not scheme.outliers
    return prepare_mxfp4(weight) if is_mxfp4 else None


def stack(weights: Sequence[GemmWeight]) -> GemmWeight:
    """Weights of one shape and kind as one, for inputs that each take one of them."""
    first = weights[0]
    outliers = outlier_row_scale = None
    if first.outliers is not None:
        outliers = torch.stack([weight.outliers for weight in weights if weight.outliers is not None])
        scales = [weight.outlier_row_scale for weight in weights if weight.outlier_row_scale is not None]
        outlier_row_scale = torch.stack(scales)
    body, row_scale = (torch.stack([getattr(weight, name) for weight in weights]) for name in ("body", "row_scale"))
    return GemmWeight(first.kind, first.shape, body, row_scale, outliers, outlier_row_scale)


def pad_scale(scale: Tensor) -> Tensor:
    """Row scales (N,) for whole pairs of row groups."""
    return torch.nn.functional.pad(scale.float(), (0, -scale.numel() % (2 * ROW_GROUP)))


def pack_int4(codes: Tensor, multipliers: Tensor) -> Tensor:
    """Codes int8 (N, body), -8...7, and multipliers int8 (N, groups of 128), -15...15 -> (row groups, blocks, bytes).

    The sign of a multiplier moves into its codes: a nibble holds q + 8, or 7 - q where m is negative.
    """
    codes = _padded(codes)
    blocks = codes.shape[1] // BLOCK
    multipliers = torch.nn.functional.pad(multipliers, (0, 0, 0, codes.shape[0] - multipliers.shape[0]))
    negative = (multipliers < 0).repeat_interleave(BLOCK, dim=1)
    nibbles = _fragments(torch.where(negative, 7 - codes, codes + 8).to(torch.uint8))
    packed = nibbles[:, :, 0] | nibbles[:, :, 1] << 4  # row groups, warp, row, block, step, k half, c, byte
    packed = packed.unflatten(4, (2, 2)).permute(0, 3, 4, 1, 2, 7, 5, 6, 8)
    stored = multipliers.abs().to(torch.uint8) | (multipliers < 0).to(torch.uint8) << 7
    stored = stored.view(-1, ROW_GROUP, blocks).transpose(1, 2)
    return torch.cat([packed.reshape(-1, blocks, ROW_GROUP * BLOCK // 2), stored], dim=2).contiguous()


def pack_mxfp4(codes: Tensor, powers: Tensor) -> Tensor:
    """E2M1 codes int8 (N, K), whole blocks, and exponents (N, groups of 32), 1 ... 12 -> (row groups, blocks, bytes).

    A word has four codes of a row g, and of row g + 8: the magnitudes in nibbles, the signs in the nibbles' top bits,
    as cuda/gemm_mxfp4_sm90a.cu takes them apart.
    """
    blocks = codes.shape[1] // BLOCK
    magnitudes, signs = (_fragments(part).int() for part in (codes & 7, codes >> 3 & 1))
    words = torch.zeros_like(magnitudes[:, :, 0, ..., 0])
    for half in range(2):
        for byte in range(4):
            words |= magnitudes[:, :, half, ..., byte] << (16 * half + 4 * byte)
            words |= signs[:, :, half, ..., byte] << (8 * byte + 7 - 4 * half)
    packed = words.unsqueeze(-1).view(torch.uint8)  # row groups, warp, row, block, step, k half, c, byte
    packed = packed.unflatten(4, (2, 2)).permute(0, 3, 4, 1, 2, 7, 5, 6, 8)
    stored = (8 * powers).to(torch.uint8).view(-1, ROW_GROUP, blocks, BLOCK // MXFP4_GROUP).transpose(1, 2)
    return torch.cat([packed.reshape(-1, blocks, ROW_GROUP * BLOCK // 2), stored.flatten(2)], dim=2).contiguous()


def pack_int8(codes: Tensor) -> Tensor:
    """Codes int8 (N, K) -> (row groups, blocks, INT8_BLOCK_BYTES) in register order."""
    codes = _padded(codes)
    packed = _fragments(codes.view(torch.uint8)).permute(0, 4, 5, 1, 3, 7, 6, 2, 8)
    return packed.reshape(-1, codes.shape[1] // BLOCK, INT8_BLOCK_BYTES).contiguous()


def _padded(codes: Tensor) -> Tensor:
    """Whole pairs of row groups, whole blocks."""
    rows, channels = codes.shape
    return torch.nn.functional.pad(codes, (0, -channels % BLOCK, 0, -rows % (2 * ROW_GROUP)))


def _fragments(codes: Tensor) -> Tensor:
    """(row groups, warp, row half, row, block, step, k half, c, byte): the indices of an A fragment, as dimensions."""
    return codes.view(-1, 4, 2, 8, codes.shape[1] // BLOCK, 4, 2, 4, 4)


def pack_operand(codes: Tensor, padded_tokens: int) -> Tensor:
    """INT8 codes (T, K), K whole blocks -> (blocks, padded_tokens, 128); 16-byte chunk c of row r at c ^ (r % 8)."""
    tokens, channels = codes.shape
    rows = torch.nn.functional.pad(codes, (0, 0, 0, padded_tokens - tokens)).view(torch.uint8)
    chunks = rows.view(padded_tokens, channels // BLOCK, 8, 16).transpose(0, 1)
    source = (
        torch.arange(8, device=codes.device)[None, :] ^ torch.arange(padded_tokens, device=codes.device)[:, None] % 8
    )
    swizzled = torch.gather(chunks, 2, source[None, :, :, None].expand(chunks.shape))
    return swizzled.reshape(channels // BLOCK, padded_tokens, BLOCK).contiguous()
