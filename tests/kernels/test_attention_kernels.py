"""The attention kernels: what they compute, on the emulator, and what the assembler makes of them on every card."""

from pathlib import Path

import pytest
import torch

from atomcli.kernels import attention_launch as launch
from atomcli.kernels import attention_reference as reference
from atomcli.kernels.compiler import compile_source
from atomcli.kernels.dispatch import ARCHITECTURES
from atomcli.kernels.pages import Element, PageFormat
from tests.kernels.attention_cases import problem, relative_error, rope_tables
from tests.kernels.disassembly import compiles, disassembles, sass
from tests.kernels.emulator import COMPILER, HostKernel

emulates = pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")

ELEMENTS: tuple[Element, ...] = ("int4", "int8", "fp8", "bf16")
SCALING = 0.1
LARGE = 227 << 10  # of shared memory
# Results are rounded to bf16: a relative error of 1.7e-3 is none. Weights are rounded to the operand's format as well,
# which 8 bits of bf16 show.
TOLERANCE = 4e-3


def on_host(name: str, defines: dict[str, int | str], shared_bytes: int) -> HostKernel:
    return HostKernel(f"{name}.cu", name, defines)


@emulates
@pytest.mark.parametrize(
    ("element", "lengths", "parts", "window", "shape"),
    [
        ("int4", [0, 1, 300], (1, 4, 3), None, {"head_dim": 128, "page": 16}),  # longer than a part may be
        ("int4", [300, 15, 64], (3, 99, 3), 40, {"head_dim": 96, "page": 16}),
        ("fp8", [150, 15, 1], (2, 99, 2), 40, {"head_dim": 96, "page": 16}),
        ("int8", [70], (1, 99, 1), None, {"head_dim": 64, "page": 32, "heads": 10, "kv_heads": 1}),
        ("bf16", [70, 0, 17], (1, 99, 1), 20, {"head_dim": 128, "page": 64, "heads": 1, "kv_heads": 1}),
    ],
)
def test_decode(
    element: Element, lengths: list[int], parts: tuple[int, int, int], window: int | None, shape: dict[str, int]
) -> None:
    case = problem(element, lengths, **shape)
    bias = torch.randn(case.pool.shape[1], case.fmt.head_dim)
    out = torch.full_like(case.query, float("nan"))
    launch.launch_decode(
        on_host, case.query, case.pool, case.fmt, case.page_table, case.lengths, SCALING, window,
        launch.Biases(value=bias), out, processors=1, shared_limit=LARGE, parts=launch.Parts(*parts),
    )  # fmt: skip
    assert relative_error(out, case.expected(SCALING, window, None, bias)) < TOLERANCE


@pytest.mark.parametrize("chunks", [1, 3, 40, 4096])
@pytest.mark.parametrize("places", [1, 8, 500, 5000])
def test_parts_hold_the_longest_sequence(places: int, chunks: int) -> None:
    wanted, longest, most = launch.parts_for(places, chunks, 528, 32)
    assert 1 <= wanted <= most <= launch.MOST_PARTS
    assert most * longest >= chunks
    assert wanted == 1 or places * wanted <= 528


@emulates
@pytest.mark.parametrize(
    ("element", "lengths", "queries", "window", "shape"),
    [
        ("int4", [33, 0, 1, 70], [20, 0, 1, 30], 25, {"heads": 6, "kv_heads": 2, "page": 32}),
        ("fp8", [20, 90], [20, 3], None, {"heads": 7, "kv_heads": 1, "head_dim": 96}),
        ("bf16", [40, 50], [9, 50], 25, {"page": 64}),
    ],
)
def test_prefill(
    element: Element, lengths: list[int], queries: list[int], window: int | None, shape: dict[str, int]
) -> None:
    case = problem(element, lengths, queries=queries, **shape)
    bias = torch.randn(case.pool.shape[1], case.fmt.head_dim)
    out = torch.full_like(case.query, float("nan"))
    launch.launch_prefill(
        on_host, case.query, case.pool, case.fmt, case.page_table, case.starts, case.lengths, SCALING, window,
        launch.Biases(value=bias), out, shared_limit=LARGE,
    )  # fmt: skip
    assert relative_error(out, case.expected(SCALING, window, None, bias)) < TOLERANCE


