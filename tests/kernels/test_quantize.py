"""The quantization kernel against its rule, run by the emulator, and compiled for every architecture."""

import pytest
import torch
from torch import Tensor

from atomcli.errors import UnsupportedError
from atomcli.formats import grids
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import SCHEMES, ActivationFormat, Scheme
from atomcli.kernels import quantize as quantization
from atomcli.kernels import quantize_launch
from atomcli.kernels.compiler import compile_source
from atomcli.kernels.quantize import Operand, prepare_layout
from tests.kernels import quantize_cases as cases
from tests.kernels.disassembly import compiles
from tests.kernels.emulator import COMPILER, HostKernel

emulated = pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")
ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120a")


def run(
    x: Tensor,
    scheme: Scheme,
    layout: InputLayout,
    prologue: str = "plain",
    other: Tensor | None = None,
    weight: Tensor | None = None,
    container: str = "s8",
    unit_offset: bool = False,
) -> tuple[Operand, Tensor, Tensor]:
    """The kernel on the emulator, its outputs poisoned before."""
    table = prepare_layout(layout, "cpu")
    results = quantization.allocate(x, layout.body, scheme.activations, prologue, container, 8, True)
    for result in results:
        result.view(torch.uint8).fill_(0xA5)
    quantize_launch.launch(
        lambda how: HostKernel(f"{how.kernel}.cu", how.kernel, how.defines),
        x, other, weight, table.table, table.hadamard, prologue, scheme.activations, container, 1e-6, unit_offset,
        results, layout.body, True,
    )  # fmt: skip
    return Operand(*results[:5]), results[5], results[6]


@emulated
@pytest.mark.parametrize("name", cases.FORMATS)
def test_codes_equal_the_rule(name: str) -> None:
    torch.manual_seed(0)
    scheme = cases.scheme_of(cases.FORMATS[name], outliers=64, hadamard=True)
    layout = cases.random_layout(580, 64, permuted=True, signed=True, hadamard=True)  # body 516 = 4 * 128 + 4
    x = cases.random_rows(9, 580, torch.bfloat16)
    assert cases.reference(x, scheme, layout).codes.any()
    operand, _, _ = run(x, scheme, layout)
    cases.assert_equal(operand, cases.reference(x, scheme, layout), "s8")


@emulated
@pytest.mark.parametrize(
    ("channels", "outliers", "permuted", "signed", "hadamard", "dtype"),
    [
        (576, 128, True, True, True, torch.bfloat16),
        (576, 128, False, False, False, torch.float16),
        (301, 0, True, False, True, torch.float32),  # nothing is a multiple of anything
        (203, 37, False, True, True, torch.bfloat16),
        (256, 128, False, False, True, torch.float32),
    ],
)
@pytest.mark.parametrize("few_tokens", [0, 264])
def test_layouts_and_inputs(channels, outliers, permuted, signed, hadamard, dtype, few_tokens, monkeypatch) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr(quantize_launch, "FEW_TOKENS", few_tokens)  # both mappings of channels to lanes
    scheme = cases.scheme_of(cases.TWO_LEVEL_ASYMMETRIC, outliers, hadamard)
    layout = cases.random_layout(channels, outliers, permuted, signed, hadamard)
    x = cases.random_rows(5, channels, dtype)
    operand, _, _ = run(x, scheme, layout)
    cases.assert_equal(operand, cases.reference(x, scheme, layout), "s8")


@emulated
@pytest.mark.parametrize(
    ("name", "container"),
    [
        ("paper", "nibble"),
        ("paper", "e4m3"),
        ("fp4", "e4m3"),
        ("fp4", "nibble"),
        ("mxfp4", "e4m3_scaled"),
    ],
)
def test_containers(name: str, container: str) -> None:
    torch.manual_seed(2)
    scheme = cases.scheme_of(cases.FORMATS[name], 128, False)
    layout = cases.random_layout(384, 128, permuted=True, signed=False, hadamard=False)
    x = cases.random_rows(11, 384, torch.float16)
    expected = cases.reference(x, scheme, layout)
    operand, _, _ = run(x, scheme, layout, container=container)
    if (name, container) == ("fp4", "nibble"):
        expected.codes = (expected.codes ^ 8) - 8  # the reader takes nibbles for signed integers
    cases.assert_equal(operand, expected, container)


