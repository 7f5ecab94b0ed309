"""The integer GEMM: y = x W^T on INT8 operands, with 4-bit or 8-bit weights and a block of INT8 outlier channels.

cuda/gemm_sm90a.cuh computes it; which tile it takes is chosen in kernels/tune.py. One torch operator, `atom::gemm`, so
that torch.compile and CUDA graphs can hold it. The experts of a mixture are one product too, on a stack of weights.
"""

from typing import Any

import torch
from torch import Tensor

from atomcli.errors import UsageError
from atomcli.kernels import compiler, tune
from atomcli.kernels.layouts import BLOCK, BLOCK_BYTES, GemmWeight, Kind
from atomcli.kernels.quantize import Operand
from atomcli.kernels.tiles import OUTPUTS, Tile, deal, source
from atomcli.kernels.workspace import workspace


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
    experts = weights.body.shape[0]
    if weights.body.dim() != 4 or expert_starts.shape != (experts + 1,) or expert_starts.dtype != torch.int32:
        found = f"{expert_starts.dtype} {tuple(expert_starts.shape)}"
        raise UsageError(f"A stack of {experts} experts needs {experts + 1} int32 starts, not {found}.")
    return _call(operand, weights, None, expert_starts, tokens, dtype)


def _call(
    operand: Operand,
    weight: GemmWeight,
    bias: Tensor | None,
    expert_starts: Tensor | None,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    y: Tensor = torch.ops.atom.gemm(
        operand.codes, operand.token_scale, operand.outlier_scale, weight.body, weight.outliers, weight.row_scale,
        weight.outlier_row_scale, bias, expert_starts, weight.kind, weight.shape[0], tokens, dtype,
    )  # fmt: skip
    return y


def _check(operand: Operand, weight: GemmWeight, tokens: int, dtype: torch.dtype, bias: Tensor | None) -> None:
    codes = operand.codes
    blocks = weight.body.shape[-2] + (weight.outliers is not None)
    if dtype not in OUTPUTS:
        raise UsageError(f"The GEMM puts out bfloat16 or float16, not {dtype}.")
    if codes.dim() != 3 or codes.shape[0] != blocks or codes.shape[2] != BLOCK or codes.element_size() != 1:
        raise UsageError(
            f"The operand is {codes.dtype} {tuple(codes.shape)}, the weight needs 8-bit ({blocks}, tokens, {BLOCK})."
        )
    padded = codes.shape[1]
    if padded % 8 or padded < tokens:
        raise UsageError(f"The operand has {padded} token rows; {tokens} tokens need a multiple of 8 that holds them.")
    scale = operand.token_scale
    if scale.numel() < padded or scale.dtype != torch.float32:
        raise UsageError(f"token_scale must be fp32 of {padded} values, not {scale.dtype} {tuple(scale.shape)}.")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (weight.shape[0],)):
        raise UsageError(f"The bias must be fp32 ({weight.shape[0]},), not {bias.dtype} {tuple(bias.shape)}.")
    for name, tensor in (("operand", codes), ("weight", weight.body), ("bias", bias)):
        if tensor is not None and not tensor.is_contiguous():
            raise UsageError(f"The {name} of the GEMM must be contiguous; its strides are {tensor.stride()}.")


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
    device = output.device
    tokens, rows = output.shape
    padded, (row_groups, blocks) = operand.codes.shape[1], weight.body.shape[-3:-1]
    experts = 0 if expert_starts is None else expert_starts.numel() - 1
    shared_bytes = tile.shared_bytes(BLOCK_BYTES[weight.kind])
    defines = tile.defines(output.dtype, experts)
    kernel = compiler.load_kernel(source(weight.kind), "gemm", device, defines, shared_bytes)
    token_tiles, processors = -(-tokens // tile.tokens), compiler.multiprocessors(device)
    if expert_starts is None:
        row_tiles = -(-rows // (tile.rows * tile.cluster)) * tile.cluster
        grid, split_tiles = deal(tile, row_tiles * token_tiles, processors)
    else:  # how many tiles there are is known on the device
        row_tiles = row_groups // tile.row_groups
        grid, split_tiles = tile.blocks or processors * tile.blocks_per_sm, int(tile.split == "all")
    partials = flags = None
    if split_tiles:  # a tile of sums for each block, and a flag for each of its warps
        sums, warps = grid * tile.rows * tile.tokens, tile.row_groups * 4
        _, partials, flags = workspace(device, "gemm", sums, grid * warps, torch.int32)
    kernel.launch(
        grid, tile.threads, weight.body, weight.outliers, operand.codes, weight.row_scale, weight.outlier_row_scale,
        operand.token_scale, operand.outlier_scale, bias, output, partials, flags, expert_starts, rows, tokens, padded,
        blocks, row_tiles, token_tiles, split_tiles, overlap=True,
    )  # fmt: skip


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


def _gemm_shape(codes: Tensor, *rest: Any) -> Tensor:
    *_, rows, tokens, dtype = rest
    return codes.new_empty(tokens, rows, dtype=dtype)


_library = torch.library.Library("atom", "FRAGMENT")
_library.define(
    "gemm(Tensor codes, Tensor token_scale, Tensor outlier_scale, Tensor body, Tensor? outliers, Tensor row_scale, "
    "Tensor? outlier_row_scale, Tensor? bias, Tensor? expert_starts, str kind, SymInt rows, SymInt tokens, "
    "ScalarType dtype) -> Tensor"
)
_library.impl("gemm", _gemm, "CUDA")
torch.library.register_fake("atom::gemm", _gemm_shape, lib=_library)
