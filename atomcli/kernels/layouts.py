"""Weights in the order in which the integer GEMM reads them, made once when a layer is loaded.

A row group is 64 output channels, a block 128 input channels. Row groups are padded to pairs and the body to whole
blocks, both with zeros. The fragment a thread holds is described in cuda/unpack.cuh.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atomcli.errors import UnsupportedError
from atomcli.formats.scheme import Scheme
from atomcli.formats.weights import QuantizedWeight

BLOCK = 128
ROW_GROUP = 64
INT4_BLOCK_BYTES = ROW_GROUP * BLOCK // 2 + ROW_GROUP
INT8_BLOCK_BYTES = ROW_GROUP * BLOCK


@dataclass(frozen=True)
class GemmWeight:
    """A weight (out_features, in_features) as the GEMM takes it, or a stack of them with one more dimension in front.

    body: uint8 (row groups, blocks, INT4_BLOCK_BYTES or INT8_BLOCK_BYTES); outliers: uint8 (row groups,
    INT8_BLOCK_BYTES) or None; row_scale, outlier_row_scale: fp32 (row groups * 64,).
    """

    bits: int
    shape: tuple[int, int]
    body: Tensor
    row_scale: Tensor
    outliers: Tensor | None = None
    outlier_row_scale: Tensor | None = None


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
    bits = weight.scheme.weights.grid.bits
    if bits == 4:
        multipliers = weight.group_scales
        if multipliers is None:
            multipliers = codes.new_ones(codes.shape[0], -(-codes.shape[1] // BLOCK))
        body = pack_int4(codes, multipliers)
    else:
        body = pack_int8(codes)
    if weight.outlier_codes is None:
        return GemmWeight(bits, weight.shape, body, pad_scale(weight.unit))
    outliers = pack_int8(weight.outlier_codes)[:, 0]
    assert weight.outlier_scale is not None
    outlier_scale = pad_scale(weight.outlier_scale)
    return GemmWeight(bits, weight.shape, body, pad_scale(weight.unit), outliers.contiguous(), outlier_scale)


def stack(weights: Sequence[GemmWeight]) -> GemmWeight:
    """Weights of one shape and kind as one, for inputs that each take one of them."""
    first = weights[0]
    outliers = outlier_row_scale = None
    if first.outliers is not None:
        outliers = torch.stack([weight.outliers for weight in weights if weight.outliers is not None])
        scales = [weight.outlier_row_scale for weight in weights if weight.outlier_row_scale is not None]
        outlier_row_scale = torch.stack(scales)
    body, row_scale = (torch.stack([getattr(weight, name) for weight in weights]) for name in ("body", "row_scale"))
    return GemmWeight(first.bits, first.shape, body, row_scale, outliers, outlier_row_scale)


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
