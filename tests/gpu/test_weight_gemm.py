"""The GEMM for 4-bit weights and 16-bit activations, on the card, against the reference."""

import pytest
import torch
from torch import Tensor

from atomcli.formats.layout import InputLayout
from atomcli.kernels import quantize, reference, weight_gemm, weight_layouts
from atomcli.kernels.quantize import Operand
from atomcli.kernels.tiles import Tile
from atomcli.kernels.weight_layouts import ScaledWeight
from tests.kernels import weight_cases as cases
from tests.kernels.gemm_cases import relative_error
from tests.kernels.quantize_cases import random_layout, random_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for sm_90a"
    ),
]

SHAPES = [
    (1, 256, 512),
    (7, 64, 384),
    (16, 200, 1000),
    (33, 129, 640),
    (64, 512, 2048),
    (130, 300, 900),
    (515, 4096, 1024),
    (1300, 3000, 640),
    (4097, 136, 200),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def problem(name: str, tokens: int, rows: int, channels: int) -> tuple[Operand, ScaledWeight, Tensor]:
    """A transformed input, a packed weight, and y (tokens, rows) fp64 as the reference multiplies them."""
    scheme = cases.SCHEMES[name]
    hadamard = scheme.transform == "hadamard"
    layout: InputLayout = random_layout(channels, 0, permuted=True, signed=True, hadamard=hadamard)
    x = random_rows(tokens, channels, torch.bfloat16).cuda()
    weight = cases.random_weight(scheme, rows, channels, "cuda")
    operand = quantize.quantize(x, scheme, quantize.prepare_layout(layout, "cuda"), "f16")
    seen = reference.quantized_input(x, scheme, layout.to("cuda"))
    return operand, weight_layouts.prepare(weight), seen.double() @ weight.dequantize().double().T


@pytest.mark.parametrize(("tokens", "rows", "channels"), SHAPES)
@pytest.mark.parametrize("name", cases.SCHEMES)
def test_products(name: str, tokens: int, rows: int, channels: int) -> None:
    operand, weight, expected = problem(name, tokens, rows, channels)
    bias = torch.randn(rows, device="cuda") * expected.std().float()
    for dtype in (torch.bfloat16, torch.float16):
        factor = 1.0 if dtype == torch.bfloat16 else 1e3 / float(expected.abs().max())  # into fp16's range
        wanted = (expected + bias) * factor
        scaled = ScaledWeight(**{**vars(weight), "row_scale": weight.row_scale * factor})
        y = weight_gemm.linear(operand, scaled, tokens, dtype, bias * factor)
        assert relative_error(y, wanted) <= relative_error(wanted.to(dtype), wanted) + 3e-4
        assert torch.equal(y, weight_gemm.linear(operand, scaled, tokens, dtype, bias * factor))


@pytest.mark.parametrize("tile", weight_gemm.TILES, ids=str)
@pytest.mark.parametrize("name", ["two-level", "nvfp4"])
def test_every_tile(name: str, tile: Tile) -> None:
    operand, weight, expected = problem(name, 200, 512, 3000)
    y = torch.full((200, 512), torch.nan, dtype=torch.bfloat16, device="cuda")
    weight_gemm.launch(weight_gemm.fit(tile, weight.group, weight.scale), operand, weight, y)
    assert relative_error(y, expected) <= 2e-3


def test_integers_are_summed_exactly() -> None:
    """Inputs with a single one, no transform: each weight comes out as it is stored."""
    scheme = cases.SCHEMES["int4-row"]
    weight = cases.random_weight(scheme, 192, 512, "cuda")
    weight.unit = torch.ones_like(weight.unit)
    x = torch.eye(512, device="cuda", dtype=torch.bfloat16)
    layout = quantize.prepare_layout(InputLayout(512), "cuda")
    y = weight_gemm.linear(
        quantize.quantize(x, scheme, layout, "f16"), weight_layouts.prepare(weight), 512, torch.bfloat16
    )
    assert torch.equal(y.T.float(), weight.dequantize())


def test_graph_replays_give_the_same_bits() -> None:
    operand, weight, _ = problem("two-level", 5, 512, 4096)
    expected = weight_gemm.linear(operand, weight, 5, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = [weight_gemm.linear(operand, weight, 5, torch.bfloat16) for _ in range(3)]
    for each in y:
        each.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(each, expected) for each in y)


def test_two_streams_at_once() -> None:
    problems = [problem("two-level", 16, 4096, 4096) for _ in range(2)]
    alone = [weight_gemm.linear(operand, weight, 16, torch.bfloat16) for operand, weight, _ in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for index, stream in enumerate(streams):
            operand, weight, _ = problems[index]
            with torch.cuda.stream(stream):
                results[index].append(weight_gemm.linear(operand, weight, 16, torch.bfloat16))
    torch.cuda.synchronize()
    for index in range(2):
        assert all(torch.equal(result, alone[index]) for result in results[index])


def test_torch_compile_holds_the_operator() -> None:
    operand, weight, _ = problem("mxfp4", 8, 256, 512)
    compiled = torch.compile(
        lambda: weight_gemm.linear(operand, weight, 8, torch.bfloat16) * 2, backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(), weight_gemm.linear(operand, weight, 8, torch.bfloat16) * 2)


@pytest.mark.parametrize("name", ["two-level", "int4-g128", "mxfp4"])
@pytest.mark.parametrize(
    "counts", [[0, 0, 1, 0], [3, 0, 17, 1, 40, 0, 0, 5], [0, 300, 0], [9, 130, 0, 64, 7, 8, 1, 250]]
)
def test_experts_equal_their_own_products(name: str, counts: list[int]) -> None:
    scheme, rows, channels = cases.SCHEMES[name], 200, 700
    weights = [cases.random_weight(scheme, rows, channels, "cuda") for _ in counts]
    layout = random_layout(channels, 0, permuted=True, signed=True, hadamard=scheme.transform == "hadamard")
    x = random_rows(sum(counts), channels, torch.bfloat16).cuda()
    operand = quantize.quantize(x, scheme, quantize.prepare_layout(layout, "cuda"), "f16")
    starts = torch.tensor([0, *counts], device="cuda").cumsum(0).int()
    stack = weight_layouts.stack([weight_layouts.prepare(weight) for weight in weights])
    y = weight_gemm.expert_linear(operand, stack, starts, len(x), torch.bfloat16)
    seen = reference.quantized_input(x, scheme, layout.to("cuda")).double()
    parts = [part @ weight.dequantize().double().T for part, weight in zip(seen.split(counts), weights, strict=True)]
    assert relative_error(y, torch.cat(parts)) <= 2e-3
