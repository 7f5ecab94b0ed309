"""`atom bench attention`: decode and prefill on a paged cache beside what one would use instead, on one card.

A contender is built on as many caches as exceed the L2 cache together, with pages in random order; the calls over all
of them are captured in one CUDA graph, whose replays are timed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from atomcli.benchmarks.gemm import MEMORY_BANDWIDTH, ROTATED_BYTES
from atomcli.benchmarks.report import Measure, Row, measure
from atomcli.errors import AtomError, UnsupportedError, UsageError
from atomcli.kernels import attention, timing
from atomcli.kernels.pages import Element, PageFormat

Step = Literal["decode", "prefill"]
Call = Callable[[], object]

ELEMENTS: tuple[Element, ...] = ("int4", "int8", "fp8", "bf16")
BASELINE = "atom bf16"
SEED_PAGES = 64  # pages of distinct content that a pool repeats


class Heads(NamedTuple):
    """Query heads, KV heads and channels of each."""

    query: int
    kv: int
    dim: int

    def __str__(self) -> str:
        return f"{self.query}/{self.kv}x{self.dim}"


LLAMA_2_7B, LLAMA_3_8B = Heads(32, 32, 128), Heads(32, 8, 128)
DECODE_CASES = (
    (LLAMA_2_7B, 1, 1024), (LLAMA_2_7B, 16, 1024), (LLAMA_2_7B, 64, 1024), (LLAMA_2_7B, 128, 1024),
    (LLAMA_2_7B, 256, 1024), (LLAMA_2_7B, 16, 8192), (LLAMA_3_8B, 1, 8192), (LLAMA_3_8B, 16, 8192),
    (LLAMA_3_8B, 64, 4096), (LLAMA_3_8B, 1, 131072),
)  # fmt: skip
PREFILL_CASES = ((LLAMA_2_7B, 4, 2048), (LLAMA_3_8B, 4, 2048), (LLAMA_3_8B, 1, 8192))


@dataclass(frozen=True)
class Contender:
    """A step to time: `build(heads, batch, context, copies)` gives a call for each copy of the cache."""

    name: str
    bytes_per_token: Callable[[Heads], float]  # of one KV head, key and value
    build: Callable[[Heads, int, int, int], list[Call]]


def run(
    step: Step,
    cases: Sequence[tuple[Heads, int, int]] | None = None,
    elements: Sequence[Element] = ELEMENTS,
    page: int = 64,
    *,
    peers: bool = True,
    repeats: int = 7,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """A row for each (heads, batch, context) and contender; `context` keys per sequence, prefill has as many queries.

    Raises UnsupportedError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "`atom bench attention` times GPU kernels, and torch finds no CUDA device here",
            "`atom doctor` says what this machine can run",
        )
    cases = cases or (DECODE_CASES if step == "decode" else PREFILL_CASES)
    contenders = [_ours(step, element, page) for element in elements] + (_peers(step) if peers else [])
    rows: list[Row] = []
    for done, case in enumerate(cases):
        rows += _case(step, *case, contenders, repeats)
        if progress is not None:
            progress(done + 1, len(cases))
    return rows


