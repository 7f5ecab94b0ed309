"""How a layer's input is quantized, by cuda/quantize_activations.cu or cuda/quantize_pairs.cu: plan and launch."""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from atomcli.formats.scheme import ActivationFormat
from atomcli.kernels.compiler import Defines, architecture, multiprocessors
from atomcli.kernels.layouts import BLOCK

MAX_THREADS = 1024
SHARED_HEADER = 384  # struct Shared of quantize_rows.cuh
PAIRS_HEADER = 768  # struct Shared of quantize_pairs.cu
SHARED_LIMIT = 99 << 10  # of one block, on the smallest card served (sm_86, sm_89)
HOPPER_SHARED_LIMIT = 227 << 10
FEW_TOKENS = 264  # below, latency decides: 4 channels per lane. Two blocks of an H100's 132 SMs
SPLIT_TOKENS = 8  # up to so many, a row of more than 64 k-blocks is split among the blocks of a cluster
SPLIT_BLOCKS = 16  # k-blocks that one of them takes, unless that would be more than 8
INPUTS = {torch.float32: "float", torch.float16: "fp16", torch.bfloat16: "bf16"}

Prologue = Literal["plain", "norm", "add_norm", "silu_mul"]
Container = Literal["s8", "e4m3", "e4m3_scaled", "nibble", "f16"]


class Launch(NamedTuple):
    """How one problem is run: the kernel, of cuda/<kernel>.cu, what is compiled in, the grid and the shared memory."""

    kernel: Literal["quantize_activations", "quantize_pairs"]
    defines: Defines
    threads: int
    shared_bytes: int
    cluster: int = 1  # blocks for one token
    resident: int = 1  # blocks that an SM holds; pairs of tokens are dealt to so many


class Launchable(Protocol):
    """A loaded kernel: compiler.Kernel, or its stand-in on the host."""

    def launch(self, grid: int, block: int, *arguments: Tensor | int | float | None, overlap: bool = False) -> None:
        """Enqueue one launch."""
        ...


class Loader(Protocol):
    """Finds the compiled kernel of a plan."""

    def __call__(self, how: Launch) -> Launchable: ...


