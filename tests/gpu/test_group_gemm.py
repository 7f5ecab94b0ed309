"""The GEMMs with a float scale per group, on the card, against the reference."""

import pytest
import torch

from atomcli.formats.layout import InputLayout
from atomcli.kernels import dispatch, gemm, group_gemm, layouts, reference, tune
from atomcli.kernels.compiler import architecture
from atomcli.kernels.group_layouts import pack_groups
from atomcli.kernels.tiles import Tile
from tests.kernels.gemm_cases import GROUP_SCHEMES, random_problem, relative_error

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="the kernels are for sm_90a"
)
SHAPES = [
    (1, 256, 512),
    (7, 64, 384),
    (16, 200, 1000),
    (33, 129, 640),
    (64, 512, 2048),
    (130, 300, 900),
    (515, 4096, 1024),
    (1300, 3000, 640),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("tokens", "rows", "channels"), SHAPES)
@pytest.mark.parametrize("name", GROUP_SCHEMES)
def test_products(name: str, tokens: int, rows: int, channels: int) -> None:
    scheme, arch = GROUP_SCHEMES[name], architecture(torch.device("cuda", 0))
    reason = group_gemm.why_not(scheme, arch)
    if reason:
        pytest.skip(reason)
    codes = group_gemm.codes_for(arch)
    operand, weight, expected = random_problem(scheme, tokens, rows, channels, "e4m3" if codes == "e4m3" else "nibble")
    packed, bias = pack_groups(weight, codes), torch.randn(rows, device="cuda")
    y = group_gemm.linear(operand, packed, scheme, tokens, torch.bfloat16, bias)
    assert relative_error(y, expected + bias) < 2e-3
    assert torch.equal(y, group_gemm.multiply(operand, packed, scheme, tokens, torch.bfloat16, bias))


@hopper
@pytest.mark.parametrize(("tokens", "rows", "channels"), SHAPES)
@pytest.mark.parametrize(("name", "container"), [("mxfp4", "e4m3_scaled"), ("nvfp4", "f16")])
def test_scales_inside_the_operands(name: str, container: str, tokens: int, rows: int, channels: int) -> None:
    scheme = GROUP_SCHEMES[name]
    operand, weight, expected = random_problem(scheme, tokens, rows, channels, container)
    product = dispatch.prepare(weight, InputLayout(channels, 0, scheme.hadamard_block))
    assert product.container == container
    bias = torch.randn(rows, device="cuda")
    y = product.multiply(operand, tokens, torch.bfloat16, bias)
    assert relative_error(y, expected + bias) < 2e-3
    assert torch.equal(y, product.multiply(operand, tokens, torch.bfloat16, bias))


@hopper
@pytest.mark.parametrize("tile", tune.TILES, ids=str)
def test_every_tile_of_mxfp4(tile: Tile) -> None:
    operand, weight, expected = random_problem(GROUP_SCHEMES["mxfp4"], 100, 512, 1100, "e4m3_scaled")
    packed = layouts.prepare_mxfp4(weight)
    assert packed is not None
    y = torch.full((100, 512), torch.nan, device="cuda", dtype=torch.float16)
    gemm.launch(tune.fit(tile, "mxfp4"), operand, packed, y)
    assert relative_error(y, expected) < 4e-4  # of which the output's rounding is 2e-4


@hopper
def test_mxfp4_weights_of_too_many_octaves_keep_their_scales_apart() -> None:
    scheme = GROUP_SCHEMES["mxfp4"]
    _, weight, _ = random_problem(scheme, 1, 128, 512, "e4m3")
    assert weight.group_scales is not None
    weight.group_scales[5, 3] = 90
    layout = InputLayout(512, 0, scheme.hadamard_block)
    product, x = dispatch.prepare(weight, layout), torch.randn(9, 512, device="cuda", dtype=torch.bfloat16)
    assert product.kernel == "gemm_groups_sm90a"
    expected = reference.quantized_input(x, scheme, layout).double() @ weight.dequantize().double().T
    assert relative_error(product.multiply(product.quantize(x), 9, torch.bfloat16, None), expected) < 2e-3


@pytest.mark.parametrize(("tokens", "rows", "channels"), SHAPES)
def test_native_int4_road_with_emulated_int4(tokens: int, rows: int, channels: int) -> None:
    scheme = GROUP_SCHEMES["int4-g128"]
    operand, weight, expected = random_problem(scheme, tokens, rows, channels, "nibble")
    y = group_gemm.multiply(operand, pack_groups(weight, "s4"), scheme, tokens, torch.bfloat16)
    assert relative_error(y, expected) < 2e-3


def test_graph_replays_give_the_same_bits() -> None:
    scheme = GROUP_SCHEMES["int4-g128"]
    if group_gemm.why_not(scheme, architecture(torch.device("cuda", 0))):
        pytest.skip("no kernel for this card")
    operand, weight, _ = random_problem(scheme, 5, 512, 4096, "e4m3")
    packed = pack_groups(weight, "e4m3")
    expected = group_gemm.multiply(operand, packed, scheme, 5, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = group_gemm.multiply(operand, packed, scheme, 5, torch.bfloat16)
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


def test_small_products_on_each_others_heels() -> None:
    """A run of the outliers alone must not touch flags before the product before has done with them."""
    scheme = GROUP_SCHEMES["int4-g128"]
    if group_gemm.why_not(scheme, architecture(torch.device("cuda", 0))):
        pytest.skip("no kernel for this card")
    problems = []
    for rows, channels in ((320, 256), (1408, 320), (512, 1320), (1320, 704)):
        operand, weight, _ = random_problem(scheme, 2, rows, channels, "e4m3")
        problems.append((operand, pack_groups(weight, "e4m3")))
    alone = [group_gemm.multiply(operand, weight, scheme, 2, torch.bfloat16) for operand, weight in problems]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [group_gemm.multiply(o, w, scheme, 2, torch.bfloat16) for _ in range(20) for o, w in problems]
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(result, alone[index % 4]) for index, result in enumerate(results))


@pytest.mark.parametrize("name", ["int4-g128", "mxfp4"])
def test_two_streams_at_once(name: str) -> None:
    """Each stream has its own place for what the parts of a tile exchange."""
    scheme = GROUP_SCHEMES[name]
    if group_gemm.why_not(scheme, architecture(torch.device("cuda", 0))):
        pytest.skip("no kernel for this card")
    problems = []
    for _ in range(2):
        operand, weight, _ = random_problem(scheme, 16, 4096, 4096, "e4m3")
        problems.append((operand, pack_groups(weight, "e4m3")))
    multiply = [lambda o=o, w=w: group_gemm.multiply(o, w, scheme, 16, torch.bfloat16) for o, w in problems]  # type: ignore[misc]
    alone = [call() for call in multiply]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[index].append(multiply[index]())
    torch.cuda.synchronize()
    for index in range(2):
        assert all(torch.equal(result, alone[index]) for result in results[index])


@hopper
def test_torch_compile_holds_the_operator() -> None:
    scheme = GROUP_SCHEMES["int4-g128"]
    operand, weight, _ = random_problem(scheme, 8, 256, 512, "e4m3")
    packed = pack_groups(weight, "e4m3")
    compiled = torch.compile(
        lambda: group_gemm.linear(operand, packed, scheme, 8, torch.bfloat16) * 2, backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(), group_gemm.linear(operand, packed, scheme, 8, torch.bfloat16) * 2)
