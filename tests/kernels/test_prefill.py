"""Prefill attention on warpgroup MMAs: what it computes, on the emulator, and what the assembler makes of it."""

import re
from pathlib import Path

import pytest
import torch

from atomcli.kernels import prefill_launch as launch
from atomcli.kernels.attention_launch import HEAD_DIMS, SHARED_LIMITS, Biases
from atomcli.kernels.compiler import compile_source
from atomcli.kernels.pages import Element, PageFormat
from tests.kernels.attention_cases import problem, relative_error
from tests.kernels.disassembly import compiles, disassembles, sass
from tests.kernels.emulator import COMPILER, HostKernel

emulates = pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")

ELEMENTS: tuple[Element, ...] = ("int4", "int8", "fp8", "bf16")
SCALING = 0.1
LIMIT = SHARED_LIMITS["90a"]
TOLERANCE = 3e-3  # of results in bf16, whose rounding is 1.7e-3


def on_host(name: str, defines: dict[str, int | str], shared_bytes: int) -> HostKernel:
    assert shared_bytes <= LIMIT
    return HostKernel(f"{name}.cu", name, defines)


@emulates
@pytest.mark.parametrize(
    ("element", "lengths", "queries", "window", "shape"),
    [
        ("int4", [300, 0, 1, 17, 90], [300, 0, 1, 5, 0], None, {"heads": 4, "head_dim": 128, "page": 16}),
        ("int4", [200, 150], [90, 150], 40, {"heads": 2, "kv_heads": 1, "head_dim": 128, "page": 32}),
        ("int4", [140, 33], [140, 33], 30, {"heads": 3, "kv_heads": 1, "head_dim": 96, "page": 16}),
        ("int8", [140, 33], [140, 3], None, {"heads": 5, "kv_heads": 1, "head_dim": 64, "page": 64}),
        ("fp8", [140, 33], [70, 33], 70, {"heads": 40, "kv_heads": 1, "head_dim": 256, "page": 32}),
        ("bf16", [140, 33], [40, 33], None, {"heads": 2, "kv_heads": 2, "head_dim": 128, "page": 64}),
    ],
)
def test_prefill(
    element: Element, lengths: list[int], queries: list[int], window: int | None, shape: dict[str, int]
) -> None:
    """More work than blocks, tiles that only some rows see, and rows that the last block has too many."""
    case = problem(element, lengths, queries=queries, **shape)
    bias = torch.randn(case.pool.shape[1], case.fmt.head_dim)
    out = torch.full_like(case.query, float("nan"))
    launch.launch_warpgroups(
        on_host, case.query, case.pool, case.fmt, case.page_table, case.starts, case.lengths, SCALING, window,
        Biases(value=bias), out, processors=2, shared_limit=LIMIT,
    )  # fmt: skip
    assert relative_error(out, case.expected(SCALING, window, None, bias)) < TOLERANCE


@compiles
@disassembles
@pytest.mark.parametrize("element", ELEMENTS)
def test_kernels_keep_their_operands_in_registers(element: Element, tmp_path: Path) -> None:
    """Warpgroup MMAs, not serialized; no spills up to 128 channels; no register of the queries is one of the weights.

    The assembler has given both the same registers where a loop needed more than there are, and warned of nothing.
    """
    place = ELEMENTS.index(element)
    for head_dim in HEAD_DIMS[place % 2 :: 2]:
        fmt = PageFormat(element, head_dim, (16, 32, 64)[place % 3])
        plan = launch.plan_warpgroups(fmt, torch.bfloat16, LIMIT)
        assert plan.shared_bytes <= LIMIT
        program = compile_source(f"{launch.PREFILL_SM90A}.cu", "90a", plan.defines)
        assert head_dim == 256 or program.resources[launch.PREFILL_SM90A].spill_bytes == 0
        products = re.findall(r"HGMMA\.\S+ R\d+, (R\d+), gdesc\[UR\d+\](\.tnspB)?", sass(program.cubin, tmp_path))
        queries, weights = ({register for register, t in products if bool(t) == transposed} for transposed in (0, 1))
        assert weights
        assert not queries & weights


def test_whom_warpgroups_do_not_serve_is_told() -> None:
    assert launch.why_not("90a", 8, Biases(), SCALING) is None
    assert "sm_90a" in str(launch.why_not("89", 8, Biases(), SCALING))
    assert "bias" in str(launch.why_not("90a", 8, Biases(key=torch.zeros(1, 64)), SCALING))
    assert "positive" in str(launch.why_not("90a", 8, Biases(), 0.0))
    assert "129" in str(launch.why_not("90a", 129, Biases(), SCALING))
