"""What the GEMMs on cuda/gemm_sm90a.cuh share, whatever their weights: checks of the operands, and the launch."""

from typing import Any

import torch
from torch import Tensor

from atomcli.errors import UsageError
from atomcli.kernels import compiler
from atomcli.kernels.layouts import BLOCK
from atomcli.kernels.quantize import Operand
from atomcli.kernels.tiles import OUTPUTS, Tile, deal
from atomcli.kernels.workspace import workspace


def check(
    operand: Operand, planes: int, weight: Tensor, rows: int, tokens: int, dtype: torch.dtype, bias: Tensor | None
) -> None:
    """Raise UsageError unless an operand of `planes` rows of 128 bytes a token, a packed weight and a bias fit."""
    codes, scale = operand.codes, operand.token_scale
    if codes.dim() != 3 or (codes.shape[0], codes.shape[2]) != (planes, BLOCK) or codes.element_size() != 1:
        raise UsageError(
            f"The operand is {codes.dtype} {tuple(codes.shape)}, the weight needs 8-bit ({planes}, tokens, {BLOCK})."
        )
    padded = codes.shape[1]
    if padded % 8 or padded < tokens:
        raise UsageError(f"The operand has {padded} token rows; {tokens} tokens need a multiple of 8 that holds them.")
    if scale.numel() < padded or scale.dtype != torch.float32:
        raise UsageError(f"token_scale must be fp32 of {padded} values, not {scale.dtype} {tuple(scale.shape)}.")
    check_common(operand, weight, rows, dtype, bias)


def check_common(operand: Operand, weight: Tensor, rows: int, dtype: torch.dtype, bias: Tensor | None) -> None:
    """Raise UsageError for an output, a bias or strides that no GEMM takes."""
    if dtype not in OUTPUTS:
        raise UsageError(f"The GEMM puts out bfloat16 or float16, not {dtype}.")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (rows,)):
        raise UsageError(f"The bias must be fp32 ({rows},), not {bias.dtype} {tuple(bias.shape)}.")
    for name, tensor in (("operand", operand.codes), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_contiguous():
            raise UsageError(f"The {name} of the GEMM must be contiguous; its strides are {tensor.stride()}.")


def check_alignment(operand: Operand, weight: Tensor) -> None:
    """Raise UsageError for what bulk copies can't read; asked at the launch, where tensors have addresses."""
    scales = {"token scales": operand.token_scale, "group scales": operand.group_scales}
    for name, tensor in {"operand": operand.codes, "weight": weight, **scales}.items():
        if tensor.data_ptr() % 16:
            raise UsageError(
                f"The {name} of the GEMM must begin at a multiple of 16 bytes, not at {tensor.data_ptr():#x}; "
                "a clone of a slice does."
            )


def check_experts(weights: Tensor, expert_starts: Tensor) -> None:
    """Raise UsageError unless packed weights (experts, row groups, blocks, bytes) have one start more than experts."""
    experts = weights.shape[0]
    if weights.dim() != 4 or expert_starts.shape != (experts + 1,) or expert_starts.dtype != torch.int32:
        found = f"{expert_starts.dtype} {tuple(expert_starts.shape)}"
        raise UsageError(f"A stack of {experts} experts needs {experts + 1} int32 starts, not {found}.")


def launch(
    kernel: compiler.Kernel,
    tile: Tile,
    operand: Operand,
    weight: Tensor,
    row_scale: Tensor,
    output: Tensor,
    bias: Tensor | None,
    expert_starts: Tensor | None,
    outliers: Tensor | None = None,
    outlier_row_scale: Tensor | None = None,
) -> None:
    """Enqueue y (tokens, out_features) = x W^T on torch's current stream with a kernel compiled for the given tile.

    weight: uint8 (row groups, blocks, bytes). With `expert_starts` (experts + 1,) it is a stack of such: tokens
    starts[e] ... starts[e + 1] - 1 take expert e.
    """
    check_alignment(operand, weight)
    device, (tokens, rows), (row_groups, blocks) = output.device, output.shape, weight.shape[-3:-1]
    token_tiles, processors = -(-tokens // tile.tokens), compiler.multiprocessors(device)
    if expert_starts is None:
        row_tiles = -(-rows // (tile.rows * tile.cluster)) * tile.cluster
        grid, split_tiles = deal(tile, row_tiles * token_tiles, processors)
    else:  # how many tiles there are is known on the device
        row_tiles = row_groups // tile.row_groups
        grid, split_tiles = tile.blocks or processors * tile.blocks_per_sm, int(tile.split == "all")
    partials = flags = None
    if split_tiles:  # a tile of sums for each block, and a flag for each of its warps that own rows
        _, partials, flags = workspace(device, "gemm", grid * tile.rows * tile.tokens, grid * tile.row_groups * 4)
    kernel.launch(
        grid, tile.threads, weight, outliers, operand.codes, row_scale, outlier_row_scale, operand.token_scale,
        operand.outlier_scale, bias, output, partials, flags, expert_starts, rows, tokens, operand.codes.shape[1],
        blocks, row_tiles, token_tiles, split_tiles, overlap=True,
    )  # fmt: skip


def empty_output(codes: Tensor, *rest: Any) -> Tensor:
    """What torch knows of a product before it is computed: the arguments of each GEMM's operator end in these three."""
    *_, rows, tokens, dtype = rest
    return codes.new_empty(tokens, rows, dtype=dtype)
