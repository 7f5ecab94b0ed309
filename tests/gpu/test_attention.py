"""Attention on a paged cache on a card: random caches of every kind, batches, graphs, streams and 128k keys."""

import random

import pytest
import torch

from atomcli.kernels import attention, attention_launch, compiler
from atomcli.kernels import attention_reference as reference
from atomcli.kernels.pages import Element, PageFormat
from tests.kernels.attention_cases import Problem, problem, relative_error, rope_tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda", 0)
SCALING = 0.1
TOLERANCE = 4e-3  # of results in bf16, whose rounding is 1.7e-3
ELEMENTS: tuple[Element, ...] = ("int4", "int8", "fp8", "bf16")
HEADS = ((4, 4), (8, 2), (7, 1), (24, 2), (40, 2))  # up to 20 queries share a KV head


@pytest.fixture(autouse=True)
def _kernels_run() -> None:
    assert attention.why_not(PageFormat("int4", 128), DEVICE) is None


def decoded(case: Problem, window: int | None = None, **biases: object) -> torch.Tensor:
    """What the kernel makes of a problem that lies on the card; poisoned before."""
    query = case.query.to(DEVICE)
    out = torch.full_like(query, float("nan"))
    return attention.decode(
        query, case.pool, case.fmt, case.page_table, case.lengths, SCALING, window, out=out, **biases
    )  # fmt: skip


def prefilled(case: Problem, window: int | None = None, **biases: object) -> torch.Tensor:
    """What the kernel makes of the prompts of a problem that lies on the card; poisoned before."""
    query = case.query.to(DEVICE)
    out = torch.full_like(query, float("nan"))
    return attention.prefill(
        query, case.pool, case.fmt, case.page_table, case.starts, case.lengths, SCALING, window, out=out, **biases
    )  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("element", ELEMENTS)
def test_decode(element: Element, head_dim: int) -> None:
    draw = random.Random(f"{element} {head_dim}")
    page = draw.choice((16, 32, 64))
    for window in (None, 1, 50):
        heads, kv_heads = draw.choice(HEADS)
        lengths = [0, 1, page - 1, page, page + 1, draw.randint(200, 900), draw.randint(2, 64)]
        case = problem(element, lengths, head_dim=head_dim, page=page, heads=heads, kv_heads=kv_heads)
        assert relative_error(decoded(case.to(DEVICE), window), case.expected(SCALING, window)) < TOLERANCE


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("element", ELEMENTS)
def test_prefill(element: Element, head_dim: int) -> None:
    draw = random.Random(f"{element} {head_dim}")
    page = draw.choice((16, 32, 64))
    for window in (None, 1, 50):
        heads, kv_heads = draw.choice(HEADS)
        lengths = [draw.randint(1, 300), 0, 1, page, draw.randint(1, 300)]
        queries = [draw.randint(0, length) for length in lengths]
        case = problem(
            element, lengths, queries=queries, head_dim=head_dim, page=page, heads=heads, kv_heads=kv_heads
        )  # fmt: skip
        out = prefilled(case.to(DEVICE), window)
        assert relative_error(out, case.expected(SCALING, window)) < TOLERANCE


@pytest.mark.parametrize("element", ELEMENTS)
def test_long_prompts(element: Element) -> None:
    """More work than the card has processors, and prompts that continue a prefix, alike every time."""
    case = problem(
        element, [2048, 1500, 700, 129], queries=[2048, 1000, 1, 128], head_dim=128, page=64, heads=24, kv_heads=6
    )  # fmt: skip
    on_card = case.to(DEVICE)
    out = prefilled(on_card)
    assert relative_error(out, case.expected(SCALING)) < TOLERANCE
    assert all(torch.equal(prefilled(on_card), out) for _ in range(5))


def test_a_prompt_alone_and_in_a_batch() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 700) for _ in range(50)]
    case = problem("int4", lengths, queries=lengths, head_dim=128, page=16, heads=8, kv_heads=8).to(DEVICE)
    together = prefilled(case)
    for row in (0, 7, 49):
        own = slice(int(case.starts[row]), int(case.starts[row + 1]))
        rows = slice(row, row + 1)
        starts = case.starts[row : row + 2] - own.start
        alone = Problem(
            case.fmt, case.query[own], case.pool, case.page_table[rows], starts, case.lengths[rows], [], []
        )  # fmt: skip
        assert torch.equal(prefilled(alone), together[own])


