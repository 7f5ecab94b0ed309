"""One token through a linear layer that stays in 16 bits, and what comes before it, in one kernel: cuda/gemv_w16.cu.

What kernels/gemv.py is for packed weights, for weights as the checkpoint has them. One torch operator,
`atom::gemv_w16`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atomcli.errors import UsageError
from atomcli.kernels import compiler, quantize
from atomcli.kernels.quantize_launch import HOPPER_SHARED_LIMIT, SHARED_LIMIT, Launchable, Prologue
from atomcli.kernels.tiles import OUTPUTS

SOURCE, ENTRY = "gemv_w16.cu", "gemv_w16"
ENABLED = True  # False leaves single tokens to torch


class Tile(NamedTuple):
    """How a kernel is cut: threads of a block, 16-byte loads of a lane in a piece, pieces in a warp's ring.

    `blocks` of them lie on a processor; `late`: the next kernel starts when the last pieces are asked for.
    """

    threads: int = 512
    loads: int = 2
    stages: int = 5  # 80 KB on their way to an SM; 113 KB of shared memory leave room for the next kernel's block
    blocks: int = 1
    late: bool = True


class Launch(NamedTuple):
    """How one problem is run: what is compiled in, the grid and the shared memory."""

    defines: dict[str, int | str]
    grid: int
    threads: int
    shared_bytes: int


Loader = Callable[[Launch], Launchable]


def why_not(weight: Tensor, arch: str, processors: int) -> str | None:
    """Why the kernel can't multiply a token by weight (N, K) on a card, or None where it can."""
    if not ENABLED:
        return "the kernel is switched off"
    if weight.dtype not in OUTPUTS:
        return f"the weights are {str(weight.dtype)[6:]}, not bfloat16 or float16"
    rows, channels = weight.shape
    if channels % 8 or not weight.is_contiguous() or weight.data_ptr() % 16:
        return f"rows of {channels} channels don't lie at multiples of 16 bytes"
    limit = HOPPER_SHARED_LIMIT if arch in ("90a", "100a") else SHARED_LIMIT
    if _shared_bytes(rows, channels, processors, gates(rows), Tile()) > limit:
        return f"a row of {channels} channels and the sums of {rows} do not fit into shared memory beside the weights"
    return None


def gates(rows: int) -> bool:
    """Whether the kernel can put out silu(gate) * up of a gate and ups of `rows` output channels together."""
    return rows % 2 == 0


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    prologue: Prologue = "plain",
    other: Tensor | None = None,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """y (1, N) of the row x (1, K) and weight (N, K), all bf16 or all fp16, and x + other of the prologue "add_norm".

    prologue, other, norm_weight, epsilon: what is done to x before, as in kernels/gemv.py. `gated`: the weight is a
    gate's and under it as many ups, y (1, N / 2) is silu(gate) * up. bias (N,) of the weight's dtype. Raises UsageError
    for more tokens or another dtype.
    """
    if x.shape[0] != 1 or x.dtype != weight.dtype or x.dtype not in OUTPUTS:
        raise UsageError(
            f"The kernel for one token takes bfloat16 or float16 (1, K) and weights alike, not {x.dtype} "
            f"{tuple(x.shape)} and {weight.dtype}."
        )
    y, total = torch.ops.atom.gemv_w16(x, other, norm_weight, weight, bias, prologue, epsilon, gated)
    return y, total


def plan(
    x: Tensor, other: Tensor | None, norm_weight: Tensor | None, rows: int, prologue: Prologue, gated: bool,
    processors: int, tile: Tile,
) -> Launch:  # fmt: skip
    """Blocks that are all there at once, each with about as many rows."""
    aligned = all(t.data_ptr() % 16 == 0 for t in (x, other, norm_weight) if t is not None)
    grid = min(processors * tile.blocks, rows // 2 if gated else rows)
    defines: dict[str, int | str] = {
        "INPUT": quantize.INPUTS[x.dtype],
        "PROLOGUE": prologue.upper(),
        "ALIGNED": int(aligned),
        "GATED": int(gated),
        "THREADS": tile.threads,
        "LOADS": tile.loads,
        "STAGES": tile.stages,
        "LATE": int(tile.late),
    }
    return Launch(defines, grid, tile.threads, _shared_bytes(rows, x.shape[1], grid, gated, tile))


def launch(
    load: Loader, x: Tensor, other: Tensor | None, norm_weight: Tensor | None, weight: Tensor, bias: Tensor | None,
    prologue: Prologue, epsilon: float, gated: bool, y: Tensor, total: Tensor, processors: int, tile: Tile,
) -> None:  # fmt: skip
    """Run the kernel that `load` gives."""
    rows, channels = weight.shape
    how = plan(x, other, norm_weight, rows, prologue, gated, processors, tile)
    load(how).launch(
        how.grid, how.threads, x, other, norm_weight, total if prologue == "add_norm" else None, weight, bias, y, rows,
        channels, float(epsilon), overlap=True,
    )  # fmt: skip


def _shared_bytes(rows: int, channels: int, blocks: int, gated: bool, tile: Tile) -> int:
    """Rings, the norm's sums, the staged row and the pieces' sums, by the same formula as in the source."""
    together = 2 if gated else 1
    own_rows = together * -(-rows // (together * blocks))
    pieces = -(-channels // (tile.loads * 256))
    return tile.threads // 32 * tile.stages * tile.loads * 512 + 32 * 4 + 2 * (channels + 8) + 4 * own_rows * pieces


# -------------------------------------------------------------------------------------------- operator


@torch.library.custom_op("atom::gemv_w16", mutates_args=(), device_types="cuda")
def _gemv_w16(
    x: Tensor, other: Tensor | None, norm_weight: Tensor | None, weight: Tensor, bias: Tensor | None, prologue: str,
    epsilon: float, gated: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    quantize.check(x, other, norm_weight, 8)
    y, total = outputs(x, weight, prologue, gated)
    launch(
        lambda how: compiler.load_kernel(SOURCE, ENTRY, x.device, how.defines, how.shared_bytes),
        x, other, norm_weight, weight, bias, prologue, epsilon, gated, y, total,  # type: ignore[arg-type]
        compiler.multiprocessors(x.device), Tile(),
    )  # fmt: skip
    return y, total


@_gemv_w16.register_fake
def _gemv_w16_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return outputs(x, rest[2], rest[4], rest[-1])


def outputs(x: Tensor, weight: Tensor, prologue: str, gated: bool = False) -> tuple[Tensor, Tensor]:
    """Room for y and for x + other, which is empty but after "add_norm"."""
    rows = weight.shape[0] // 2 if gated else weight.shape[0]
    return x.new_empty((1, rows)), x.new_empty(x.shape if prologue == "add_norm" else (0,))