@emulated
def test_scaled_codes_of_groups_far_below_the_largest() -> None:
    torch.manual_seed(6)
    scheme, layout = cases.scheme_of(cases.FORMATS["mxfp4"], 0, False), cases.random_layout(640, 0, False, False, False)
    x = torch.randn(6, 640) * torch.ldexp(torch.ones(20), -torch.arange(20)).repeat_interleave(32)
    x[0] *= 1e-36
    operand, _, _ = run(x, scheme, layout, container="e4m3_scaled")
    cases.assert_equal(operand, cases.reference(x, scheme, layout), "e4m3_scaled")


@emulated
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4-adaptive"])
@pytest.mark.parametrize(
    "few_tokens", [0, 264]
)  # 16 channels a lane, which is a group; and 4, whose errors lanes add up
def test_nvfp4_codes_times_scales_are_halves(name: str, few_tokens: int, monkeypatch) -> None:
    torch.manual_seed(7)
    monkeypatch.setattr(quantize_launch, "FEW_TOKENS", few_tokens)
    scheme = cases.scheme_of(cases.FORMATS[name], outliers=0, hadamard=False)
    layout = cases.random_layout(400, 0, permuted=True, signed=True, hadamard=False)
    x = cases.random_rows(6, 400, torch.bfloat16)
    operand, _, _ = run(x, scheme, layout, container="f16")
    expected = cases.reference(x, scheme, layout)
    halves, padding = cases.plain(operand.codes, 2 * 400)
    values = halves.contiguous().view(torch.float16).float()
    assert torch.equal(
        values[:6],
        grids.decode(expected.codes, grids.E2M1) * expected.group_scales.float().repeat_interleave(16, 1)[:, :400],
    )
    assert torch.equal(operand.token_scale[:6], expected.token_scale)
    assert not padding.any()


@emulated
def test_rows_too_long_for_registers_are_transformed_twice(monkeypatch) -> None:
    torch.manual_seed(3)
    monkeypatch.setattr(quantize_launch, "MAX_THREADS", 32)
    monkeypatch.setattr(quantize_launch, "FEW_TOKENS", 0)
    scheme = cases.scheme_of(cases.PAPER, 128, True)
    layout = cases.random_layout(2048, 128, permuted=True, signed=True, hadamard=True)
    x = cases.random_rows(3, 2048, torch.bfloat16)
    operand, _, _ = run(x, scheme, layout)
    cases.assert_equal(operand, cases.reference(x, scheme, layout), "s8")


@emulated
@pytest.mark.parametrize("prologue", ["plain", "norm", "add_norm", "silu_mul"])
@pytest.mark.parametrize(
    ("name", "dtype", "permuted"),
    [
        ("a8", torch.bfloat16, True),
        ("paper", torch.float16, False),
        ("nvfp4-adaptive", torch.bfloat16, True),
    ],
)
def test_many_tokens_go_two_by_two(prologue: str, name: str, dtype: torch.dtype, permuted: bool, monkeypatch) -> None:
    """Blocks take several pairs one after the other; the last pair has one token, and padding follows it."""
    torch.manual_seed(8)
    scheme = cases.scheme_of(cases.FORMATS[name], 64, True)
    layout = cases.random_layout(584, 64, permuted, permuted, True)  # body 520 = 4 * 128 + 8
    x, other = cases.random_rows(37, 584, dtype), torch.randn(37, 584).to(dtype)
    weight = torch.rand(584).to(dtype)
    second = other if prologue in ("add_norm", "silu_mul") else None
    rows = {}
    for few_tokens in (0, 264):
        monkeypatch.setattr(quantize_launch, "FEW_TOKENS", few_tokens)
        operand, total, row = run(x, scheme, layout, prologue, second, weight if "norm" in prologue else None)
        rows[few_tokens] = x if prologue == "plain" else row
        cases.assert_equal(operand, cases.reference(rows[few_tokens], scheme, layout), "s8")
        assert prologue != "add_norm" or torch.equal(total, x + other)
    assert (rows[0] != rows[264]).float().mean() < 0.01  # the sum of squares runs in another order


