"""One token through a linear layer in one kernel: what comes before it, its quantization and the product.

cuda/gemv.cu computes what kernels/quantize.py and kernels/gemm.py compute in two kernels, to the last bit, from the
same packed weights. One torch operator, `atom::gemv`.
"""

from typing import Any

import torch
from torch import Tensor

from atomcli.errors import UsageError
from atomcli.formats.scheme import ActivationFormat, Scheme
from atomcli.kernels import compiler, quantize, quantize_launch
from atomcli.kernels.layouts import BLOCK, GemmWeight
from atomcli.kernels.quantize import KernelLayout
from atomcli.kernels.quantize_launch import Launch, Loader, Prologue
from atomcli.kernels.tiles import OUTPUTS

SOURCE, ENTRY = "gemv.cu", "gemv"
THREADS = 1024
SLICE = 16  # output channels that a warp works on at a time
STAGES = 3  # pieces of a warp's ring: 100 KB on their way to an SM
SHARED_LIMIT = 227 << 10


def why_not(weight: GemmWeight, processors: int) -> str | None:
    """Why the kernel can't multiply this weight, or None where it can."""
    rows, channels = weight.shape
    slices = _slices(rows, processors, gates(rows))
    if slices * SLICE > THREADS:
        return f"a block finishes at most {THREADS} output channels, not {slices * SLICE}"
    if _shared_bytes(weight, slices, channels) > SHARED_LIMIT:
        return f"a row of {channels} channels does not fit into shared memory beside the weights"
    return None


def linear(
    x: Tensor,
    weight: GemmWeight,
    scheme: Scheme,
    layout: KernelLayout,
    bias: Tensor | None = None,
    prologue: Prologue = "plain",
    other: Tensor | None = None,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """y (1, out_features) of the row x (1, in_features) bf16 or fp16, and x + other of the prologue "add_norm".

    `gated`: the weight is a gate's and under it as many ups, y (1, out_features / 2) is silu(gate) * up; `gates` says
    where that is possible.

    prologue, other, norm_weight, epsilon: what is done to x before it is quantized, as in kernels/quantize.py. bias
    (out_features,) fp32. Raises UsageError for more tokens or another dtype.
    """
    if x.shape[0] != 1 or x.dtype not in OUTPUTS:
        raise UsageError(f"The kernel for one token takes bfloat16 or float16 (1, K), not {x.dtype} {tuple(x.shape)}.")
    format = scheme.activations
    y, total = torch.ops.atom.gemv(
        x, other, norm_weight, layout.table, layout.body, layout.hadamard, prologue, format.element, format.group,
        format.scale, format.symmetric, format.clip, epsilon, weight.body, weight.outliers, weight.row_scale,
        weight.outlier_row_scale, bias, weight.bits, weight.shape[0], gated,
    )  # fmt: skip
    return y, total


def gates(rows: int) -> bool:
    """Whether the kernel can put out silu(gate) * up of a gate and ups of `rows` output channels together."""
    return rows % (2 * SLICE) == 0


def plan(
    x: Tensor, other: Tensor | None, norm_weight: Tensor | None, table: Tensor | None, body: int, hadamard: bool,
    prologue: Prologue, format: ActivationFormat, bits: int, gated: bool = False,
) -> Launch:  # fmt: skip
    """What is compiled in: the quantization of a single row by one block of THREADS threads."""
    channels = x.shape[1]
    rows = [t for t in (x, other, norm_weight) if t is not None]
    aligned = channels % 8 == 0 and body % 8 == 0 and all(t.data_ptr() % 16 == 0 for t in rows)
    indices = None if table is None else table.dtype
    task = quantize_launch.Task(channels, body, x.dtype, format, prologue, "s8", indices, hadamard, aligned)
    how = quantize_launch.plan(1, task)
    own = {"THREADS": THREADS, "WEIGHT_BITS": bits, "STAGES": STAGES, "GATED": int(gated)}
    return how._replace(defines=compiler.Defines({**how.defines, **own}), threads=THREADS)


def launch(
    load: Loader, x: Tensor, other: Tensor | None, norm_weight: Tensor | None, table: Tensor | None, body: int,
    hadamard: bool, prologue: Prologue, format: ActivationFormat, epsilon: float, weight: GemmWeight,
    bias: Tensor | None, y: Tensor, total: Tensor, processors: int, gated: bool = False,
) -> None:  # fmt: skip
    """Run the kernel that `load` gives: a block on each processor, or on as many as there are slices."""
    rows, channels = weight.shape
    grid = min(processors, _slices(rows, 1, gated))
    how = plan(x, other, norm_weight, table, body, hadamard, prologue, format, weight.bits, gated)
    load(how._replace(shared_bytes=_shared_bytes(weight, _slices(rows, grid, gated), channels))).launch(
        grid, THREADS, x, other, norm_weight, table, total if prologue == "add_norm" else None, weight.body,
        weight.outliers, weight.row_scale, weight.outlier_row_scale, bias, y, rows, channels, body,
        float(format.clip), *quantize_launch.factors(format), float(epsilon), 0, overlap=True,
    )  # fmt: skip


def _slices(rows: int, blocks: int, gated: bool) -> int:
    """Slices of the block that has the most; a gate's and its ups' go to the same."""
    together = 2 if gated else 1
    return together * -(-rows // (together * SLICE * blocks))


def _shared_bytes(weight: GemmWeight, slices: int, channels: int) -> int:
    """Rings, codes, sums and the staged row, by the same formula as in the source."""
    piece = 1024 + (SLICE if weight.bits == 4 else 0)
    blocks = weight.body.shape[1] + (weight.outliers is not None)
    row = quantize_launch.SHARED_HEADER + 16 + 2 * (channels + 1)
    return THREADS // 32 * STAGES * piece + blocks * BLOCK + 2 * slices * SLICE * 4 + row


# -------------------------------------------------------------------------------------------- operator


@torch.library.custom_op("atom::gemv", mutates_args=(), device_types="cuda")
def _gemv(
    x: Tensor, other: Tensor | None, norm_weight: Tensor | None, table: Tensor | None, body: int, hadamard: bool,
    prologue: str, element: str, group: int | None, scale: str, symmetric: bool, clip: float, epsilon: float,
    weights: Tensor, outliers: Tensor | None, row_scale: Tensor, outlier_row_scale: Tensor | None,
    bias: Tensor | None, bits: int, rows: int, gated: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    quantize.check(x, other, norm_weight, 8)
    format = ActivationFormat(element, group, scale, symmetric, clip)  # type: ignore[arg-type]
    y, total = outputs(x, prologue, rows, gated)
    weight = GemmWeight(
        "w4" if bits == 4 else "w8", (rows, x.shape[1]), weights, row_scale, outliers, outlier_row_scale
    )
    launch(
        lambda how: compiler.load_kernel(SOURCE, ENTRY, x.device, how.defines, how.shared_bytes),
        x, other, norm_weight, table, body, hadamard, prologue, format, epsilon, weight, bias, y, total,  # type: ignore[arg-type]
        compiler.multiprocessors(x.device), gated,
    )  # fmt: skip
    return y, total


@_gemv.register_fake
def _gemv_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return outputs(x, rest[5], rest[-2], rest[-1])


def outputs(x: Tensor, prologue: str, rows: int, gated: bool = False) -> tuple[Tensor, Tensor]:
    """Room for y and for x + other, which is empty but after "add_norm"."""
    return x.new_empty((1, rows // 2 if gated else rows)), x.new_empty(x.shape if prologue == "add_norm" else (0,))
