"""Quantizing a layer's input on the GPU: prologue, layout transform, codes and scales in one kernel per token row.

The rule is formats/activations.py; cuda/quantize_activations.cu reproduces its codes bit for bit, and so does
cuda/quantize_pairs.cu for many tokens. Everything is one torch operator, `atom::quantize_activations`, so torch.compile
and CUDA graphs can hold it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from atomcli.errors import UnsupportedError
from atomcli.formats.groups import group_count
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import ActivationFormat, Scheme
from atomcli.kernels.compiler import load_kernel, multiprocessors

BLOCK = 128  # channels of a k-block
MAX_THREADS = 1024
SHARED_HEADER = 384  # struct Shared of quantize_rows.cuh
PAIRS_HEADER = 768  # struct Shared of quantize_pairs.cu
SHARED_LIMIT = 99 << 10  # of one block, on the smallest card served (sm_86, sm_89)
HOPPER_SHARED_LIMIT = 227 << 10
FEW_TOKENS = 264  # below, latency decides: 4 channels per lane. Two blocks of an H100's 132 SMs
SPLIT_TOKENS = 8  # up to so many, a row of more than 64 k-blocks is split among the blocks of a cluster
SPLIT_BLOCKS = 16  # k-blocks that one of them takes, unless that would be more than 8
INPUTS = {torch.float32: "float", torch.float16: "fp16", torch.bfloat16: "bf16"}
GROUP_SCALE_DTYPES = {"fp16": torch.float16, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}

Prologue = Literal["plain", "norm", "add_norm", "silu_mul"]
Container = Literal["s8", "e4m3", "e4m3_scaled", "nibble", "f16"]


class Operand(NamedTuple):
    """What the GEMM reads: T tokens padded to T_pad, channels cut into k-blocks of 128, body first, outliers after.

    codes: uint8 (k-blocks, T_pad, 128), 16-byte chunks of a row swizzled by its number. Nibbles: (body k-blocks, T_pad,
    64), and the outliers apart, in outlier_codes (outlier k-blocks, T_pad, 128), which is empty otherwise.
    The container "e4m3_scaled" holds E2M1 codes times the power of two of their group, relative to the token's largest,
    "f16" E2M1 codes times their E4M3 scale, or what is not quantized, in units of a power of two: fp16 numbers, 64 to a
    row, (2 k-blocks, T_pad, 128). token_scale, outlier_scale: fp32 (T_pad,). group_scales: (G_pad, T_pad) as stored,
    G_pad groups of whole k-blocks; beside nibbles and e4m3 bytes (k-blocks, T_pad, groups of a k-block), for the
    latter the fp32 values that a GEMM promotes with; empty where the codes hold them, or the format has none. Padding
    rows are zero.
    """

    codes: Tensor
    outlier_codes: Tensor
    token_scale: Tensor
    outlier_scale: Tensor
    group_scales: Tensor


@dataclass(frozen=True)
class KernelLayout:
    """An InputLayout as the kernel takes it.

    `table` (k-blocks * 128,) names the source channel of each operand channel, `in_features` for padding, with the sign
    in the top bit; None where channels keep their order and sign.
    """

    in_features: int
    body: int
    hadamard: bool
    table: Tensor | None

    @property
    def body_blocks(self) -> int:
        """Number of k-blocks of the body."""
        return -(-self.body // BLOCK)

    @property
    def blocks(self) -> int:
        """Number of k-blocks in all."""
        return self.body_blocks + -(-(self.in_features - self.body) // BLOCK)


def prepare_layout(layout: InputLayout, device: torch.device | str) -> KernelLayout:
    """The layout as the kernel reads it, on `device`; made once per layer."""
    if layout.hadamard and layout.group != BLOCK:
        raise UnsupportedError(f"The quantization kernels rotate blocks of {BLOCK} channels, not of {layout.group}.")
    plain = KernelLayout(layout.in_features, layout.body, layout.hadamard, None)
    if layout.permutation is None and layout.signs is None:
        return plain
    channels = layout.in_features
    dtype, sign_bit = (torch.uint16, 1 << 15) if channels < 1 << 15 else (torch.uint32, 1 << 31)
    order = torch.arange(channels) if layout.permutation is None else layout.permutation.cpu().long()
    if layout.signs is not None:
        order = order + sign_bit * (layout.signs.cpu() < 0)
    table = torch.full((plain.blocks * BLOCK,), channels)
    table[: layout.body] = order[: layout.body]
    start = plain.body_blocks * BLOCK
    table[start : start + layout.outliers] = order[layout.body :]
    return KernelLayout(layout.in_features, layout.body, layout.hadamard, table.to(dtype).to(device))


def quantize(
    x: Tensor,
    scheme: Scheme,
    layout: KernelLayout,
    container: Container = "s8",
    row_multiple: int = 8,
) -> Operand:
    """Quantize x (T, in_features) fp32, fp16 or bf16; token rows are padded to a multiple of `row_multiple`."""
    return Operand(*_call(x, None, None, scheme, layout, "plain", container, row_multiple)[:5])


def norm_quantize(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    scheme: Scheme,
    layout: KernelLayout,
    residual: Tensor | None = None,
    unit_offset: bool = False,
    want_normed: bool = False,
    container: Container = "s8",
    row_multiple: int = 8,
) -> tuple[Operand, Tensor, Tensor | None]:
    """RMSNorm of x (T, K), or of x + residual, then quantize.

    Also returns the sum (x itself without a residual), and the normed rows if wanted.

    weight (K,) in x's dtype. Rounds where transformers' RMSNorm does; `unit_offset` is Gemma's (1 + weight) in fp32.
    """
    prologue: Prologue = "norm" if residual is None else "add_norm"
    results = _call(
        x, residual, weight, scheme, layout, prologue, container, row_multiple, epsilon, unit_offset, want_normed
    )
    total, normed = results[5:]
    return Operand(*results[:5]), (x if residual is None else total), (normed if want_normed else None)


def silu_mul_quantize(
    gate: Tensor,
    up: Tensor,
    scheme: Scheme,
    layout: KernelLayout,
    container: Container = "s8",
    row_multiple: int = 8,
) -> Operand:
    """Quantize silu(gate) * up, both (T, K); they may be the two halves of one tensor's rows."""
    return Operand(*_call(gate, up, None, scheme, layout, "silu_mul", container, row_multiple)[:5])


