"""`atom bench gemm`: our GEMM beside what one would use instead, in one process on one card.

A contender is built on as many copies of its weight as exceed the L2 cache together; the products over all copies are
captured in one CUDA graph. The graphs of all contenders are replayed and timed in turn. So launch cost is a graph's,
weights come from memory, and all meet the same clock.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from atomcli.benchmarks.report import Measure, Row, measure
from atomcli.errors import AtomError, UnsupportedError
from atomcli.formats import grids
from atomcli.formats.groups import group_count
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import SCHEMES, Scheme
from atomcli.formats.weights import QuantizedWeight
from atomcli.kernels import dispatch, gemm, layouts, quantize, timing, tune
from atomcli.kernels.tiles import Tile

ROTATED_BYTES = 220_000_000  # more than any card's L2 holds
MEMORY_BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}  # bytes/s of a large copy, measured; read plus written
INT8_PEAK = {"H100": 1.93e15, "H200": 1.93e15}  # operations/s of warpgroup MMAs without memory traffic, measured

Product = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """A product to time: `build(N, K, M, copies)` gives a call for each copy of the weight.

    `weight_bits` as stored; `operand_bits` of the activations, and of the arithmetic.
    """

    name: str
    weight_bits: float
    build: Callable[[int, int, int, int], list[Product]]
    operand_bits: int = 8


def run(
    shapes: Sequence[tuple[int, int]],
    batch_sizes: Sequence[int],
    schemes: Sequence[str] = ("w4a8",),
    *,
    peers: bool = True,
    repeats: int = 7,
    tune_first: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """A row for each (out_features, in_features), number of tokens and contender; cuBLAS bf16 is always the first.

    `tune_first` chooses the integer GEMM's tile of each case by measuring, and keeps the choice in the user's cache.
    Raises UnsupportedError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "`atom bench gemm` times GPU kernels, and torch finds no CUDA device here",
            "`atom doctor` says what this machine can run",
        )
    ours = [contender for name in schemes for contender in _ours(SCHEMES[name])]
    others = _peers() if peers else []
    rows: list[Row] = []
    cases = [(shape, tokens) for shape in shapes for tokens in batch_sizes]
    for done, ((out_features, in_features), tokens) in enumerate(cases):
        for name in schemes if tune_first else ():
            tune_gemm(SCHEMES[name], out_features, in_features, tokens)
        rows += _case(
            out_features, in_features, tokens, [_CUBLAS_BF16, *ours, *others], [c.name for c in ours], repeats
        )
        if progress is not None:
            progress(done + 1, len(cases))
    return rows


def _case(
    out_features: int, in_features: int, tokens: int, contenders: list[Contender], ours: list[str], repeats: int
) -> list[Row]:
    replays: dict[str, timing.Replay] = {}
    notes: dict[str, str] = {}
    for contender in contenders:
        copies = max(2, int(ROTATED_BYTES / (out_features * in_features * contender.weight_bits / 8)) + 1)
        try:
            replays[contender.name] = timing.capture(contender.build(out_features, in_features, tokens, copies))
        except (AtomError, RuntimeError, ImportError, AttributeError, TypeError, ValueError) as error:
            notes[contender.name] = str(error).splitlines()[0] if str(error) else type(error).__name__
    times = {name: measure(samples, "µs") for name, samples in timing.in_turn(replays, repeats).items()}
    best_peer = min((time.median for name, time in times.items() if name not in ours), default=None)
    operations = 2.0 * out_features * in_features * tokens
    rows = []
    for contender in contenders:
        labels: dict[str, str | int | float] = {
            "N": out_features,
            "K": in_features,
            "M": tokens,
            "kernel": contender.name,
        }
        time = times.get(contender.name)
        if time is None:
            rows.append(Row(labels, dict.fromkeys(_MEASURES), notes[contender.name]))
            continue
        bytes_moved = out_features * in_features * contender.weight_bits / 8
        bytes_moved += tokens * (in_features * contender.operand_bits / 8 + 2 * out_features)
        values = {
            "time": time,
            "TOPS": _per_time(time, operations / 1e12 * 1e6, "TOPS"),
            "GB/s": _per_time(time, bytes_moved / 1e9 * 1e6, "GB/s"),
            "vs bf16": _per_time(time, times[_CUBLAS_BF16.name].median, "×"),
            "vs best peer": _per_time(time, best_peer, "×") if best_peer else None,
            "of limit": _per_time(time, 100e6 * _limit(bytes_moved, operations * contender.operand_bits / 8), "%"),
        }
        rows.append(Row(labels, values))
    return rows