@emulates
@pytest.mark.parametrize("queries", [None, [9, 0, 30]])
@pytest.mark.parametrize(("head_dim", "hadamard"), [(64, False), (96, True)])
def test_key_biases_come_back(queries: list[int] | None, head_dim: int, hadamard: bool) -> None:
    """From rotations whose tables carry a factor, as those of some families do."""
    case = problem("int4", [40, 1, 75], queries=queries, head_dim=head_dim, page=32, kv_heads=2)
    key_bias, value_bias = torch.randn(2, head_dim) * 3, torch.randn(2, head_dim)
    cos, sin = (1.2 * table for table in rope_tables(75, head_dim))
    turned = reference.rotate(key_bias.expand(75, 2, head_dim), cos, sin)
    biases = launch.Biases(key_bias, value_bias, cos, sin, hadamard)
    out = torch.full_like(case.query, float("nan"))
    if queries is None:
        launch.launch_decode(
            on_host, case.query, case.pool, case.fmt, case.page_table, case.lengths, SCALING, None, biases, out,
            processors=1, shared_limit=LARGE, parts=launch.Parts(1, 99, 1),
        )  # fmt: skip
    else:
        launch.launch_prefill(
            on_host, case.query, case.pool, case.fmt, case.page_table, case.starts, case.lengths, SCALING, None,
            biases, out, shared_limit=LARGE,
        )  # fmt: skip
    turned = reference.hadamard_heads(turned) if hadamard else turned
    assert relative_error(out, case.expected(SCALING, None, turned, value_bias)) < TOLERANCE


