"""GEMMs with warp MMAs (cuda/gemm_sm80.cuh), for every architecture since sm_80: their tiles, workspace and launch."""

from collections.abc import Mapping

import torch
from torch import Tensor

from atomcli.kernels.compiler import load_kernel, multiprocessors
from atomcli.kernels.layouts import GemmWeight
from atomcli.kernels.quantize import Operand
from atomcli.kernels.tiles import OUTPUTS
from atomcli.kernels.workspace import workspace

ROWS, CHANNELS = 64, 128  # of a block of weights
INTEGERS = "gemm_w4_sm80.cu"


def linear(operand: Operand, weight: GemmWeight, tokens: int, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """y (tokens, out_features) in `dtype`, bf16 or fp16, of INT8 operands and a prepared weight; bias fp32."""
    output = torch.empty((tokens, weight.shape[0]), dtype=dtype, device=weight.body.device)
    if tokens:
        launch(
            INTEGERS, {"WEIGHT_BITS": weight.bits}, weight.body, weight.outliers, operand, weight.row_scale,
            weight.outlier_row_scale, bias, output,
        )  # fmt: skip
    return output


def tile(
    tokens: int, output: str, blocks: int, row_groups: int, processors: int
) -> tuple[dict[str, int | str], int, int]:
    """Defines, output rows of a tile, and splits: large tiles for many tokens, split channels for few."""
    if tokens > 64:
        defines: dict[str, int | str] = {
            "ROW_WARPS": 4,
            "TOKEN_WARPS": 2,
            "ROW_TILES": 2,
            "TOKEN_TILES": 8,
            "STAGES": 3,
        }
    else:
        tiles = next(n for n in (1, 2, 4, 8) if tokens <= 8 * n)
        defines = {
            "ROW_WARPS": 4,
            "TOKEN_WARPS": 1,
            "ROW_TILES": 1,
            "TOKEN_TILES": tiles,
            "STAGES": 6 if tiles <= 4 else 4,
        }
    rows = int(defines["ROW_WARPS"]) * int(defines["ROW_TILES"]) * 16
    tile_tokens = int(defines["TOKEN_WARPS"]) * int(defines["TOKEN_TILES"]) * 8
    tiles = -(-row_groups * ROWS // rows) * -(-tokens // tile_tokens)
    splits = max(1, min(processors * 4 // tiles, blocks // 4)) if tokens <= 64 else 1
    return {**defines, "OUTPUT": output}, rows, splits


def launch(
    file: str, extra: Mapping[str, int | str], blocks: Tensor, outliers: Tensor | None, operand: Operand,
    row_scale: Tensor | None, outlier_scale: Tensor | None, bias: Tensor | None, output: Tensor,
) -> None:  # fmt: skip
    """Launch a kernel of cuda/gemm_sm80.cuh; `blocks` (row groups, k-blocks, bytes) are the packed weights."""
    device, (tokens, out_features) = output.device, output.shape
    row_groups, k_blocks, weight_bytes = blocks.shape
    processors = multiprocessors(device)
    output_name = OUTPUTS[output.dtype]
    defines, rows, splits = tile(tokens, output_name, k_blocks, row_groups, processors)
    defines = {**defines, **extra}
    warps = int(defines["ROW_WARPS"]) * int(defines["TOKEN_WARPS"])
    tile_tokens = int(defines["TOKEN_WARPS"]) * int(defines["TOKEN_TILES"]) * 8
    token_bytes = operand.codes.shape[2]
    scale_bytes = operand.group_scales[0, 0].nbytes if token_bytes == 64 else 0
    stage = rows // ROWS * weight_bytes + tile_tokens * (token_bytes + scale_bytes)
    ring = -(-stage // 128) * 128 * int(defines["STAGES"])
    outlier_stage = rows // ROWS * ROWS * CHANNELS + tile_tokens * CHANNELS if outliers is not None else 0
    staging = tile_tokens * (rows + 8) * 2
    grid = (-(-out_features // rows), -(-tokens // tile_tokens), splits)
    tiles = grid[0] * grid[1]
    scratch = workspace(device, "sm80", tiles * splits * rows * tile_tokens if splits > 1 else 1, tiles)
    outlier_codes = operand.outlier_codes if token_bytes == 64 else operand.codes[k_blocks:]
    kernel = load_kernel(file, "gemm", device, defines, max(ring, outlier_stage, staging))
    kernel.launch(
        grid, warps * 32, blocks, outliers, operand.codes, outlier_codes, operand.group_scales, row_scale,
        outlier_scale, operand.token_scale, operand.outlier_scale, bias, output, scratch.partials, scratch.flags,
        out_features, tokens, operand.token_scale.shape[0], k_blocks,
    )  # fmt: skip
