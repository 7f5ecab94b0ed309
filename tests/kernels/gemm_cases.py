"""Random problems for the GEMMs with a float scale per group, and what they must give."""

import torch
from torch import Tensor

from atomcli.formats.scheme import SCHEMES, ActivationFormat, Scheme, WeightFormat
from atomcli.formats.weights import QuantizedWeight
from atomcli.kernels import reference
from atomcli.kernels.quantize import Operand, prepare_layout, quantize
from tests.kernels.quantize_cases import random_layout, random_rows

E2M1_16 = WeightFormat("e2m1", 16, "e4m3")
GROUP_SCHEMES: dict[str, Scheme] = {
    "int4-g128": SCHEMES["atom-paper"],
    "int4-g128-no-outliers": Scheme(SCHEMES["atom-paper"].weights, SCHEMES["atom-paper"].activations),
    "int4-g128-64-outliers": Scheme(SCHEMES["atom-paper"].weights, SCHEMES["atom-paper"].activations, 64),
    "e2m1-g128": SCHEMES["fp4"],
    "mxfp4": SCHEMES["mxfp4"],
    "nvfp4": SCHEMES["nvfp4"],
    "nvfp4-outliers": Scheme(E2M1_16, ActivationFormat("e2m1", 16, "e4m3"), 128, "hadamard"),
}


def random_group_weight(scheme: Scheme, rows: int, channels: int, device: str = "cpu") -> QuantizedWeight:
    """Random codes and scales of a scheme with group scales; one group is zero, one row has the largest codes."""
    format, body = scheme.weights, scheme.body(channels)
    assert format.group is not None
    groups = -(-body // format.group)
    low, high = (-7, 8) if format.element == "int4" else (0, 16)
    codes = torch.randint(low, high, (rows, body), device=device, dtype=torch.int8)
    codes[0] = 7
    codes[-1, : format.group] = 0
    scale = torch.rand(rows, groups, device=device) + 0.25
    unit = None
    if format.scale == "e8m0":
        stored = torch.randint(121, 130, scale.shape, device=device, dtype=torch.uint8)
    elif format.scale == "e4m3":
        stored, unit = (scale * 300).to(torch.float8_e4m3fn), torch.full((1,), 0.01, device=device)
    else:
        stored = (scale * 0.02).half()
    outlier_codes = torch.randint(-127, 128, (rows, scheme.outliers), device=device, dtype=torch.int8)
    outlier_scale = torch.rand(rows, device=device) * 0.002
    if not scheme.outliers:
        return QuantizedWeight.from_codes(scheme, codes, stored, unit)
    return QuantizedWeight.from_codes(scheme, codes, stored, unit, outlier_codes, outlier_scale)


def random_problem(
    scheme: Scheme, tokens: int, rows: int, channels: int, container: str
) -> tuple[Operand, QuantizedWeight, Tensor]:
    """On the GPU: a quantized operand, a weight, and y (tokens, rows) fp32 by the reference's own arithmetic."""
    layout = random_layout(
        channels, scheme.outliers, permuted=True, signed=True, hadamard=scheme.transform == "hadamard"
    )
    x = random_rows(tokens, channels, torch.bfloat16).cuda()
    weight = random_group_weight(scheme, rows, channels, "cuda")
    operand = quantize(x, scheme, prepare_layout(layout, "cuda"), container)  # type: ignore[arg-type]
    quantized = reference.quantized_input(x, scheme, layout.to("cuda"))
    return operand, weight, quantized.double() @ weight.dequantize().double().T


def relative_error(y: Tensor, expected: Tensor) -> float:
    """‖y − expected‖ / ‖expected‖; NaN stays NaN."""
    return float((y.double() - expected.double()).norm() / expected.double().norm())
