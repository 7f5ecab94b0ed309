"""The quantization kernels on the card: the same codes as the rule, through the torch operator."""

import pytest
import torch

from atomcli.formats.scheme import SCHEMES
from atomcli.kernels import quantize_launch
from atomcli.kernels.quantize import Operand, norm_quantize, prepare_layout, quantize, silu_mul_quantize
from tests.kernels import quantize_cases as cases
from tests.kernels.quantize_cases import FORMATS


def on_host(operand):
    return type(operand)(*(part.cpu() for part in operand))


@pytest.mark.parametrize("tokens", [1, 13, 300])
@pytest.mark.parametrize("name", FORMATS)
def test_codes_equal_the_rule(name: str, tokens: int) -> None:
    torch.manual_seed(tokens)
    for channels, outliers, permuted, hadamard in (
        (580, 64, True, True),
        (4096, 128, True, False),
        (896, 0, False, True),
    ):
        scheme = cases.scheme_of(FORMATS[name], outliers, hadamard)
        layout = cases.random_layout(channels, outliers, permuted, permuted, hadamard)
        x = cases.random_rows(tokens, channels, torch.bfloat16)
        operand = quantize(x.cuda(), scheme, prepare_layout(layout, "cuda"))
        cases.assert_equal(on_host(operand), cases.reference(x, scheme, layout), "s8")


@pytest.mark.parametrize(
    ("name", "container"), [("paper", "nibble"), ("paper", "e4m3"), ("nvfp4", "e4m3"), ("mxfp4", "e4m3")]
)
def test_containers(name: str, container: str) -> None:
    torch.manual_seed(3)
    scheme = cases.scheme_of(FORMATS[name], 128, True)
    layout = cases.random_layout(1100, 128, True, True, True)
    x = cases.random_rows(21, 1100, torch.float16)
    operand = quantize(x.cuda(), scheme, prepare_layout(layout, "cuda"), container)
    cases.assert_equal(on_host(operand), cases.reference(x, scheme, layout), container)


@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_norm_and_silu_round_like_torch(tokens: int) -> None:
    torch.manual_seed(4)
    scheme, layout = SCHEMES["w4a4"], cases.random_layout(4096, 128, True, True, True)
    table = prepare_layout(layout, "cuda")
    x, residual = (torch.randn(tokens, 4096, device="cuda").bfloat16() for _ in range(2))
    weight = torch.rand(4096, device="cuda").bfloat16()
    operand, total, normed = norm_quantize(x, weight, 1e-6, scheme, table, residual, want_normed=True)
    assert torch.equal(total, x + residual)
    assert normed is not None
    wide = total.float()
    expected = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16() * weight
    assert (normed != expected).float().mean() < 0.01
    torch.testing.assert_close(normed, expected, rtol=2**-7, atol=0)
    cases.assert_equal(on_host(operand), cases.reference(normed, scheme, layout), "s8")
    both = torch.randn(tokens, 8192, device="cuda").bfloat16()
    operand = silu_mul_quantize(both[:, :4096], both[:, 4096:], scheme, table)
    product = torch.nn.functional.silu(both[:, :4096]) * both[:, 4096:]
    same = quantize(product, scheme, table)
    assert (operand.codes != same.codes).float().mean() < 0.01


def test_graph_and_compile() -> None:
    scheme, layout = SCHEMES["w4a8"], cases.random_layout(1024, 128, True, False, True)
    table = prepare_layout(layout, "cuda")
    x = torch.randn(5, 1024, device="cuda").bfloat16()
    expected = quantize(x, scheme, table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operand = quantize(x, scheme, table)
    operand.codes.fill_(99)
    graph.replay()
    assert torch.equal(operand.codes, expected.codes)
    compiled = torch.compile(lambda rows: quantize(rows, scheme, table).codes, fullgraph=True)
    assert torch.equal(compiled(x), expected.codes)


@pytest.mark.parametrize("channels", [11008, 28672])
@pytest.mark.parametrize("name", ["w4a8", "w4a4"])
def test_rows_split_among_blocks(name: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few long rows are split among the blocks of a cluster; the codes and what goes along are the same."""
    torch.manual_seed(channels)
    scheme, layout = (
        SCHEMES[name],
        cases.random_layout(channels, 128, True, True, SCHEMES[name].transform == "hadamard"),
    )
    table = prepare_layout(layout, "cuda")
    x = cases.random_rows(5, channels, torch.bfloat16).cuda()
    weight = torch.rand(channels, device="cuda").bfloat16()

    def run() -> list[torch.Tensor]:
        fused, total, normed = norm_quantize(x, weight, 1e-6, scheme, table, x.flip(0).contiguous(), want_normed=True)
        return [*quantize(x, scheme, table), *silu_mul_quantize(x, 0.5 * x, scheme, table), *fused, total, normed]

    split = run()
    cases.assert_equal(on_host(Operand(*split[:5])), cases.reference(x.cpu(), scheme, layout), "s8")
    monkeypatch.setattr(quantize_launch, "SPLIT_TOKENS", 0)
    for one, other in zip(split[:10] + split[15:], run()[:10] + run()[15:], strict=True):
        assert torch.equal(one, other)