@emulates
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize(
    ("head_dim", "page", "hadamard", "rotate_keys", "centered", "dtype"),
    [
        (96, 32, True, True, True, torch.float16),
        (128, 64, True, True, False, torch.bfloat16),
        (64, 16, False, True, True, torch.bfloat16),
        (64, 16, False, False, False, torch.float32),
    ],
)
def test_append_is_the_reference_bit_for_bit(
    element: Element, head_dim: int, page: int, hadamard: bool, rotate_keys: bool, centered: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    fmt, tokens, heads, kv_heads = PageFormat(element, head_dim, page), 9, 6, 3
    sizes = torch.logspace(-2, 1.5, tokens)[:, None, None]
    merged = (torch.randn(tokens, heads + 2 * kv_heads, head_dim) * sizes).to(dtype)
    query, key, value = merged.split([heads, kv_heads, kv_heads], dim=1)
    angles = torch.rand(tokens, head_dim // 2) * 100
    slots = torch.tensor([0, 1, -1, page - 1, page, 3 * page - 1, 2 * page + 5, 7, -3])
    pools = [torch.full((4, kv_heads, fmt.bytes), 0xA5, dtype=torch.uint8) for _ in range(2)]
    center = torch.randn(kv_heads, head_dim) if centered else None
    arguments = (query, key, value, angles.cos(), angles.sin(), slots, hadamard, rotate_keys, center)
    expected = reference.append(pools[0], fmt, *arguments)
    rotated = torch.full(query.shape, float("nan"), dtype=dtype)
    launch.launch_append(on_host, pools[1], fmt, *arguments, rotated)
    assert torch.equal(rotated, expected)
    assert torch.equal(*pools)


@compiles
@pytest.mark.parametrize(
    ("arch", "element"),
    [(arch, element) for i, arch in enumerate(ARCHITECTURES) for element in ("int4", ELEMENTS[1 + i % 3])],
)
def test_kernels_compile_without_spills(arch: str, element: Element) -> None:
    """4 bits on every card, and another cache; head dimensions, pages and groups take turns."""
    place = ARCHITECTURES.index(arch) + ELEMENTS.index(element)
    head_dim, page = launch.HEAD_DIMS[place % 4], (16, 32, 64)[place % 3]
    fmt, limit = PageFormat(element, head_dim, page), launch.SHARED_LIMITS[arch]
    decode = launch.plan_decode(fmt, torch.bfloat16, 12 if place % 2 else 4, limit)
    prefill = launch.plan_prefill(fmt, torch.bfloat16, limit)
    assert max(decode.shared_bytes, prefill.shared_bytes) <= limit
    for name, defines in (
        (launch.DECODE, decode.defines),
        (launch.PREFILL, prefill.defines),
        (launch.APPEND, launch.append_defines(fmt, torch.bfloat16, True, True)),
    ):
        assert compile_source(f"{name}.cu", arch, defines).resources[name].spill_bytes == 0


@compiles
@disassembles
def test_a_nibble_costs_a_mask(tmp_path: Path) -> None:
    """No conversion from integers in the decode loop, and the copies are asynchronous ones."""
    plan = launch.plan_decode(PageFormat("int4", 128, 64), torch.bfloat16, 1, LARGE)
    listing = sass(compile_source(f"{launch.DECODE}.cu", "90a", plan.defines).cubin, tmp_path)
    assert "HMMA.16816.F32" in listing
    assert "LDGSTS.E.BYPASS" in listing
    assert "I2FP" not in listing  # plain I2F is part of a division of integers


def test_what_no_kernel_serves_is_named() -> None:
    fmt = PageFormat("int4", 128, 64)
    assert launch.why_not(fmt, torch.bfloat16) is None
    assert "160" in str(launch.why_not(PageFormat("int4", 160, 64), torch.bfloat16))
    assert "float32" in str(launch.why_not(fmt, torch.float32))
    assert "RoPE" in str(launch.why_not(fmt, torch.bfloat16, keys_rotated=False))
    assert "71" in str(launch.why_not(fmt, torch.bfloat16, group=71))


@emulates
@pytest.mark.parametrize(
    ("element", "lengths", "parts", "shape", "hadamard", "dtype"),
    [
        ("int4", [0, 1, 130, 64], (1, 99, 1), {"head_dim": 128, "page": 16}, True, torch.bfloat16),
        (
            "int4",
            [300, 33, 64],
            (3, 99, 3),
            {"head_dim": 64, "page": 64, "heads": 20, "kv_heads": 2},
            True,
            torch.float16,
        ),
        ("fp8", [40, 17], (2, 99, 2), {"head_dim": 96, "page": 32, "heads": 7, "kv_heads": 1}, False, torch.bfloat16),
        ("int8", [65], (1, 99, 1), {"head_dim": 256, "page": 32, "heads": 2, "kv_heads": 2}, True, torch.bfloat16),
        (
            "bf16",
            [70, 0, 17],
            (1, 99, 1),
            {"head_dim": 64, "page": 64, "heads": 20, "kv_heads": 1},
            False,
            torch.bfloat16,
        ),
    ],
)
def test_a_token_that_is_appended_on_the_way(
    element: Element,
    lengths: list[int],
    parts: tuple[int, int, int],
    shape: dict[str, int],
    hadamard: bool,
    dtype: torch.dtype,
) -> None:
    """One kernel gives, bit for bit, what append and decode give one after the other."""
    case = problem(element, lengths, dtype=dtype, **shape)
    (batch, heads, head_dim), kv_heads, page = case.query.shape, case.pool.shape[1], case.fmt.page
    merged = torch.randn(batch, heads + 2 * kv_heads, head_dim).to(dtype)
    query, key, value = merged.split([heads, kv_heads, kv_heads], dim=1)
    angles, center = torch.rand(batch, head_dim // 2) * 100, torch.randn(kv_heads, head_dim)
    slots = torch.tensor([
        int(case.page_table[b, (length - 1) // page]) * page + (length - 1) % page if length else -1
        for b, length in enumerate(lengths)
    ])  # fmt: skip
    split, together = case.pool.clone(), case.pool.clone()
    rotated, expected, out = (torch.full_like(case.query, float("nan")) for _ in range(3))
    tables = angles.cos(), angles.sin(), slots
    launch.launch_append(on_host, split, case.fmt, query, key, value, *tables, hadamard, True, center, rotated)
    common = (case.fmt, case.page_table, case.lengths, SCALING, None, launch.NO_BIASES)
    options = {"processors": 1, "shared_limit": LARGE, "parts": launch.Parts(*parts)}
    launch.launch_decode(on_host, rotated, split, *common, expected, **options)
    appended = launch.Appended(key, value, *tables, center, hadamard)
    launch.launch_decode(on_host, query, together, *common, out, **options, appended=appended)
    assert torch.equal(out, expected)
    assert torch.equal(together, split)
