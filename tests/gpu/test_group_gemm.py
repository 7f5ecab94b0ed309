"""The GEMMs with a float scale per group, on the card, against the reference."""

import pytest
import torch

from atomcli.kernels import group_gemm
from atomcli.kernels.compiler import architecture
from atomcli.kernels.group_layouts import pack_groups
from tests.kernels.gemm_cases import GROUP_SCHEMES, random_problem, relative_error

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