def _case(step: Step, heads: Heads, batch: int, context: int, contenders: list[Contender], repeats: int) -> list[Row]:
    replays: dict[str, timing.Replay] = {}
    notes: dict[str, str] = {}
    sizes = {c.name: batch * context * heads.kv * c.bytes_per_token(heads) for c in contenders}
    torch.cuda.empty_cache()
    for contender in contenders:
        copies = max(1, min(64, -(-ROTATED_BYTES // int(sizes[contender.name]))))
        try:
            replays[contender.name] = timing.capture(contender.build(heads, batch, context, copies))
        except (AtomError, RuntimeError, ImportError, AttributeError, TypeError, ValueError) as error:
            notes[contender.name] = str(error).splitlines()[0] if str(error) else type(error).__name__
    times = {name: measure(samples, "µs") for name, samples in timing.in_turn(replays, repeats).items()}
    bf16 = times.get(BASELINE)
    rows = []
    for contender in contenders:
        name = contender.name
        labels: dict[str, str | int | float] = {
            "step": step,
            "heads": str(heads),
            "batch": batch,
            "context": context,
            "kernel": name,
        }
        time = times.get(name)
        if time is None:
            rows.append(Row(labels, dict.fromkeys(("time", f"vs {BASELINE}", *_RATES[step])), notes[name]))
            continue
        ratio = _per_time(time, bf16.median, "×") if bf16 else None
        rates = _rates(step, time, heads, batch, context, sizes[name])
        rows.append(Row(labels, {"time": time, f"vs {BASELINE}": ratio, **rates}))
    return rows


_RATES = {"decode": ("GB/s", "of limit"), "prefill": ("TFLOPS",)}


def _rates(
    step: Step, time: Measure, heads: Heads, batch: int, context: int, cache_bytes: float
) -> dict[str, Measure | None]:
    """Bytes per second and their share of the card's; for prefill operations per second, half of the square masked."""
    if step == "prefill":
        return {"TFLOPS": _per_time(time, 2.0 * batch * context * context * heads.query * heads.dim * 1e-6, "TFLOPS")}
    name = torch.cuda.get_device_name()
    bandwidth = next((value for card, value in MEMORY_BANDWIDTH.items() if card in name), MEMORY_BANDWIDTH["H100"])
    return {
        "GB/s": _per_time(time, cache_bytes * 1e-3, "GB/s"),
        "of limit": _per_time(time, cache_bytes * 1e8 / bandwidth, "%"),
    }


def _per_time(time: Measure, amount: float, unit: str) -> Measure:
    """An amount over a time; quartiles change places."""
    return Measure(amount / time.median, amount / time.high, amount / time.low, unit, time.samples)


# ------------------------------------------------------------------------------------------------ ours


def _ours(step: Step, element: Element, page: int) -> Contender:
    def build(heads: Heads, batch: int, context: int, copies: int) -> list[Call]:
        fmt = PageFormat(element, heads.dim, page)
        reason = attention.why_not(fmt, "cuda")
        if reason:
            raise UnsupportedError(reason)
        return [_call(step, fmt, heads, batch, context) for _ in range(copies)]

    return Contender(f"atom {element}", lambda heads: PageFormat(element, heads.dim, page).bytes_per_token, build)


def _call(step: Step, fmt: PageFormat, heads: Heads, batch: int, context: int) -> Call:
    pool, page_table = random_cache(fmt, heads.kv, batch, context)
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    tokens = batch * (context if step == "prefill" else 1)
    query = torch.randn(tokens, heads.query, heads.dim, device="cuda", dtype=torch.bfloat16)
    out, scaling = torch.empty_like(query), heads.dim**-0.5
    if step == "decode":
        return lambda: attention.decode(query, pool, fmt, page_table, lengths, scaling, out=out)
    starts = torch.arange(0, tokens + 1, context, dtype=torch.int32, device="cuda")
    return lambda: attention.prefill(query, pool, fmt, page_table, starts, lengths, scaling, out=out)


def random_cache(fmt: PageFormat, kv_heads: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
    """A pool of normal keys and values, and a page table int32 (batch, pages) that takes its pages in random order."""
    shape = (SEED_PAGES, kv_heads, fmt.page, fmt.head_dim)
    seed = fmt.allocate(SEED_PAGES, kv_heads, "cuda")
    views = fmt.views(seed)
    keys, values = (fmt.encode(torch.randn(shape, device="cuda")) for _ in range(2))
    views.keys.copy_(keys.codes)
    views.values.copy_(values.codes)
    views.numbers.copy_(torch.cat([keys.numbers, values.numbers], -1))
    pages = batch * -(-context // fmt.page)
    pool = seed[torch.arange(pages, device="cuda") % SEED_PAGES].contiguous()
    return pool, torch.randperm(pages, device="cuda").to(torch.int32).view(batch, -1)


# ----------------------------------------------------------------------------------------------- peers


def _peers(step: Step) -> list[Contender]:
    """torch's own attention on a contiguous bf16 cache, and FlashAttention-3 on a paged one where it is installed."""
    from importlib.util import find_spec

    peers = [Contender("torch SDPA bf16", _bf16_bytes, lambda *case: _sdpa(step, *case))]
    if find_spec("flash_attn_interface") or find_spec("vllm"):
        peers.append(Contender("FA3 bf16", _bf16_bytes, lambda *case: _flash_attention_3(step, *case)))
    return peers


def _bf16_bytes(heads: Heads) -> float:
    return 4.0 * heads.dim


def _sdpa(step: Step, heads: Heads, batch: int, context: int, copies: int) -> list[Call]:
    def call() -> Call:
        queries = context if step == "prefill" else 1
        query = torch.randn(batch, heads.query, queries, heads.dim, device="cuda", dtype=torch.bfloat16)
        key, value = (
            torch.randn(batch, heads.kv, context, heads.dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        causal, grouped = step == "prefill", heads.query != heads.kv
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal, enable_gqa=grouped
        )

    return [call() for _ in range(copies)]


def _flash_attention_3(step: Step, heads: Heads, batch: int, context: int, copies: int) -> list[Call]:
    try:
        from flash_attn_interface import flash_attn_with_kvcache
    except ImportError:
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_with_kvcache

    page = 64

    def call() -> Call:
        pages = -(-context // page)
        key, value = (
            torch.randn(batch * pages, page, heads.kv, heads.dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        table = torch.randperm(batch * pages, device="cuda").to(torch.int32).view(batch, pages)
        lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        queries = context if step == "prefill" else 1
        query = torch.randn(batch, queries, heads.query, heads.dim, device="cuda", dtype=torch.bfloat16)
        return lambda: flash_attn_with_kvcache(
            query, key, value, cache_seqlens=lengths, page_table=table, causal=True
        )  # fmt: skip

    return [call() for _ in range(copies)]


def parse_heads(text: str) -> Heads:
    """QUERY/KVxDIM as numbers, such as 32/8x128; UsageError for anything else."""
    query, _, rest = text.lower().partition("/")
    kv, _, dim = rest.partition("x")
    if not all(part.isdecimal() and int(part) for part in (query, kv, dim)) or int(query) % int(kv):
        raise UsageError(f"--heads is {text!r}; write QUERY/KVxDIM, such as 32/8x128")
    return Heads(int(query), int(kv), int(dim))
