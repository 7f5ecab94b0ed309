"""Quantizing a layer's input on the GPU: prologue, layout transform, codes and scales in one kernel per token row.

The rule is formats/activations.py; cuda/quantize_activations.cu reproduces its codes bit for bit, and so does
cuda/quantize_pairs.cu for many tokens. Everything is one torch operator, `atom::quantize_activations`, so torch.compile
and CUDA graphs can hold it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atomcli.errors import UnsupportedError
from atomcli.formats.groups import group_count
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import ActivationFormat, Scheme
from atomcli.kernels.compiler import load_kernel
from atomcli.kernels.layouts import BLOCK
from atomcli.kernels.quantize_launch import INPUTS, SHARED_HEADER, SHARED_LIMIT, Container, Prologue, launch

GROUP_SCALE_DTYPES = {"fp16": torch.float16, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}


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
    # torch.compile is to see one node; a launch does without torch's dispatch.
    direct = x.is_cuda and not torch.compiler.is_compiling()
    run = _quantize_activations if direct else torch.ops.atom.quantize_activations
    return run(
        x, other, weight, layout.table, layout.body, layout.hadamard, prologue, format.element, format.group,
        format.scale, format.symmetric, format.clip, format.adaptive, container, row_multiple, epsilon, unit_offset,
        want_row,
    )  # fmt: skip


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


_operator = torch.library.custom_op(
    "atom::quantize_activations", _quantize_activations, mutates_args=(), device_types="cuda"
)


@_operator.register_fake
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