def test_a_graph_serves_other_prompts() -> None:
    """Work is counted on the card: the counters come out clean every time."""
    case = problem("int4", [700, 300, 9], queries=[600, 300, 9], head_dim=128, page=16, heads=8, kv_heads=2).to(DEVICE)
    prefilled(case)
    query = case.query.to(DEVICE)
    out, graph = torch.empty_like(query), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            attention.prefill(
                query, case.pool, case.fmt, case.page_table, case.starts, case.lengths, SCALING, out=out
            )  # fmt: skip
    for counts in ([600, 300, 9], [1, 100, 1], [0, 0, 3]):
        case.starts.copy_(torch.tensor([0, *counts]).cumsum(0))
        out.fill_(float("nan"))
        graph.replay()
        used = sum(counts)
        assert torch.equal(out[:used], prefilled(case)[:used])


@pytest.mark.parametrize("hadamard", [False, True])
def test_key_biases_come_back_in_prompts(hadamard: bool) -> None:
    case = problem("int4", [300, 1, 75], queries=[200, 1, 75], head_dim=128, page=32, heads=7, kv_heads=1)
    key_bias, value_bias = torch.randn(1, 128) * 3, torch.randn(1, 128)
    cos, sin = rope_tables(300, 128)
    turned = reference.rotate(key_bias.expand(300, 1, 128), cos, sin)
    rope = (cos.to(DEVICE), sin.to(DEVICE))
    biases = {"key_bias": key_bias.to(DEVICE), "value_bias": value_bias.to(DEVICE), "rope": rope, "hadamard": hadamard}
    turned = reference.hadamard_heads(turned) if hadamard else turned
    out = prefilled(case.to(DEVICE), **biases)
    assert relative_error(out, case.expected(SCALING, None, turned, value_bias)) < TOLERANCE


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("element", ELEMENTS)
def test_key_biases_come_back(element: Element, hadamard: bool) -> None:
    case = problem(element, [300, 1, 75], head_dim=128, page=32, heads=7, kv_heads=1)
    key_bias, value_bias = torch.randn(1, 128) * 3, torch.randn(1, 128)
    cos, sin = rope_tables(300, 128)
    turned = reference.rotate(key_bias.expand(300, 1, 128), cos, sin)
    rope = (cos.to(DEVICE), sin.to(DEVICE))
    biases = {"key_bias": key_bias.to(DEVICE), "value_bias": value_bias.to(DEVICE), "rope": rope, "hadamard": hadamard}
    turned = reference.hadamard_heads(turned) if hadamard else turned
    expected = case.expected(SCALING, None, turned, value_bias)
    assert relative_error(decoded(case.to(DEVICE), **biases), expected) < TOLERANCE