class Task(NamedTuple):
    """What becomes of a row: of `channels` in `dtype` the first `body` get the format's codes, the others INT8 ones.

    table: the dtype of the permutation and signs, None without any. aligned: whether rows can be read 16 bytes at a
    time. hopper: whether the card is one on which splitting rows was measured.
    """

    channels: int
    body: int
    dtype: torch.dtype
    format: ActivationFormat
    prologue: Prologue
    container: Container
    table: torch.dtype | None
    hadamard: bool
    aligned: bool
    hopper: bool = False

    @property
    def blocks(self) -> int:
        """k-blocks of the body and of the outliers."""
        return -(-self.body // BLOCK) + -(-(self.channels - self.body) // BLOCK)


def plan(tokens: int, task: Task) -> Launch:
    """The kernel, its compile-time parameters and launch shape.

    Many tokens go two by two through blocks that stay on their SM, where shared memory and registers hold both. Else
    a block takes one token, and each lane keeps 4 or 16 channels of up to 8 k-blocks in registers; on `hopper`, where
    this was measured, a few long rows are split among the blocks of a cluster.
    """
    return _plan(next((most for most in (SPLIT_TOKENS, FEW_TOKENS) if tokens <= most), FEW_TOKENS + 1), task)


@functools.cache
def _plan(tokens: int, task: Task) -> Launch:
    """The plan of every number of tokens up to the next limit: a launch can't wait for it to be made again."""
    blocks, format = task.blocks, task.format
    channels_per_lane = 4 if tokens <= FEW_TOKENS and blocks <= 8 * MAX_THREADS // 32 else 16
    scales = {
        "row": "PER_TOKEN",
        "fp16": "FP16_GROUP",
        "e8m0": "E8M0_GROUP",
        "e4m3": "E4M3_GROUP",
        "two_level": "TWO_LEVEL",
    }
    defines: dict[str, int | str] = {
        "INPUT": INPUTS[task.dtype],
        "INDEX": "unsigned" if task.table == torch.uint32 else "unsigned short",
        "PROLOGUE": task.prologue.upper(),
        "SCALES": scales[format.scale] + ("" if format.symmetric else "_ASYMMETRIC"),
        "ELEMENT": format.element.upper(),
        "CONTAINER": task.container.upper(),
        "TABLE": int(task.table is not None),
        "HADAMARD": int(task.hadamard),
        "ALIGNED": int(task.aligned),
        "GROUP": format.group or BLOCK,
        "CLIPS": int(format.clip < 1),
        "ADAPTIVE": int(format.adaptive),
        "CHANNELS": channels_per_lane,
    }
    if channels_per_lane == 16 and task.aligned and task.dtype.itemsize == 2:
        how = _plan_pairs(task, defines)
        if how is not None:
            return how
    split = task.hopper and channels_per_lane == 4 and tokens <= SPLIT_TOKENS and blocks > 64
    cluster = next(n for n in (1, 2, 4, 8) if n * SPLIT_BLOCKS >= blocks or n == 8) if split else 1
    own = -(-blocks // cluster)
    lanes = BLOCK // channels_per_lane
    slots = MAX_THREADS // lanes
    # A single token is done soonest by the whole SM; of many, smaller blocks hide each other's waits.
    if channels_per_lane == 4:
        per_lane = next(n for n in (1, 2, 4, 8) if n * slots >= own or n == 8)
    else:
        per_lane = max(1, min(2, -(-blocks // 64)))
    wanted = -(-own // per_lane) * lanes
    if cluster > 1:  # each of its blocks stages the whole row: 16 bytes a thread, if it can
        wanted = max(wanted, task.channels * task.dtype.itemsize // 16)
    threads = min(MAX_THREADS, -(-wanted // 32) * 32)
    slots = threads // lanes if cluster == 1 else -(-own // per_lane)
    defines |= {
        "CLUSTER": cluster,
        "BLOCKS": per_lane,
        "SLOTS": slots,
        "PASSES": int(per_lane * slots < own),
        "THREADS": threads,
    }
    shared_bytes = SHARED_HEADER + (task.channels + 1) * task.dtype.itemsize
    return Launch("quantize_activations", Defines(defines), threads, shared_bytes, cluster=cluster)


def _plan_pairs(task: Task, defines: dict[str, int | str]) -> Launch | None:
    """Two tokens at a time, by as many blocks as an SM holds; None if it can't hold one."""
    threads = -(-task.blocks * (BLOCK // 16) // 32) * 32
    limit = HOPPER_SHARED_LIMIT if task.hopper else SHARED_LIMIT
    inputs = 2 if task.prologue in ("add_norm", "silu_mul") else 1
    staged_bytes = 2 * (2 * task.channels + 16)  # two rows interleaved, in two planes

    # The header, where lanes' channels lie, the staged rows, and the rows on their way: of one pair, for a second one
    # took 2 to 10 % longer at nearly every shape.
    shared_bytes = PAIRS_HEADER + 32 * threads + staged_bytes + inputs * 4 * task.channels
    registers = 80 if task.prologue in ("norm", "add_norm") else 64
    resident = min(8, 65536 // (threads * registers), limit // (shared_bytes + 1024))
    if resident == 0 or threads > MAX_THREADS or staged_bytes > 1 << 16:  # channels' places have 16 bits
        return None
    own = {"THREADS": threads, "RESIDENT": resident, "ROUNDS": 1}
    return Launch("quantize_pairs", Defines(defines | own), threads, shared_bytes, resident=resident)


def launch(
    load: Loader,
    x: Tensor,
    other: Tensor | None,
    weight: Tensor | None,
    table: Tensor | None,
    hadamard: bool,
    prologue: Prologue,
    format: ActivationFormat,
    container: Container,
    epsilon: float,
    unit_offset: bool,
    results: Sequence[Tensor],
    body: int,
    want_row: bool,
) -> None:
    """Run the kernel that `load` gives for the plan; `results` are the operator's outputs, allocated."""
    tokens, channels = x.shape
    codes, outlier_codes, token_scale, outlier_scale, group_scales, total, row = results
    rows = [t for t in (x, other, weight) if t is not None]
    per_access = 16 // x.element_size()
    aligned = channels % per_access == 0 and body % per_access == 0 and all(t.data_ptr() % 16 == 0 for t in rows)
    aligned = aligned and all(t.stride(0) % per_access == 0 for t in rows if t.dim() == 2)
    indices = None if table is None else table.dtype
    hopper = x.is_cuda and architecture(x.device) == "90a"
    task = Task(channels, body, x.dtype, format, prologue, container, indices, hadamard, aligned, hopper)
    how = plan(tokens, task)
    padded = token_scale.shape[0]
    grid = padded * how.cluster
    if how.kernel == "quantize_pairs":
        grid = min(padded // 2, how.resident * (multiprocessors(x.device) if x.is_cuda else 1))
    if container != "nibble":
        outlier_codes = codes[-(-body // BLOCK) :]
    load(how).launch(
        grid, how.threads, x, other, weight, table, total, row if want_row else None,
        codes, outlier_codes, token_scale, outlier_scale, group_scales, tokens, padded, channels, body, x.stride(0),
        0 if other is None else other.stride(0), float(format.clip), *factors(format), float(epsilon),
        int(unit_offset), overlap=True,
    )  # fmt: skip


def factors(format: ActivationFormat) -> tuple[float, float]:
    """What turns an absolute maximum into the token's scale and into the group's scale, where the format has them."""
    if format.scale == "two_level":
        return format.clip / 105, format.clip / 7
    return format.clip / format.grid.high, format.clip / format.grid.high
