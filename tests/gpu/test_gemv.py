"""One token through a linear layer in one kernel gives, bit for bit, what the two kernels give."""

import pytest
import torch

from atomcli.benchmarks.systems import random_weight
from atomcli.formats.scheme import SCHEMES
from atomcli.kernels import gemm, gemv, layouts, quantize
from tests.kernels.gemm_cases import relative_error
from tests.kernels.quantize_cases import random_layout

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
PROLOGUES = ("plain", "norm", "add_norm", "silu_mul")


@pytest.mark.parametrize(
    ("rows", "channels", "scheme", "dtype"),
    [
        (8, 320, "w4a8", torch.float16),
        (100, 580, "w4a8", torch.bfloat16),
        (1001, 2048, "w4a4", torch.bfloat16),
        (4096, 4096, "w4a8", torch.bfloat16),
        (12288, 4096, "w8a8", torch.bfloat16),
        (4096, 11008, "w4a8", torch.bfloat16),
        (640, 28672, "w4a4", torch.float16),
    ],
)
def test_one_kernel_is_two(rows: int, channels: int, scheme: str, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    kind = SCHEMES[scheme]
    hadamard = kind.transform == "hadamard"
    layout = quantize.prepare_layout(
        random_layout(channels, kind.outliers, bool(kind.outliers), hadamard, hadamard), DEVICE
    )
    quantized = random_weight(kind, rows, channels, DEVICE)
    assert quantized.unit is not None
    quantized.unit.mul_(torch.rand(rows, device=DEVICE) + 0.5)
    weight = layouts.prepare_weight(quantized)
    assert gemv.why_not(weight, torch.cuda.get_device_properties(DEVICE).multi_processor_count) is None
    bias = torch.randn(rows, device=DEVICE)
    norm_weight = (torch.rand(channels, device=DEVICE) + 0.5).to(dtype)
    x, other = torch.randn(2, 1, 2 * channels, device=DEVICE).to(dtype).unbind(0)
    x, other = x[:, :channels], other[:, channels:] if channels % 8 == 0 else other[:, :channels]
    for prologue in PROLOGUES:
        add_bias = None if prologue == "norm" else bias
        second = other if prologue in ("add_norm", "silu_mul") else None
        weights = norm_weight if "norm" in prologue else None
        results = quantize._call(x, second, weights, kind, layout, prologue, "s8", 8, 1e-5)  # type: ignore[arg-type]
        expected = gemm.linear(quantize.Operand(*results[:5]), weight, 1, dtype, add_bias)
        for _ in range(3):
            y, total = gemv.linear(x, weight, kind, layout, add_bias, prologue, second, weights, 1e-5)
            assert torch.equal(y, expected), prologue
            assert prologue != "add_norm" or torch.equal(total, results[5])
        if gemv.gates(rows):
            gated, _ = gemv.linear(x, weight, kind, layout, add_bias, prologue, second, weights, 1e-5, gated=True)
            gate, up = expected.chunk(2, dim=-1)
            assert relative_error(gated, torch.nn.functional.silu(gate) * up) < 1e-3