_MEASURES = ("time", "TOPS", "GB/s", "vs bf16", "vs best peer", "of limit")


def _per_time(time: Measure, amount: float, unit: str) -> Measure:
    """A rate from an amount (per second times 1e6) and a time in µs; quartiles change places."""
    return Measure(amount / time.median, amount / time.high, amount / time.low, unit, time.samples)


def _limit(bytes_moved: float, operations: float) -> float:
    """Seconds the card needs at least, on memory or on 8-bit operations, whichever is longer."""
    name = torch.cuda.get_device_name()
    card = next((key for key in MEMORY_BANDWIDTH if key in name), "H100")
    return max(bytes_moved / MEMORY_BANDWIDTH[card], operations / INT8_PEAK[card])


# ---------------------------------------------------------------------------------------------- ours


Before = Literal["nothing", "quantize", "norm", "norm and quantize"]
SUFFIXES: dict[Before, str] = {
    "nothing": "",
    "quantize": " + quantize",
    "norm": " + torch rms_norm",  # on an operand that is there: what the fused kernel below replaces
    "norm and quantize": " + norm and quantize in one",
}


def _ours(scheme: Scheme) -> list[Contender]:
    """The GEMM alone, and after what comes before it in a model; one token takes one kernel for all of it if it can."""
    scale_bits = 16 if scheme.weights.scale == "fp16" else 8
    stored = scheme.weights.grid.bits + (scale_bits / scheme.weights.group if scheme.weights.group else 0)
    operand_bits = 16 if scheme.activations.element == "float" or scheme.activations.scale == "e4m3" else 8

    def contender(before: Before, suffix: str) -> Contender:
        def build(n: int, k: int, m: int, copies: int) -> list[Product]:
            return _products(scheme, n, k, m, copies, before)

        return Contender(f"atom {scheme.name}{suffix}", stored, build, operand_bits)

    return [contender(before, suffix) for before, suffix in SUFFIXES.items()]


def _products(
    scheme: Scheme, out_features: int, in_features: int, tokens: int, copies: int, before: Before
) -> list[Product]:
    reason = dispatch.choose(scheme, "cuda", in_features).reason
    if reason:
        raise UnsupportedError(reason)
    layout = _layout(scheme, in_features)
    products = [dispatch.prepare(_random_weight(scheme, out_features, in_features), layout) for _ in range(copies)]
    first = products[0]
    x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
    norm = torch.rand(in_features, device="cuda", dtype=torch.bfloat16)
    operand = first.quantize(x)

    def prepared() -> quantize.Operand:
        if before == "quantize":
            return first.quantize(x)
        if before == "norm and quantize":
            return quantize.norm_quantize(x, norm, 1e-6, scheme, first.layout, container=first.container)[0]
        if before == "norm":
            torch.nn.functional.rms_norm(x, (in_features,), norm, 1e-6)
        return operand

    if tokens == 1 and first.one_token is not None and before.endswith("quantize"):
        normed = {"prologue": "norm", "norm_weight": norm, "epsilon": 1e-6} if before != "quantize" else {}
        return [lambda p=p: p.one_token(x, **normed) for p in products]  # type: ignore[misc]
    return [lambda p=p: p.multiply(prepared(), tokens, torch.bfloat16, None) for p in products]  # type: ignore[misc]


