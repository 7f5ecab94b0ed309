"""The integer GEMM on a card: exact sums on ragged and extreme problems, every tile, repeats, graphs, two streams."""

import pytest
import torch
from torch import Tensor

from atomcli.benchmarks.shapes import ragged
from atomcli.errors import UsageError
from atomcli.kernels import compiler, gemm, layouts, tune
from atomcli.kernels.quantize import Operand

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for sm_90a"
    ),
]

DEVICE = torch.device("cuda", 0)


class Problem:
    """Random integers and scales of one product, packed for the kernel; `expected` is the oracle, in fp64."""

    def __init__(
        self,
        tokens: int,
        rows: int,
        channels: int,
        outliers: int,
        *,
        bits: int = 4,
        values: str = "random",
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int, *shape: int) -> Tensor:
            if values == "extreme":
                return torch.where(torch.randint(2, shape, generator=generator) > 0, low, high).to(torch.int8)
            return torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)

        body = channels - outliers
        groups = -(-body // 128)
        codes = draw(-8, 7, rows, body) if bits == 4 else draw(-127, 127, rows, body)
        multipliers = draw(-15, 15, rows, groups)
        if values == "zero groups":
            multipliers[:, ::2] = 0
        self.weight = codes * multipliers.repeat_interleave(128, 1)[:, :body] if bits == 4 else codes
        self.outlier_weight = draw(-127, 127, rows, outliers)
        self.x, self.outliers = draw(-128, 127, tokens, body), draw(-127, 127, tokens, outliers)
        padded = -(-tokens // 8) * 8
        self.scales = [torch.rand(size, generator=generator) + 0.5 for size in (padded, padded, rows, rows)]
        self.tokens, self.rows, self.bits = tokens, rows, bits
        token_scale, outlier_token_scale, row_scale, outlier_row_scale = (scale.to(DEVICE) for scale in self.scales)
        whole = [torch.nn.functional.pad(part, (0, -part.shape[1] % 128)) for part in (self.x, self.outliers)]
        operand = layouts.pack_operand(torch.cat(whole, 1), padded).to(DEVICE)
        empty = torch.empty(0, device=DEVICE)
        self.operand = Operand(operand, empty, token_scale, outlier_token_scale, empty)
        body_packed = layouts.pack_int4(codes, multipliers) if bits == 4 else layouts.pack_int8(codes)
        outliers_packed = layouts.pack_int8(self.outlier_weight)[:, 0].contiguous().to(DEVICE) if outliers else None
        self.gemm_weight = layouts.GemmWeight(
            "w4" if bits == 4 else "w8", (rows, channels), body_packed.to(DEVICE), layouts.pad_scale(row_scale),
            outliers_packed, layouts.pad_scale(outlier_row_scale) if outliers else None,
        )  # fmt: skip

    def expected(self, bias: Tensor | None = None) -> Tensor:
        token_scale, outlier_token_scale, row_scale, outlier_row_scale = (scale.double() for scale in self.scales)
        y = self.x.double() @ self.weight.double().T * token_scale[: self.tokens, None] * row_scale
        outlier_sums = self.outliers.double() @ self.outlier_weight.double().T
        y = y + outlier_sums * outlier_token_scale[: self.tokens, None] * outlier_row_scale
        return y if bias is None else y + bias.double().cpu()

    def run(
        self, tile: tune.Tile | None = None, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """The kernel's result, into memory full of NaN."""
        if tile is None:
            return gemm.linear(self.operand, self.gemm_weight, self.tokens, dtype, bias)
        output = torch.full((self.tokens, self.rows), torch.nan, dtype=dtype, device=DEVICE)
        gemm.launch(tile, self.operand, self.gemm_weight, output, bias)
        return output

    def unit_scales(self) -> "Problem":
        """Scales of one, so that sums below 256 come out of bf16 as they are."""
        for scale in (*self.scales, *self.operand[2:4], self.gemm_weight.row_scale):
            scale.fill_(1)
        if self.gemm_weight.outlier_row_scale is not None:
            self.gemm_weight.outlier_row_scale.fill_(1)
        return self


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [*ragged(seed=1, count=24), (2049, 1001, 456, 64), (4097, 136, 328, 128)], ids=str)
def test_ragged_shapes(shape: tuple[int, int, int, int], bits: int) -> None:
    problem = Problem(*shape, bits=bits)
    bias = torch.randn(problem.rows, device=DEVICE)
    y = problem.run(bias=bias)
    assert relative_error(y, problem.expected(bias)) <= 2e-3
    weight = problem.gemm_weight
    tile = tune.choose(DEVICE, weight.kind, problem.rows, weight.body.shape[1], problem.tokens)
    assert torch.equal(y, problem.run(tile, bias))  # again, into memory full of NaN


@pytest.mark.parametrize("tile", tune.TILES, ids=str)
def test_every_tile_sums_exactly(tile: tune.Tile) -> None:
    """Sparse operands keep each sum below 256, where bf16 is exact: one wrong unit anywhere shows."""
    problem = Problem(100, 512, 1000, 128).unit_scales()
    problem.x.zero_()
    problem.outliers.zero_()
    channels = torch.randint(problem.x.shape[1], (100,))
    problem.x[torch.arange(100), channels] = 1
    problem.outliers[torch.arange(100), channels % 128] = 1
    whole = [torch.nn.functional.pad(part, (0, -part.shape[1] % 128)) for part in (problem.x, problem.outliers)]
    problem.operand.codes.copy_(layouts.pack_operand(torch.cat(whole, 1), problem.operand.codes.shape[1]))
    assert torch.equal(problem.run(tile).double().cpu(), problem.expected())


@pytest.mark.parametrize("values", ["extreme", "zero groups"])
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_extreme_values(values: str, tokens: int) -> None:
    problem = Problem(tokens, 256, 2048, 128, values=values)
    assert relative_error(problem.run(), problem.expected()) <= 2e-3


def test_fp16_output_is_closer_than_bf16() -> None:
    problem = Problem(16, 256, 512, 64)
    for scale in (problem.scales[2], problem.scales[3], problem.gemm_weight.row_scale):
        scale.mul_(1e-3)
    problem.gemm_weight.outlier_row_scale.mul_(1e-3)
    assert relative_error(problem.run(dtype=torch.float16), problem.expected()) <= 4e-4


def test_tiles_agree_to_the_last_bit() -> None:
    problem = Problem(200, 512, 2048, 128)
    results = [problem.run(tile) for tile in tune.TILES]
    assert all(torch.equal(result, results[0]) for result in results)


def test_graph_capture_replays_the_same() -> None:
    problem = Problem(33, 640, 2048, 128)
    eager = problem.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [problem.run() for _ in range(3)]
    for result in captured:
        result.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(result, eager) for result in captured)


def test_small_products_on_each_others_heels() -> None:
    """A run of units that multiplies nothing must not touch flags before the product before has done with them."""
    problems = [Problem(2, rows, columns, 128) for rows, columns in ((320, 256), (1408, 320), (512, 320), (320, 704))]
    alone = [problem.run() for problem in problems]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [problem.run() for _ in range(20) for problem in problems]
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(result, alone[index % 4]) for index, result in enumerate(results))