@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("element", ELEMENTS)
def test_append_is_the_reference_bit_for_bit(element: Element, head_dim: int, tokens: int) -> None:
    torch.manual_seed(head_dim)
    fmt, heads, kv_heads = PageFormat(element, head_dim, 32), 6, 2
    merged = (torch.randn(tokens, heads + 2 * kv_heads, head_dim) * torch.rand(tokens, 1, 1) * 5).bfloat16()
    angles = torch.rand(tokens, head_dim // 2) * 100
    slots = torch.randperm(320)[:tokens]
    slots[1] = -1
    pools = [torch.full((10, kv_heads, fmt.bytes), 7, dtype=torch.uint8) for _ in range(2)]
    on_card = pools[1].to(DEVICE)
    center = torch.randn(kv_heads, head_dim)
    for hadamard in (False, True):
        tensors = (*merged.split([heads, kv_heads, kv_heads], dim=1), angles.cos(), angles.sin(), slots)
        own = center if hadamard else None
        expected = attention.append(pools[0], fmt, *tensors, hadamard, center=own)
        rotated = attention.append(
            on_card, fmt, *(t.to(DEVICE) for t in tensors), hadamard, center=None if own is None else own.to(DEVICE)
        )
        assert torch.equal(rotated.cpu(), expected)
        assert torch.equal(on_card.cpu(), pools[0])


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("element", ELEMENTS)
def test_a_token_appended_on_the_way(element: Element, hadamard: bool) -> None:
    """One kernel gives what append and decode give, bit for bit: sequences in one part and in many."""
    for lengths, head_dim, heads, kv_heads in (
        ([1, 0, 64, 65, 700], 128, 32, 8),
        ([1040], 64, 32, 32),
        ([3000], 96, 10, 1),
        ([300, 17] * 40, 256, 8, 4),
    ):
        case = problem(element, lengths, head_dim=head_dim, page=64, heads=heads, kv_heads=kv_heads)
        page, table = case.fmt.page, case.page_table
        merged = torch.randn(len(lengths), heads + 2 * kv_heads, head_dim, device=DEVICE).bfloat16()
        new = merged.split([heads, kv_heads, kv_heads], dim=1)
        angles = torch.rand(len(lengths), head_dim // 2, device=DEVICE) * 100
        slots = torch.tensor(
            [int(table[b, (n - 1) // page]) * page + (n - 1) % page if n else -1 for b, n in enumerate(lengths)]
        ).to(DEVICE)
        arguments = (*new, angles.cos(), angles.sin(), slots)
        center = torch.randn(kv_heads, head_dim, device=DEVICE)
        on_card = case.to(DEVICE)
        apart, together = on_card.pool.clone(), on_card.pool.clone()
        rest = (on_card.page_table, on_card.lengths, SCALING)
        query = attention.append(apart, case.fmt, *arguments, hadamard, True, center)
        expected = attention.decode(query, apart, case.fmt, *rest)
        out = attention.append_and_decode(together, case.fmt, *arguments, *rest, hadamard=hadamard, center=center)
        assert torch.equal(out, expected)
        assert torch.equal(together, apart)


@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("element", ELEMENTS)
def test_the_parts_of_a_sequence_as_a_cluster(element: Element, appends: bool) -> None:
    """They merge to what parts do that meet in memory, up to the order of sums, and store the same bytes."""
    for length, heads, kv_heads in ((1, 8, 8), (129, 12, 4), (1040, 32, 32)):
        case = problem(element, [length], head_dim=128, page=64, heads=heads, kv_heads=kv_heads)
        token = torch.randn(1, heads + 2 * kv_heads, 128, device=DEVICE).bfloat16()
        query, key, value = token.split([heads, kv_heads, kv_heads], dim=1)
        angles, center = torch.rand(1, 64, device=DEVICE) * 100, torch.randn(kv_heads, 128, device=DEVICE)
        place = int(case.page_table[0, (length - 1) // 64]) * 64 + (length - 1) % 64
        slots = torch.tensor([place], device=DEVICE)
        new = attention_launch.Appended(key, value, angles.cos(), angles.sin(), slots, center, True)
        on_card = case.to(DEVICE)
        outs, pools = [], []
        for cluster in ({}, attention_launch.in_cluster(1, kv_heads, case.page_table.shape[1] * 64)):
            pool, out = on_card.pool.clone(), torch.full_like(query, float("nan"))
            attention_launch.launch_decode(
                attention_launch.load_on(DEVICE), query, pool, case.fmt, on_card.page_table, on_card.lengths, SCALING,
                None, attention_launch.NO_BIASES, out, appended=new if appends else None,
                processors=compiler.multiprocessors(DEVICE), shared_limit=attention_launch.SHARED_LIMITS["90a"],
                **cluster,
            )  # fmt: skip
            outs.append(out)
            pools.append(pool)
        assert cluster
        assert relative_error(outs[1], outs[0].cpu()) < TOLERANCE
        assert torch.equal(*pools)


def test_a_request_alone_and_in_a_full_batch() -> None:
    """Bit for bit, as long as both are cut into as many parts."""
    draw = random.Random(0)
    lengths = [draw.randint(1, 300) for _ in range(320)]
    case = problem("int4", lengths, head_dim=128, page=16, heads=8, kv_heads=8).to(DEVICE)
    together = decoded(case)
    for rows in (slice(0, 160), slice(160, 320)):
        part = Problem(
            case.fmt, case.query[rows], case.pool, case.page_table[rows], case.starts, case.lengths[rows], [], []
        )  # fmt: skip
        assert torch.equal(decoded(part), together[rows])


def test_128k_keys() -> None:
    case = problem("int4", [131072, 5], head_dim=64, page=64, heads=2, kv_heads=1)
    assert relative_error(decoded(case.to(DEVICE)), case.expected(SCALING)) < TOLERANCE


def test_a_graph_serves_other_lengths() -> None:
    """Split sequences too, whose parts meet in a workspace that must come out clean every time."""
    case = problem("int4", [700, 300, 0], head_dim=128, page=16, heads=8, kv_heads=2).to(DEVICE)
    decoded(case)
    query, out = case.query.to(DEVICE), torch.empty(3, 8, 128, dtype=torch.bfloat16, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            attention.decode(query, case.pool, case.fmt, case.page_table, case.lengths, SCALING, out=out)
    for lengths in ([700, 300, 0], [1, 0, 0], [33, 299, 0]):
        case.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, decoded(case))


def test_two_streams() -> None:
    cases = [problem("int4", [900, 20], head_dim=128, heads=8, kv_heads=8, seed=seed).to(DEVICE) for seed in (0, 1)]
    expected = [decoded(case) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(20):
        results = []
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(decoded(case))
        torch.cuda.synchronize()
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
