"""The integer GEMM: y = x W^T on INT8 operands, with 4-bit or 8-bit weights and a block of INT8 outlier channels.

cuda/gemm_sm90a.cuh computes it; which tile it takes is chosen in kernels/tune.py. One torch operator, `atom::gemm`, so
that torch.compile and CUDA graphs can hold it. The experts of a mixture are one product too, on a stack of weights.
"""

import functools

import torch
from torch import Tensor

from atomcli.kernels import compiler, gemm_launch, tune
from atomcli.kernels.layouts import BLOCK, BLOCK_BYTES, GemmWeight, Kind
from atomcli.kernels.quantize import Operand
from atomcli.kernels.tiles import Tile, source


def linear(operand: Operand, weight: GemmWeight, tokens: int, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """y (tokens, out_features) in `dtype` (bf16 or fp16) of a quantized input and a prepared weight; bias fp32.

    Raises UsageError for operands that do not fit each other.
    """
    _check(operand, weight, tokens, dtype, bias)
    return _call(operand, weight, bias, None, tokens, dtype)


def expert_linear(
    operand: Operand, weights: GemmWeight, expert_starts: Tensor, tokens: int, dtype: torch.dtype
) -> Tensor:
    """y (tokens, out_features) of inputs that are sorted by expert and the stack of the experts' weights.

    expert_starts (experts + 1,) int32 on the device: tokens starts[e] ... starts[e + 1] - 1 take expert e. Nothing is
    padded, and the host need not know how many there are of each. Raises UsageError like `linear`.
    """
    _check(operand, weights, tokens, dtype, None)
    gemm_launch.check_experts(weights.body, expert_starts)
    return _call(operand, weights, None, expert_starts, tokens, dtype)


def _call(
    operand: Operand,
    weight: GemmWeight,
    bias: Tensor | None,
    expert_starts: Tensor | None,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    # torch.compile is to see one node; a launch does without torch's dispatch.
    run = _gemm if operand.codes.is_cuda and not torch.compiler.is_compiling() else torch.ops.atom.gemm
    y: Tensor = run(
        operand.codes, operand.token_scale, operand.outlier_scale, weight.body, weight.outliers, weight.row_scale,
        weight.outlier_row_scale, bias, expert_starts, weight.kind, weight.shape[0], tokens, dtype,
    )  # fmt: skip
    return y


def _check(operand: Operand, weight: GemmWeight, tokens: int, dtype: torch.dtype, bias: Tensor | None) -> None:
    planes = weight.body.shape[-2] + (weight.outliers is not None)
    gemm_launch.check(operand, planes, weight.body, weight.shape[0], tokens, dtype, bias)


def launch(
    tile: Tile,
    operand: Operand,
    weight: GemmWeight,
    output: Tensor,
    bias: Tensor | None = None,
    expert_starts: Tensor | None = None,
) -> None:
    """Enqueue y (tokens, out_features) = x W^T on torch's current stream with the given tile.

    With `expert_starts` (experts + 1,) the weight is a stack: tokens starts[e] ... starts[e + 1] - 1 take expert e.
    """
    experts = 0 if expert_starts is None else expert_starts.numel() - 1
    kernel = _kernel(tile, weight.kind, output.dtype, experts, output.device)
    gemm_launch.launch(
        kernel, tile, operand, weight.body, weight.row_scale, output, bias, expert_starts, weight.outliers,
        weight.outlier_row_scale,
    )  # fmt: skip


@functools.cache
def _kernel(tile: Tile, kind: Kind, dtype: torch.dtype, experts: int, device: torch.device) -> compiler.Kernel:
    shared_bytes = tile.shared_bytes(BLOCK_BYTES[kind])
    return compiler.load_kernel(source(kind), "gemm", device, tile.defines(dtype, experts), shared_bytes)


# ---------------------------------------------------------------------------------------------- the operator


def _gemm(
    codes: Tensor,
    token_scale: Tensor,
    outlier_scale: Tensor,
    body: Tensor,
    outliers: Tensor | None,
    row_scale: Tensor,
    outlier_row_scale: Tensor | None,
    bias: Tensor | None,
    expert_starts: Tensor | None,
    kind: Kind,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    output = torch.empty(tokens, rows, dtype=dtype, device=codes.device)
    if tokens == 0:
        return output
    weight = GemmWeight(kind, (rows, body.shape[-2] * BLOCK), body, row_scale, outliers, outlier_row_scale)
    operand = Operand(codes, codes, token_scale, outlier_scale, codes)
    if expert_starts is None:
        tile = tune.choose(codes.device, kind, rows, body.shape[-2], tokens)
    else:
        tile = tune.for_experts(kind, rows, body.shape[0], tokens, compiler.multiprocessors(codes.device))
    launch(tile, operand, weight, output, bias, expert_starts)
    return output


_library = torch.library.Library("atom", "FRAGMENT")
_library.define(
    "gemm(Tensor codes, Tensor token_scale, Tensor outlier_scale, Tensor body, Tensor? outliers, Tensor row_scale, "
    "Tensor? outlier_row_scale, Tensor? bias, Tensor? expert_starts, str kind, SymInt rows, SymInt tokens, "
    "ScalarType dtype) -> Tensor"
)
_library.impl("gemm", _gemm, "CUDA")
torch.library.register_fake("atom::gemm", gemm_launch.empty_output, lib=_library)