def test_two_streams_at_once() -> None:
    problems = [Problem(16, 4096, 4096, 128, seed=seed) for seed in (0, 1)]
    alone = [problem.run() for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[index].append(problems[index].run())
    torch.cuda.synchronize()
    for index in range(2):
        assert all(torch.equal(result, alone[index]) for result in results[index])


def test_torch_compile_holds_the_operator() -> None:
    problem = Problem(8, 256, 512, 128)
    weight, operand = problem.gemm_weight, problem.operand
    compiled = torch.compile(
        lambda: gemm.linear(operand, weight, 8, torch.bfloat16) * 2, backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(), problem.run() * 2)


def test_misfits_are_refused() -> None:
    problem = Problem(8, 256, 512, 128)
    with pytest.raises(UsageError, match="the weight needs 8-bit"):
        gemm.linear(problem.operand._replace(codes=problem.operand.codes[1:]), problem.gemm_weight, 8, torch.bfloat16)
    with pytest.raises(UsageError, match="bfloat16 or float16"):
        gemm.linear(problem.operand, problem.gemm_weight, 8, torch.float32)


def test_a_kernel_reports_the_launch_it_can_not_make() -> None:
    kernel = compiler.load_kernel(gemm.source("w4"), "gemm", DEVICE, tune.TILES[0].defines(torch.bfloat16))
    with pytest.raises(compiler.RunError, match="the driver refused the launch"):
        kernel.launch(1, 4096)
