"""How prefill attention runs on warpgroup MMAs (sm_90a): whom it serves, what is compiled in, and the launch."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from atomcli.kernels.attention_launch import LOG2_E, NO_WINDOW, QUERIES, Biases, Loader, dense_heads, scratch
from atomcli.kernels.compiler import Defines
from atomcli.kernels.pages import PageFormat

PREFILL_SM90A = "attention_prefill_sm90a"  # cuda/<name>.cu, and the entry in it
ROWS = 128  # pairs of a query and a head that a block serves
THREADS = 512  # of a block
TILE = 64  # tokens
MOST_STAGES = 4


def why_not(arch: str, group: int, biases: Biases, scaling: float) -> str | None:
    """Why the kernel on warp MMAs prefills instead, or None; `group` query heads share a KV head."""
    if arch != "90a":
        return f"warpgroup MMAs are sm_90a's, not sm_{arch}'s"
    if biases.key is not None:
        return "keys stored without their projection's bias get it back in the kernel on warp MMAs alone"
    if group > ROWS:
        return f"at most {ROWS} query heads can share a KV head, not {group}"
    if not scaling > 0:
        return f"scores are scaled by a positive number, not by {scaling}"
    return None


class WarpgroupPlan(NamedTuple):
    """One compiled kernel: its defines and shared memory."""

    defines: Defines
    shared_bytes: int


@functools.cache
def plan_warpgroups(fmt: PageFormat, dtype: torch.dtype, shared_limit: int) -> WarpgroupPlan:
    """The kernel for these pages, with as many stages of keys and values as fit beside queries and results."""
    row = fmt.head_dim * 2
    others = 1024 + ROWS * row + (ROWS * 80 if fmt.head_dim <= 128 else 0)
    stages = min(MOST_STAGES, (shared_limit - others) // (2 * TILE * row))
    defines: dict[str, int | str] = {
        "ELEMENT": fmt.element.upper(),
        "HEAD_DIM": fmt.head_dim,
        "PAGE": fmt.page,
        "QUERY": QUERIES[dtype],
        "STAGES": stages,
    }
    return WarpgroupPlan(Defines(defines), others + stages * 2 * TILE * row)


def launch_warpgroups(
    load: Loader, query: Tensor, pool: Tensor, fmt: PageFormat, page_table: Tensor, query_starts: Tensor,
    lengths: Tensor, scaling: float, window: int | None, biases: Biases, out: Tensor, *, processors: int,
    shared_limit: int,
) -> None:  # fmt: skip
    """Enqueue the kernel: a block for each processor, which takes work until there is none."""
    query = dense_heads(query)
    (tokens, heads, _), kv_heads, sequences = query.shape, pool.shape[1], len(lengths)
    plan = plan_warpgroups(fmt, query.dtype, shared_limit)
    blocks = -(-tokens // (ROWS // (heads // kv_heads))) + min(sequences, tokens) - 1
    _, counters = scratch(query.device, 1, 2)
    load(PREFILL_SM90A, plan.defines, plan.shared_bytes).launch(
        min(processors, blocks * kv_heads), THREADS, query, pool, page_table, query_starts, lengths, biases.value, out,
        counters, sequences, heads, kv_heads, page_table.stride(0), query.stride(0),
        NO_WINDOW if window is None else window, blocks, scaling * LOG2_E, overlap=True,
    )  # fmt: skip
