"""The kernel for one token and 16-bit weights against fp64, on the emulator, and compiled for every architecture."""

import pytest
import torch

from atomcli.kernels import gemv_w16, rowwise
from atomcli.kernels.compiler import compile_source
from atomcli.kernels.dispatch import ARCHITECTURES
from atomcli.kernels.gemv_w16 import Tile
from atomcli.kernels.quantize_launch import Prologue
from tests.kernels.disassembly import compiles
from tests.kernels.emulator import COMPILER, HostKernel
from tests.kernels.gemm_cases import relative_error


@pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")
@pytest.mark.parametrize(
    ("rows", "channels", "prologue", "gated", "dtype", "tile"),
    [
        (101, 584, "plain", False, torch.bfloat16, Tile(128, 1, 3)),
        (38, 1104, "add_norm", True, torch.float16, Tile(64, 2, 2, late=False)),
        (7, 264, "norm", False, torch.bfloat16, Tile()),
        (29, 2056, "silu_mul", False, torch.float16, Tile(96, 4, 2, blocks=2)),
        (2, 8, "plain", True, torch.bfloat16, Tile(32, 1, 2)),
    ],
)
def test_one_token(rows: int, channels: int, prologue: Prologue, gated: bool, dtype: torch.dtype, tile: Tile) -> None:
    """Ragged rows and pieces, more warps than pieces, fewer rows than blocks; x is misaligned where rows are odd."""
    torch.manual_seed(rows)
    weight = (torch.randn(rows, channels) * channels**-0.5).to(dtype)
    x, other = (torch.randn(1, channels + 1).to(dtype)[:, odd : odd + channels] for odd in (rows % 2, 0))
    norm_weight, bias = (torch.rand(channels) + 0.5).to(dtype), torch.randn(rows).to(dtype)
    y, total = gemv_w16.outputs(x, weight, prologue, gated)
    y.fill_(float("nan"))
    gemv_w16.launch(
        lambda how: HostKernel(gemv_w16.SOURCE, gemv_w16.ENTRY, how.defines),
        x, other if prologue in ("add_norm", "silu_mul") else None, norm_weight if "norm" in prologue else None,
        weight, bias, prologue, 1e-5, gated, y, total, 3, tile,
    )  # fmt: skip
    row = x + other if prologue == "add_norm" else x
    if prologue == "add_norm":
        assert torch.equal(total, row)
    if "norm" in prologue:
        row = rowwise.rms_norm(row, norm_weight, 1e-5)
    if prologue == "silu_mul":
        row = torch.nn.functional.silu(x) * other
    expected = row.double() @ weight.double().T + bias
    if gated:
        gate, up = expected.to(dtype).double().chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate).to(dtype).double() * up
    assert relative_error(y, expected) < (5e-3 if gated else 2.5e-3)


@compiles
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("prologue", "gated", "dtype"),
    [("plain", False, torch.float16), ("add_norm", True, torch.bfloat16), ("silu_mul", False, torch.bfloat16)],
)
def test_compiles_without_spills(prologue: Prologue, gated: bool, dtype: torch.dtype, arch: str) -> None:
    x = torch.empty(1, 4096, dtype=dtype)
    how = gemv_w16.plan(x, x, x, 22016, prologue, gated, 132, Tile())
    resources = compile_source(gemv_w16.SOURCE, arch, how.defines).resources[gemv_w16.ENTRY]
    assert resources.spill_bytes == 0
    assert 2 * how.threads * resources.registers <= 64 << 10  # with the next kernel's block beside it


def test_two_kernels_fit_an_sm() -> None:
    for rows, channels in ((12288, 4096), (22016, 4096), (4096, 11008), (32000, 4096)):
        x = torch.empty(1, channels, dtype=torch.bfloat16)
        how = gemv_w16.plan(x, None, None, rows, "plain", rows == 22016, 132, Tile())
        assert 2 * (how.shared_bytes + 1024) <= 228 << 10


def test_what_the_kernel_cannot_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def weight(rows: int, channels: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(rows, channels, dtype=dtype, device="meta")

    assert gemv_w16.why_not(weight(22016, 4096), "90a", 132) is None
    assert gemv_w16.why_not(weight(152064, 8192, torch.float16), "90a", 132) is None
    assert "not bfloat16" in str(gemv_w16.why_not(weight(64, 64, torch.float32), "90a", 132))
    assert "rows of 68 channels" in str(gemv_w16.why_not(weight(64, 68), "90a", 132))
    assert "multiples of 16 bytes" in str(gemv_w16.why_not(weight(64, 128)[:, :64], "90a", 132))
    assert "shared memory" in str(gemv_w16.why_not(weight(152064, 8192), "86", 84))
    monkeypatch.setattr(gemv_w16, "ENABLED", False)
    assert gemv_w16.why_not(weight(22016, 4096), "90a", 132) == "the kernel is switched off"