def why_not(scheme: Scheme, in_features: int) -> str | None:
    """The reason why the kernels can't quantize inputs of this scheme, or None if they can."""
    activations = scheme.activations
    if activations.element == "float" and scheme.outliers:
        return "outlier channels are INT8, and the scheme keeps activations in 16 bits"
    if activations.group is not None and activations.group > BLOCK:
        return f"activation groups have at most {BLOCK} channels, the scheme has {activations.group}"
    if activations.element == "int8" and activations.scale != "row":
        return "INT8 activations have one scale per token"
    if SHARED_HEADER + 4 * (in_features + 1) > SHARED_LIMIT and SHARED_HEADER + 2 * (in_features + 1) > SHARED_LIMIT:
        return f"a row of {in_features} channels does not fit into shared memory"
    return None


def _call(
    x: Tensor,
    other: Tensor | None,
    weight: Tensor | None,
    scheme: Scheme,
    layout: KernelLayout,
    prologue: Prologue,
    container: Container,
    row_multiple: int,
    epsilon: float = 0.0,
    unit_offset: bool = False,
    want_row: bool = False,
) -> Sequence[Tensor]:
    reason = why_not(scheme, layout.in_features)
    if reason:
        raise UnsupportedError(f"Scheme {scheme.name} can't be quantized on the GPU: {reason}.")
    format = scheme.activations
    return torch.ops.atom.quantize_activations(
        x, other, weight, layout.table, layout.body, layout.hadamard, prologue, format.element, format.group,
        format.scale, format.symmetric, format.clip, format.adaptive, container, row_multiple, epsilon, unit_offset,
        want_row,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- launch


class Launch(NamedTuple):
    """How one problem is run: the kernel, of cuda/<kernel>.cu, what is compiled in, the grid and the shared memory."""

    kernel: Literal["quantize_activations", "quantize_pairs"]
    defines: dict[str, int | str]
    threads: int
    shared_bytes: int
    cluster: int = 1  # blocks for one token
    resident: int = 1  # blocks that an SM holds; pairs of tokens are dealt to so many


def plan(
    tokens: int,
    channels: int,
    body: int,
    dtype: torch.dtype,
    format: ActivationFormat,
    prologue: Prologue,
    container: Container,
    table: torch.dtype | None,
    hadamard: bool,
    aligned: bool,
    hopper: bool = False,
) -> Launch:
    """The kernel, its compile-time parameters and launch shape.

    Many tokens go two by two through blocks that stay on their SM, where shared memory and registers hold both. Else
    a block takes one token, and each lane keeps 4 or 16 channels of up to 8 k-blocks in registers; on `hopper`, where
    this was measured, a few long rows are split among the blocks of a cluster.
    """
    blocks = -(-body // BLOCK) + -(-(channels - body) // BLOCK)
    channels_per_lane = 4 if tokens <= FEW_TOKENS and blocks <= 8 * MAX_THREADS // 32 else 16
    scales = {
        "row": "PER_TOKEN",
        "fp16": "FP16_GROUP",
        "e8m0": "E8M0_GROUP",
        "e4m3": "E4M3_GROUP",
        "two_level": "TWO_LEVEL",
    }
    defines: dict[str, int | str] = {
        "INPUT": INPUTS[dtype],
        "INDEX": "unsigned" if table == torch.uint32 else "unsigned short",
        "PROLOGUE": prologue.upper(),
        "SCALES": scales[format.scale] + ("" if format.symmetric else "_ASYMMETRIC"),
        "ELEMENT": format.element.upper(),
        "CONTAINER": container.upper(),
        "TABLE": int(table is not None),
        "HADAMARD": int(hadamard),
        "ALIGNED": int(aligned),
        "GROUP": format.group or BLOCK,
        "CLIPS": int(format.clip < 1),
        "ADAPTIVE": int(format.adaptive),
        "CHANNELS": channels_per_lane,
    }
    if channels_per_lane == 16 and aligned and dtype.itemsize == 2:
        how = _plan_pairs(channels, blocks, prologue, defines, hopper)
        if how is not None:
            return how
    split = hopper and channels_per_lane == 4 and tokens <= SPLIT_TOKENS and blocks > 64
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
        wanted = max(wanted, channels * dtype.itemsize // 16)
    threads = min(MAX_THREADS, -(-wanted // 32) * 32)
    slots = threads // lanes if cluster == 1 else -(-own // per_lane)
    defines |= {
        "CLUSTER": cluster,
        "BLOCKS": per_lane,
        "SLOTS": slots,
        "PASSES": int(per_lane * slots < own),
        "THREADS": threads,
    }
    shared_bytes = SHARED_HEADER + (channels + 1) * dtype.itemsize
    return Launch("quantize_activations", defines, threads, shared_bytes, cluster=cluster)


def _plan_pairs(
    channels: int, blocks: int, prologue: Prologue, defines: dict[str, int | str], hopper: bool
) -> Launch | None:
    """Two tokens at a time, by as many blocks as an SM holds; None if it can't hold one."""
    threads = -(-blocks * (BLOCK // 16) // 32) * 32
    limit = HOPPER_SHARED_LIMIT if hopper else SHARED_LIMIT
    inputs = 2 if prologue in ("add_norm", "silu_mul") else 1
    staged_bytes = 2 * (2 * channels + 16)  # two rows interleaved, in two planes

    def shared_bytes(rounds: int) -> int:
        """The header, where lanes' channels lie, the staged rows, and the rows on their way."""
        return PAIRS_HEADER + 32 * threads + staged_bytes + rounds * inputs * 4 * channels

    registers = 80 if prologue in ("norm", "add_norm") else 64
    resident = min(8, 65536 // (threads * registers), limit // (shared_bytes(1) + 1024))
    if resident == 0 or threads > MAX_THREADS or staged_bytes > 1 << 16:  # channels' places have 16 bits
        return None
    rounds = 2 if resident * (shared_bytes(2) + 1024) <= limit else 1
    defines = defines | {"THREADS": threads, "RESIDENT": resident, "ROUNDS": rounds}
    return Launch("quantize_pairs", defines, threads, shared_bytes(rounds), resident=resident)


def launch(
    load: "Loader",
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
    how = plan(
        tokens,
        channels,
        body,
        x.dtype,
        format,
        prologue,
        container,
        None if table is None else table.dtype,
        hadamard,
        aligned,
        hopper=x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0),
    )
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


class Launchable(Protocol):
    """A loaded kernel: compiler.Kernel, or its stand-in on the host."""

    def launch(self, grid: int, block: int, *arguments: Tensor | int | float | None, overlap: bool = False) -> None:
        """Enqueue one launch."""
        ...


class Loader(Protocol):
    """Finds the compiled kernel of a plan."""

    def __call__(self, how: Launch) -> Launchable: ...


# -------------------------------------------------------------------------------------------- operator


def allocate(
    x: Tensor, body: int, format: ActivationFormat, prologue: str, container: str, row_multiple: int, want_row: bool
) -> tuple[Tensor, ...]:
    """The operator's outputs, uninitialised: the operand's five, x + residual, and the input before the transform."""
    tokens, channels = x.shape
    padded = -(-tokens // row_multiple) * row_multiple
    body_blocks, outlier_blocks = -(-body // BLOCK), -(-(channels - body) // BLOCK)
    has_groups = format.scale in GROUP_SCALE_DTYPES and container not in ("e4m3_scaled", "f16")
    groups = group_count(body_blocks * BLOCK, format.group) if has_groups else 0
    if container == "nibble":
        shapes = ((body_blocks, padded, BLOCK // 2), (outlier_blocks, padded, BLOCK))
    else:
        planes = 2 if container == "f16" else 1
        shapes = ((planes * body_blocks + outlier_blocks, padded, BLOCK), (0, padded, BLOCK))
    return (
        *(x.new_empty(shape, dtype=torch.uint8) for shape in shapes),
        x.new_empty((padded,), dtype=torch.float32),
        x.new_empty((padded,), dtype=torch.float32),
        x.new_empty(
            (body_blocks, padded, groups // max(body_blocks, 1)) if container != "s8" else (groups, padded),
            dtype=torch.float32 if container == "e4m3" else GROUP_SCALE_DTYPES.get(format.scale, torch.float16),
        ),
        x.new_empty(x.shape if prologue == "add_norm" else (0,)),
        x.new_empty(x.shape if want_row else (0,)),
    )


@torch.library.custom_op("atom::quantize_activations", mutates_args=(), device_types="cuda")
def _quantize_activations(
    x: Tensor,
    other: Tensor | None,
    weight: Tensor | None,
    table: Tensor | None,
    body: int,
    hadamard: bool,
    prologue: str,
    element: str,
    group: int | None,
    scale: str,
    symmetric: bool,
    clip: float,
    adaptive: bool,
    container: str,
    row_multiple: int,
    epsilon: float,
    unit_offset: bool,
    want_row: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check(x, other, weight, row_multiple)
    format = ActivationFormat(element, group, scale, symmetric, clip, adaptive)  # type: ignore[arg-type]
    results = allocate(x, body, format, prologue, container, row_multiple, want_row)
    if x.shape[0]:
        launch(
            lambda how: load_kernel(f"{how.kernel}.cu", how.kernel, x.device, how.defines, how.shared_bytes),
            x, other, weight, table, hadamard, prologue, format, container,  # type: ignore[arg-type]
            epsilon, unit_offset, results, body, want_row,
        )  # fmt: skip
    return results  # type: ignore[return-value]


@_quantize_activations.register_fake
def _quantize_activations_fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, _, body, _, prologue, *numbers, container, row_multiple, _, _, want_row = rest
    return allocate(x, body, ActivationFormat(*numbers), prologue, container, row_multiple, want_row)


def check(x: Tensor, other: Tensor | None, weight: Tensor | None, row_multiple: int) -> None:
    """Refuse what the kernel can't read."""
    if x.dtype not in INPUTS:
        raise UnsupportedError(f"The quantization kernel reads float32, float16 or bfloat16 inputs, not {x.dtype}.")
    if row_multiple % 8:
        raise UnsupportedError(f"Operand rows are padded to a multiple of 8, not of {row_multiple}.")
    for name, tensor in (("x", x), ("second input", other), ("norm weight", weight)):
        if tensor is None:
            continue
        if (
            tensor.dtype != x.dtype
            or tensor.shape[-1] != x.shape[-1]
            or (tensor.dim() == 2 and tensor.shape != x.shape)
        ):
            raise UnsupportedError(
                f"The {name} is {tensor.dtype} {tuple(tensor.shape)}; beside x the kernel needs "
                f"{x.dtype} {tuple(x.shape)}."
            )
        if tensor.stride(-1) != 1:
            raise UnsupportedError(f"The {name}'s channels are not contiguous (stride {tensor.stride(-1)}).")
