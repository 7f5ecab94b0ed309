"""The GEMM of sorted tokens by a stack of experts equals, bit for bit, the GEMM of each expert's own tokens."""

import pytest
import torch
from torch import Tensor

from atomcli.errors import UsageError
from atomcli.formats.scheme import SCHEMES
from atomcli.kernels import gemm, layouts, tune
from atomcli.kernels.dispatch import Choice
from atomcli.kernels.quantize import Operand
from atomcli.runtime.experts import Expert, Experts
from atomcli.runtime.linear import QuantLinear, input_layout
from tests.gpu.test_linear import random_weight
from tests.kernels.gemm_cases import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for sm_90a"
    ),
]

COUNTS = {
    "one token": [0, 0, 1, 0],
    "ragged": [3, 0, 17, 1, 40, 0, 0, 5],
    "one takes all": [0, 300, 0],
    "first and last": [70] + [0] * 30 + [1],
    "many": [9, 130, 0, 64, 7, 8, 1, 250],
}


class Problem:
    """Random experts and sorted tokens, quantized."""

    def __init__(self, scheme_name: str, counts: list[int], rows: int, channels: int) -> None:
        scheme = SCHEMES[scheme_name]
        self.counts, self.rows = counts, rows
        self.tokens = sum(counts)
        self.weights = [layouts.prepare_weight(random_weight(scheme, rows, channels)) for _ in counts]
        self.stack = layouts.stack(self.weights)
        starts = torch.tensor([0, *counts]).cumsum(0)
        self.starts = starts.int().cuda()
        blocks = self.stack.body.shape[2] + (self.stack.outliers is not None)
        self.codes = torch.randint(-127, 128, (self.tokens, blocks * 128), device="cuda", dtype=torch.int8)
        self.scales = [torch.rand(-(-self.tokens // 8) * 8, device="cuda") for _ in range(2)]
        self.operand = self.operand_of(0, self.tokens)

    def operand_of(self, first: int, last: int) -> Operand:
        padded = -(-(last - first) // 8) * 8
        codes = layouts.pack_operand(self.codes[first:last], padded)
        scales = [torch.nn.functional.pad(scale[first:last], (0, padded - (last - first))) for scale in self.scales]
        return Operand(codes, codes[:0], *scales, codes[:0])

    def expected(self) -> Tensor:
        """Every expert by the GEMM of one weight."""
        starts = self.starts.tolist()
        parts = [
            gemm.linear(self.operand_of(first, last), weight, last - first, torch.bfloat16)
            for first, last, weight in zip(starts, starts[1:], self.weights, strict=False)
            if last > first
        ]
        return torch.cat(parts)


@pytest.mark.parametrize("scheme", ["w4a8", "w4a4", "w8a8"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_experts_equal_their_own_products(counts: list[int], scheme: str) -> None:
    torch.manual_seed(0)
    problem = Problem(scheme, counts, 200, 700)
    y = gemm.expert_linear(problem.operand, problem.stack, problem.starts, problem.tokens, torch.bfloat16)
    assert torch.equal(y, problem.expected())


@pytest.mark.parametrize("tile", [tile for tile in tune.TILES if tile.cluster == 1], ids=str)
def test_every_tile_and_its_split(tile: tune.Tile) -> None:
    torch.manual_seed(1)
    problem = Problem("w4a8", COUNTS["many"], 320, 1000)
    y = torch.full((problem.tokens, 320), torch.nan, device="cuda", dtype=torch.bfloat16)
    gemm.launch(tile, problem.operand, problem.stack, y, expert_starts=problem.starts)
    assert torch.equal(y, problem.expected())


def test_a_captured_product_follows_the_routing() -> None:
    """The graph is captured with one distribution of tokens and replayed with others."""
    torch.manual_seed(2)
    problem = Problem("w4a8", [10, 10, 10, 10], 256, 512)
    gemm.expert_linear(problem.operand, problem.stack, problem.starts, 40, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gemm.expert_linear(problem.operand, problem.stack, problem.starts, 40, torch.bfloat16)
    for counts in ([0, 40, 0, 0], [1, 2, 3, 34], [39, 0, 0, 1]):
        problem.starts.copy_(torch.tensor([0, *counts]).cumsum(0))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, problem.expected())


def test_starts_must_fit_the_stack() -> None:
    problem = Problem("w4a8", [3, 4], 128, 512)
    with pytest.raises(UsageError, match="2 experts needs 3 int32 starts"):
        gemm.expert_linear(problem.operand, problem.stack, problem.starts[:2], 7, torch.bfloat16)


def quantized_experts(scheme_name: str, count: int, hidden: int, width: int) -> Experts:
    """Experts whose linears share layouts, as those of a checkpoint do."""
    scheme = SCHEMES[scheme_name]
    permutations = {channels: torch.randperm(channels, device="cuda") for channels in (hidden, width)}
    experts = Experts(Expert(hidden, width, torch.nn.SiLU(), "cuda") for _ in range(count))
    for expert in experts:
        for name, rows, channels in (
            ("gate_proj", width, hidden),
            ("up_proj", width, hidden),
            ("down_proj", hidden, width),
        ):
            layout = input_layout(scheme, channels, permutations[channels])
            linear = QuantLinear.from_weight(random_weight(scheme, rows, channels), layout)
            setattr(expert, name, linear)
    return experts


@pytest.mark.parametrize("scheme", ["w4a8", "w4a4", "w8a8", "w4a16"])
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_grouped_experts_equal_experts_in_turn(tokens: int, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    experts = quantized_experts(scheme, 6, 512, 384)
    hidden = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    weights, chosen = torch.rand(tokens, 6, device="cuda").softmax(-1).topk(2)
    assert experts.kernel_choice().kernel is not None
    with torch.no_grad():
        grouped = experts(hidden, chosen, weights.bfloat16())
        monkeypatch.setattr(experts, "_choice", Choice(None, "compared"))
        in_turn = experts(hidden, chosen, weights.bfloat16())
    assert relative_error(grouped, in_turn.double()) <= 1e-2


def test_a_block_of_experts_is_captured() -> None:
    torch.manual_seed(4)
    experts = quantized_experts("w4a8", 8, 512, 384)
    hidden = torch.randn(16, 512, device="cuda", dtype=torch.bfloat16)
    scores = torch.rand(16, 8, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        experts(hidden, *reversed(scores.topk(2)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            weights, chosen = scores.topk(2)
            captured = experts(hidden, chosen, weights)
        scores.copy_(torch.rand_like(scores))
        graph.replay()
        weights, chosen = scores.topk(2)
        assert torch.equal(captured, experts(hidden, chosen, weights))