def tune_gemm(scheme: Scheme, out_features: int, in_features: int, tokens: int) -> Tile | None:
    """Measure which tile is fastest for a problem on this card, its input quantized before it, and keep the choice.

    None for schemes whose kernel takes its tiles by rule.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    copies = max(2, int(ROTATED_BYTES / (out_features * in_features * scheme.weights.grid.bits / 8)) + 1)
    repacked = [layouts.repack(_random_weight(scheme, out_features, in_features)) for _ in range(copies)]
    weights = [weight for weight in repacked if weight is not None]
    if not weights:
        return None
    product = dispatch.prepare(_random_weight(scheme, 128, in_features), _layout(scheme, in_features))
    x = torch.randn(tokens, in_features, device=device, dtype=torch.bfloat16)
    output = torch.empty(tokens, out_features, dtype=torch.bfloat16, device=device)

    def multiply(tile: Tile, weight: layouts.GemmWeight) -> None:
        gemm.launch(tile, product.quantize(x), weight, output)

    def products(tile: Tile) -> list[Product]:
        return [functools.partial(multiply, tile, weight) for weight in weights]

    return tune.tune(device, weights[0].kind, out_features, weights[0].body.shape[1], tokens, products)


def _layout(scheme: Scheme, in_features: int) -> InputLayout:
    """Channels in a random order, as a checkpoint's are where outliers go last."""
    order = torch.randperm(in_features, generator=torch.Generator().manual_seed(0)) if scheme.outliers else None
    hadamard = scheme.transform == "hadamard"
    return InputLayout(in_features, scheme.outliers, scheme.hadamard_block, order, hadamard=hadamard)


def _random_weight(scheme: Scheme, out_features: int, in_features: int) -> QuantizedWeight:
    """Normal codes: like real ones, they keep the arithmetic's power, and so its clock, realistic."""
    format, body = scheme.weights, scheme.body(in_features)
    if format.element == "e2m1":
        codes = grids.encode(torch.randn(out_features, body, device="cuda") * 2, format.grid)
    else:
        deviation = 34 if format.element == "int8" else 2.7
        codes = _normal((out_features, body), deviation, int(format.grid.low), int(format.grid.high))
    random = torch.rand(out_features, group_count(body, format.group), device="cuda") + 0.5
    scales = {
        "two_level": lambda: (random * 9 + 2).to(torch.int8),
        "fp16": lambda: (random * 1e-2).half(),
        "e8m0": lambda: (random * 4 + 118).to(torch.uint8),
        "e4m3": lambda: (random * 200).to(torch.float8_e4m3fn),
    }
    stored = scales[format.scale]() if format.scale in scales else None
    row_scale = torch.rand(out_features, device="cuda") * 1e-3
    unit = {"two_level": row_scale, "row": row_scale, "e4m3": row_scale[:1]}.get(format.scale)
    if not scheme.outliers:
        return QuantizedWeight.from_codes(scheme, codes, stored, unit)
    outliers = _normal((out_features, scheme.outliers), 34, -127, 127)
    return QuantizedWeight.from_codes(scheme, codes, stored, unit, outliers, row_scale)


def _normal(shape: tuple[int, ...], deviation: float, low: int, high: int) -> Tensor:
    return (torch.randn(shape, device="cuda") * deviation).round_().clamp_(low, high).to(torch.int8)


# ---------------------------------------------------------------------------------------------- peers


