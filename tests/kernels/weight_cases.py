"""What the CPU and the GPU tests of the GEMM for 16-bit activations share: schemes, weights, operands."""

import torch
from torch import Tensor

from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import ActivationFormat, Scheme, WeightFormat
from atomcli.formats.weights import QuantizedWeight
from tests.kernels.gemm_cases import random_group_weight

A16 = ActivationFormat("float")
SCHEMES: dict[str, Scheme] = {
    "two-level": Scheme(WeightFormat("int4", 128, "two_level"), A16, transform="hadamard"),
    "two-level-g32": Scheme(WeightFormat("int4", 32, "two_level"), A16, transform="hadamard"),
    "int4-row": Scheme(WeightFormat("int4"), A16),
    "int4-g128": Scheme(WeightFormat("int4", 128, "fp16"), A16),
    "int4-g64": Scheme(WeightFormat("int4", 64, "fp16"), A16),
    "int4-g32": Scheme(WeightFormat("int4", 32, "fp16"), A16),
    "int4-g16": Scheme(WeightFormat("int4", 16, "fp16"), A16),
    "int4-g256": Scheme(WeightFormat("int4", 256, "fp16"), A16),
    "e2m1-g128": Scheme(WeightFormat("e2m1", 128, "fp16"), A16),
    "mxfp4": Scheme(WeightFormat("e2m1", 32, "e8m0"), A16),
    "nvfp4": Scheme(WeightFormat("e2m1", 16, "e4m3"), A16),
}


def random_weight(scheme: Scheme, rows: int, channels: int, device: str = "cpu") -> QuantizedWeight:
    """Random codes and scales of one of SCHEMES."""
    format = scheme.weights
    if format.scale not in ("two_level", "row"):
        return random_group_weight(scheme, rows, channels, device)
    low = -8 if format.scale == "two_level" else -7
    codes = torch.randint(low, 8, (rows, channels), device=device, dtype=torch.int8)
    unit = torch.rand(rows, device=device) * 1e-3
    if format.group is None:
        return QuantizedWeight.from_codes(scheme, codes, None, unit)
    groups = -(-channels // format.group)
    return QuantizedWeight.from_codes(
        scheme, codes, torch.randint(-15, 16, (rows, groups), device=device, dtype=torch.int8), unit
    )


def halves(codes: Tensor) -> Tensor:
    """The fp16 numbers (T_pad, channels) of an operand: 16-byte chunk c of row r lies at c ^ (r % 8)."""
    planes, rows, _ = codes.shape
    chunks = codes.view(planes, rows, 8, 16)
    place = torch.arange(8, device=codes.device)[None, :] ^ torch.arange(rows, device=codes.device)[:, None] % 8
    plain = chunks.gather(2, place[None, :, :, None].expand_as(chunks))
    return plain.reshape(planes, rows, 128).view(torch.float16).permute(1, 0, 2).reshape(rows, -1)


def power_scale(x: Tensor) -> Tensor:
    """The power of two per row of x (T, K) that brings its absolute maximum between 2^14 and 2^15; 0 for zeros."""
    largest = x.abs().amax(1)
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), torch.frexp(largest)[1] - 15), 0.0)


def rounded(x: Tensor, layout: InputLayout) -> Tensor:
    """The input (T, K) that the product sees: transformed, rounded to fp16 relative to its row's largest; fp32."""
    transformed = layout.apply(x)
    scale = power_scale(transformed)[:, None]
    return torch.where(scale > 0, transformed / scale, 0.0).half().float() * scale
