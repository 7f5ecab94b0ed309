"""One token through a linear layer in 16 bits in one kernel is as near to fp64 as torch's operators are."""

import pytest
import torch

from atomcli.kernels import dispatch, gemv_w16, rowwise
from atomcli.kernels.gemv_w16 import Tile
from tests.kernels.gemm_cases import relative_error

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
PROLOGUES = ("plain", "norm", "add_norm", "silu_mul")


def before(prologue: str, x: torch.Tensor, other: torch.Tensor, norm_weight: torch.Tensor) -> torch.Tensor:
    """The row that the product reads, by torch's operators."""
    if prologue == "silu_mul":
        return torch.nn.functional.silu(x) * other
    total = x + other if prologue == "add_norm" else x
    return rowwise.rms_norm(total, norm_weight, 1e-5) if "norm" in prologue else total


@pytest.mark.parametrize(
    ("rows", "channels", "dtype"),
    [
        (8, 320, torch.float16),
        (101, 584, torch.bfloat16),
        (12288, 4096, torch.bfloat16),
        (22016, 4096, torch.bfloat16),
        (4096, 11008, torch.bfloat16),
        (32000, 4096, torch.float16),
        (640, 28672, torch.bfloat16),
    ],
)
def test_one_kernel_is_torch(rows: int, channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    weight = (torch.randn(rows, channels, device=DEVICE) * channels**-0.5).to(dtype)
    assert dispatch.choose_for_one_token(weight).reason is None
    bias = torch.randn(rows, device=DEVICE).to(dtype)
    norm_weight = (torch.rand(channels, device=DEVICE) + 0.5).to(dtype)
    x, other = torch.randn(2, 1, channels, device=DEVICE).to(dtype).unbind(0)
    for prologue in PROLOGUES:
        add_bias = None if prologue == "norm" else bias
        second = other if prologue in ("add_norm", "silu_mul") else None
        norm = norm_weight if "norm" in prologue else None
        expected = before(prologue, x, other, norm_weight).double() @ weight.double().T
        expected = expected if add_bias is None else expected + add_bias
        first = None
        for _ in range(3):
            y, total = gemv_w16.linear(x, weight, add_bias, prologue, second, norm, 1e-5)  # type: ignore[arg-type]
            assert relative_error(y, expected) < 3e-3, prologue
            assert prologue != "add_norm" or torch.equal(total, x + other)
            assert first is None or torch.equal(y, first)  # sums have one order
            first = y
        if rows % 2 == 0:
            gate, up = expected.to(dtype).double().chunk(2, dim=-1)
            gated, _ = gemv_w16.linear(x, weight, add_bias, prologue, second, norm, 1e-5, gated=True)  # type: ignore[arg-type]
            assert relative_error(gated, torch.nn.functional.silu(gate) * up) < 6e-3, prologue


def test_kernels_in_a_row_wait_for_each_other() -> None:
    """Each starts before the one before has ended; a graph replayed on other numbers gives theirs."""
    weights = [(torch.randn(4096, 4096, device=DEVICE) / 64).bfloat16() for _ in range(4)]
    norm_weight = torch.ones(4096, device=DEVICE, dtype=torch.bfloat16)
    x, residual = torch.randn(2, 1, 4096, device=DEVICE).bfloat16().unbind(0)

    def chain() -> tuple[torch.Tensor, torch.Tensor]:
        row, total = x, residual
        for weight in weights * 8:
            row, total = gemv_w16.linear(row, weight, None, "add_norm", total, norm_weight, 1e-5)
            row, _ = gemv_w16.linear(row, weight)
        return row, total

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        row, total = x, residual
        for weight in weights * 8:
            row, total = gemv_w16.linear(row, weight, None, "add_norm", total, norm_weight, 1e-5)
            torch.cuda.synchronize()
            row, _ = gemv_w16.linear(row, weight)
            torch.cuda.synchronize()
        assert torch.equal(captured[0], row)
        assert torch.equal(captured[1], total)


@pytest.mark.parametrize("tile", [Tile(1024, 1, 6, late=False), Tile(256, 4, 4, blocks=2), Tile(512, 4, 3)])
def test_every_tile_gives_the_same_product(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = (torch.randn(1000, 4104, device=DEVICE) / 64).bfloat16()
    x = torch.randn(1, 4104, device=DEVICE).bfloat16()
    monkeypatch.setattr(gemv_w16, "Tile", lambda: tile)
    assert relative_error(gemv_w16.linear(x, weight)[0], x.double() @ weight.double().T) < 3e-3