def _bf16(out_features: int, in_features: int, tokens: int, copies: int) -> list[Product]:
    x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(tokens, out_features, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    return [functools.partial(torch.mm, x, w.t(), out=y) for w in weights]


def _fp8(out_features: int, in_features: int, tokens: int, copies: int) -> list[Product]:
    padded = -(-tokens // 16) * 16  # cuBLASLt's alignment
    one = torch.ones((), device="cuda")
    x = torch.randn(padded, in_features, device="cuda").to(torch.float8_e4m3fn)
    weights = [torch.randn(out_features, in_features, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies)]
    return [functools.partial(torch._scaled_mm, x, w.t(), one, one, out_dtype=torch.bfloat16) for w in weights]


def _torch_int8(out_features: int, in_features: int, tokens: int, copies: int) -> list[Product]:
    x = _normal((max(tokens, 17), in_features), 34, -127, 127)  # torch._int_mm takes no fewer rows
    weights = [_normal((out_features, in_features), 34, -127, 127) for _ in range(copies)]
    return [functools.partial(torch._int_mm, x, w.t()) for w in weights]


def _vllm_int8(out_features: int, in_features: int, tokens: int, copies: int) -> list[Product]:
    from vllm import _custom_ops

    x = _normal((tokens, in_features), 34, -127, 127)
    weights = [_normal((out_features, in_features), 34, -127, 127) for _ in range(copies)]
    token_scale, row_scale = torch.rand(tokens, 1, device="cuda"), torch.rand(out_features, 1, device="cuda")
    return [
        functools.partial(_custom_ops.cutlass_scaled_mm, x, w.t(), token_scale, row_scale, torch.bfloat16)
        for w in weights
    ]


def _deep_gemm(out_features: int, in_features: int, tokens: int, copies: int) -> list[Product]:
    import deep_gemm

    x = torch.randn(tokens, in_features, device="cuda").to(torch.float8_e4m3fn)
    token_scales = torch.rand(tokens, in_features // 128, device="cuda")
    weights = [torch.randn(out_features, in_features, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies)]
    block_scales = torch.rand(out_features // 128, in_features // 128, device="cuda")
    y = torch.empty(tokens, out_features, device="cuda", dtype=torch.bfloat16)
    return [functools.partial(deep_gemm.fp8_gemm_nt, (x, token_scales), (w, block_scales), y) for w in weights]


def _marlin(out_features: int, in_features: int, tokens: int, copies: int) -> list[Product]:
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new
    from vllm.scalar_type import scalar_types

    x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
    scales = torch.rand(in_features // 128, out_features, device="cuda").bfloat16()
    none, workspace = torch.empty(0, dtype=torch.int32, device="cuda"), marlin_make_workspace_new(x.device)
    weights = [_random_words(in_features // 16, 2 * out_features) for _ in range(copies)]
    return [
        functools.partial(
            _custom_ops.marlin_gemm, x, None, w, None, scales, None, None, None, none, none, workspace,
            scalar_types.uint4b8, tokens, out_features, in_features, use_fp32_reduce=True,
        )
        for w in weights
    ]  # fmt: skip


def _machete(out_features: int, in_features: int, tokens: int, copies: int) -> list[Product]:
    from vllm import _custom_ops
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8
    x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
    scales = torch.rand(in_features // 128, out_features, device="cuda").bfloat16()
    packed = [_random_words(out_features, in_features // 8).t() for _ in range(copies)]
    weights = [_custom_ops.machete_prepack_B(w, torch.bfloat16, kind, torch.bfloat16) for w in packed]
    multiply = functools.partial(
        _custom_ops.machete_mm, x, b_type=kind, out_type=torch.bfloat16, b_group_scales=scales, b_group_size=128
    )
    return [functools.partial(multiply, b_q=w) for w in weights]


def _random_words(*shape: int) -> Tensor:
    """Eight random codes of 4 bits to a word."""
    return torch.randint(-(2**31), 2**31, shape, device="cuda", dtype=torch.int32)


_CUBLAS_BF16 = Contender("cuBLAS bf16", 16, _bf16, 16)


def _peers() -> list[Contender]:
    """What is installed; a peer whose package is missing gets no row."""
    from importlib.util import find_spec

    peers = [Contender("cuBLASLt fp8", 8, _fp8), Contender("torch int8", 8, _torch_int8)]
    if find_spec("vllm"):
        peers.append(Contender("CUTLASS int8 (vLLM)", 8, _vllm_int8))
        peers.append(Contender("Marlin w4a16 (vLLM)", 4.125, _marlin, 16))
        peers.append(Contender("Machete w4a16 (vLLM)", 4.125, _machete, 16))
    if find_spec("deep_gemm"):
        peers.append(Contender("DeepGEMM fp8", 8, _deep_gemm))
    return peers