@emulated
@pytest.mark.parametrize(("unit_offset", "few_tokens"), [(False, 264), (True, 264), (False, 0), (True, 0)])
def test_residual_and_norm_round_like_torch(unit_offset: bool, few_tokens: int, monkeypatch) -> None:
    torch.manual_seed(4)
    monkeypatch.setattr(quantize_launch, "FEW_TOKENS", few_tokens)
    scheme, layout = SCHEMES["w4a8"], cases.random_layout(512, 128, permuted=True, signed=True, hadamard=True)
    x, residual = (torch.randn(5, 512, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.rand(512, dtype=torch.bfloat16)
    operand, total, normed = run(x, scheme, layout, "add_norm", residual, weight, unit_offset=unit_offset)
    assert torch.equal(total, x + residual)
    wide = total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = (wide * (1 + weight.float())).bfloat16() if unit_offset else wide.bfloat16() * weight
    assert (normed != expected).float().mean() < 0.01  # the sum of squares runs in another order
    torch.testing.assert_close(normed, expected, rtol=2**-7, atol=0)
    cases.assert_equal(operand, cases.reference(normed, scheme, layout), "s8")


@emulated
@pytest.mark.parametrize("few_tokens", [0, 264])
def test_silu_times_up_from_halves_of_one_tensor(few_tokens: int, monkeypatch) -> None:
    torch.manual_seed(5)
    monkeypatch.setattr(quantize_launch, "FEW_TOKENS", few_tokens)
    scheme, layout = SCHEMES["w4a4"], cases.random_layout(512, 128, permuted=False, signed=False, hadamard=True)
    both = torch.randn(3, 1024, dtype=torch.bfloat16)
    gate, up = both[:, :512], both[:, 512:]
    operand, _, row = run(gate, scheme, layout, "silu_mul", up)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(row, expected, rtol=2**-7, atol=1e-30)
    cases.assert_equal(operand, cases.reference(row, scheme, layout), "s8")


@compiles
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch: str) -> None:
    cases = (
        ("w4a8", 1, 4096, "add_norm"),
        ("w4a4", 1, 28672, "add_norm"),
        ("w4a8", 4096, 4096, "plain"),
        ("w4a4", 4096, 8192, "add_norm"),
        ("w4a4", 4096, 14336, "silu_mul"),
        ("atom-paper", 64, 53248, "add_norm"),
        ("nvfp4", 4096, 28672, "add_norm"),
    )
    for name, tokens, channels, prologue in cases:
        scheme = SCHEMES[name]
        task = quantize_launch.Task(
            channels, channels - scheme.outliers, torch.bfloat16, scheme.activations, prologue, "s8",  # type: ignore[arg-type]
            torch.uint16, True, True, hopper=arch == "90a",
        )  # fmt: skip
        how = quantize_launch.plan(tokens, task)
        resources = compile_source(f"{how.kernel}.cu", arch, how.defines).resources[how.kernel]
        assert resources.spill_bytes == 0
        assert resources.registers * how.threads <= 65536


def test_what_the_kernel_can_not_read_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        quantization.check(torch.zeros(2, 8, dtype=torch.float64), None, None, 8)
    with pytest.raises(UnsupportedError, match="not contiguous"):
        quantization.check(torch.zeros(8, 2).T, None, None, 8)
    with pytest.raises(UnsupportedError, match="beside x"):
        quantization.check(torch.zeros(2, 8), torch.zeros(2, 4), None, 8)
    assert "256" in (quantization.why_not(cases.scheme_of(ActivationFormat("int4", 256, "fp16"), 0, False), 512) or "")
    assert quantization.why_not(SCHEMES["w4a4"], 28672) is None


@pytest.mark.parametrize("channels", [576, 4096, 11008])
def test_a_plan_holds_for_all_tokens_up_to_the_next_limit(channels: int) -> None:
    body, format = channels - 128, SCHEMES["w4a8"].activations
    task = quantize_launch.Task(channels, body, torch.bfloat16, format, "plain", "s8", torch.uint16, True, True, True)
    for tokens in (*range(1, 20), *range(255, 275), 4096):
        assert quantize_launch.plan(tokens, task) == quantize_launch._plan.__wrapped__(tokens, task)
