"""What the CPU and the GPU tests of the quantization kernels share: cases, and an operand read back as plain codes."""

from dataclasses import replace

import torch
from torch import Tensor

from atomcli.formats import grids
from atomcli.formats.activations import QuantizedActivations, quantize_activations
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import SCHEMES, ActivationFormat, Scheme
from atomcli.kernels.layouts import BLOCK
from atomcli.kernels.quantize import Operand

A8 = SCHEMES["w4a8"].activations
TWO_LEVEL = ActivationFormat("int4", 128, "two_level", True, 0.9)
TWO_LEVEL_ASYMMETRIC = SCHEMES["w4a4"].activations
PAPER = SCHEMES["atom-paper"].activations
FORMATS = {
    "a8": A8,
    "a8-clip": replace(A8, clip=0.87),
    "two-level": TWO_LEVEL,
    "two-level-g32": replace(TWO_LEVEL, group=32),
    "two-level-asymmetric": TWO_LEVEL_ASYMMETRIC,
    "two-level-asymmetric-g16": replace(TWO_LEVEL_ASYMMETRIC, group=16),
    "paper": PAPER,
    "paper-g64": replace(PAPER, group=64),
    "a4-row": ActivationFormat("int4", None, "row", True, 0.9),
    "fp4": SCHEMES["fp4"].activations,
    "mxfp4": SCHEMES["mxfp4"].activations,
    "nvfp4": SCHEMES["nvfp4"].activations,
    "nvfp4-adaptive": replace(SCHEMES["nvfp4"].activations, adaptive=True),
}


def scheme_of(format: ActivationFormat, outliers: int, hadamard: bool) -> Scheme:
    """A scheme whose weights are beside the point."""
    return Scheme(SCHEMES["w8a8"].weights, format, outliers, "hadamard" if hadamard else "none")


def random_layout(channels: int, outliers: int, permuted: bool, signed: bool, hadamard: bool) -> InputLayout:
    """A layout with a random order and random signs."""
    permutation = torch.randperm(channels) if permuted else None
    signs = (torch.randint(0, 2, (channels,)) * 2 - 1).to(torch.int8) if signed else None
    return InputLayout(channels, outliers, BLOCK, permutation, signs, hadamard)


def random_rows(tokens: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Rows as a layer sees them: a few channels far out, one row of zeros, one group of zeros, one constant row."""
    x = torch.randn(tokens, channels) * torch.randn(channels).exp()
    if tokens > 1:
        x[1] = 0
    if tokens > 2:
        x[2, :128] = 0
    if tokens > 3:
        x[3] = 1.5
    return x.to(dtype)


def plain(codes: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Swizzled operand rows (k-blocks, T_pad, bytes) as codes int8 (T_pad, channels), and the padding channels."""
    blocks, rows, width = codes.shape
    chunks = codes.view(torch.uint8).view(blocks, rows, width // 16, 16)
    row = torch.arange(rows, device=codes.device)
    swizzle = row & 7 if width == BLOCK else row >> 1 & 3
    place = torch.arange(width // 16, device=codes.device)[None, :] ^ swizzle[:, None]
    bytes_ = chunks.gather(2, place[None, :, :, None].expand_as(chunks)).reshape(blocks, rows, width)
    if width == BLOCK // 2:
        nibbles = torch.stack([bytes_ & 15, bytes_ >> 4], dim=-1).flatten(-2).to(torch.int8)
        bytes_ = ((nibbles ^ 8) - 8).view(torch.uint8)
    flat = bytes_.view(torch.int8).permute(1, 0, 2).reshape(rows, -1)
    return flat[:, :channels], flat[:, channels:]


def e4m3_bytes(codes: Tensor, element: str) -> Tensor:
    """The e4m3 bytes that stand for E2M1 codes (times 2^-6) or small integers (times 2^-9), as int8."""
    values = grids.decode(codes, grids.E2M1) * 2.0**-6 if element == "e2m1" else codes.float() * 2.0**-9
    return values.to(torch.float8_e4m3fn).view(torch.int8)


def reference(x: Tensor, scheme: Scheme, layout: InputLayout) -> QuantizedActivations:
    """The rule, on the CPU."""
    return quantize_activations(layout.apply(x.cpu()), scheme)


def assert_equal(operand: Operand, expected: QuantizedActivations, container: str) -> None:
    """Codes, scales and padding, bit for bit."""
    tokens, body = expected.codes.shape
    format = expected.format
    blocks = -(-body // BLOCK)
    codes, padding = plain(operand.codes[:blocks], body)
    if container == "e4m3_scaled":
        assert_scaled(codes[:tokens], operand.token_scale[:tokens], expected)
        assert not padding.any()
        assert not codes[tokens:].any()
        return
    wanted = expected.integers() if format.scale == "two_level" else expected.codes
    if container == "e4m3":
        wanted = torch.where(wanted == 0, 0, e4m3_bytes(wanted, format.element))  # zero has no sign
    assert torch.equal(codes[:tokens], wanted)
    assert not padding.any()
    assert not codes[tokens:].any() or format.scale == "two_level"
    if format.scale in ("row", "two_level", "e4m3"):
        assert torch.equal(operand.token_scale[:tokens], expected.token_scale)
    if expected.outlier_codes is not None:
        outlier_blocks = operand.outlier_codes if container == "nibble" else operand.codes[blocks:]
        outlier_codes, padding = plain(outlier_blocks, expected.outlier_codes.shape[1])
        assert torch.equal(outlier_codes[:tokens], expected.outlier_codes)
        assert not padding.any()
        assert torch.equal(operand.outlier_scale[:tokens], expected.outlier_scale)
    if expected.group_scales is not None:
        groups = expected.group_scales.shape[1]
        stored = operand.group_scales if container == "s8" else operand.group_scales.transpose(1, 2).flatten(0, 1)
        wanted = expected.scales() if container == "e4m3" else expected.group_scales.float()
        assert torch.equal(_numbers(stored, format.scale)[:groups, :tokens].T, wanted)


def assert_scaled(codes: Tensor, token_scale: Tensor, expected: QuantizedActivations) -> None:
    """Codes that hold their group's scale: exact 14 octaves deep, below that within 2^-18 of the token's largest."""
    values = codes.view(torch.float8_e4m3fn).float() * token_scale[:, None]
    wanted = expected.dequantize()[:, : codes.shape[1]]
    largest = wanted.abs().amax(1, keepdim=True)
    assert ((values - wanted).abs() <= largest * 2.0**-18).all()
    scales = expected.scales().repeat_interleave(expected.format.group or 1, 1)[:, : wanted.shape[1]]
    deep = scales < scales.amax(1, keepdim=True) * 2.0**-14
    assert torch.equal(values[~deep], wanted[~deep])


def _numbers(stored: Tensor, scale: str) -> Tensor:
    """Stored scales as fp32; E8M0 exponents as numbers."""
    return (
        stored.view(torch.float8_e4m3fn).float() if stored.dtype == torch.uint8 and scale == "e4m3" else stored.float()
    )
