"""The GEMM for 4-bit weights and 16-bit activations: y = x W^T with fp16 operands and fp32 sums, on sm_90a.

cuda/gemm_w4a16_sm90a.cu is the skeleton of the integer GEMM with weights that become fp16 numbers in registers.
Integers times integer multipliers, MXFP4 and NVFP4 do so exactly; products with fp16 scales are rounded to 11 bits, an
eighth of what the rounding of the output to bf16 costs. One torch operator, `atom::gemm_w4a16`.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atomcli.errors import UsageError
from atomcli.formats.scheme import Scheme
from atomcli.kernels import compiler, weight_layouts
from atomcli.kernels.layouts import BLOCK
from atomcli.kernels.quantize import Operand
from atomcli.kernels.tiles import OUTPUTS, SHARED_LIMIT, Tile, deal
from atomcli.kernels.weight_layouts import ScaledWeight, StoredScale
from atomcli.kernels.workspace import workspace

SOURCE = "gemm_w4a16_sm90a.cu"
PLANES = 2  # operand rows of 128 bytes that 128 channels take

# Candidates by the tokens of a tile, before they are fitted into shared memory. Four warpgroups share the channels of a
# narrow tile; they have the registers of one fragment each.
TILES = (
    Tile(8, 1, 4, 6, 4, split="all", fragments=1),
    Tile(8, 1, 4, 6, 4, split="all", blocks=128, fragments=1),
    Tile(8, 1, 2, 6, 4, split="all", blocks=128, fragments=2),
    Tile(8, 2, 2, 6, 4, split="all", fragments=1),
    Tile(16, 1, 4, 6, 4, split="all", blocks=128, fragments=1),
    Tile(16, 2, 2, 6, 4, split="all", fragments=1),
    Tile(32, 1, 4, 4, 4, split="all", blocks=128, fragments=1),
    Tile(32, 2, 2, 6, 2, split="all", fragments=1),
    Tile(64, 1, 2, 5, 2, split="all", blocks=128, fragments=2),
    Tile(64, 2, 1, 5, 2, split="all", fragments=2),
    Tile(128, 2, 1, 5, split="all", fragments=2),
    Tile(128, 2, 1, 5, split="all", blocks=128, fragments=2),
    Tile(128, 2, 1, 5, split="none", fragments=2),
    Tile(128, 2, 1, 5, split="remainder", fragments=2),
    Tile(128, 2, 1, 5, cluster=2, split="none", fragments=2),
    Tile(128, 2, 1, 5, cluster=2, split="all", fragments=2),
)


def why_not(scheme: Scheme, arch: str) -> str | None:
    """The reason why this kernel can't run `scheme` on `arch`, or None if it can."""
    reason = weight_layouts.why_not(scheme)
    if reason is None and arch != "90a":
        return f"4-bit weights with 16-bit activations have a kernel for sm_90a, none for sm_{arch}"
    return reason


def linear(
    operand: Operand, weight: ScaledWeight, tokens: int, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """y (tokens, out_features) in `dtype` (bf16 or fp16) of an operand of fp16 numbers and a weight; bias fp32.

    The operand is what `quantize.quantize` gives in the container "f16". Raises UsageError for operands that don't fit.
    """
    _check(operand, weight, tokens, dtype, bias)
    return _call(operand, weight, bias, None, tokens, dtype)


def expert_linear(
    operand: Operand, weights: ScaledWeight, expert_starts: Tensor, tokens: int, dtype: torch.dtype
) -> Tensor:
    """y (tokens, out_features) of inputs that are sorted by expert and the stack of the experts' weights.

    As `gemm.expert_linear`: expert_starts (experts + 1,) int32 on the device says where each expert's tokens begin.
    """
    _check(operand, weights, tokens, dtype, None)
    experts = weights.blocks.shape[0]
    if weights.blocks.dim() != 4 or expert_starts.shape != (experts + 1,) or expert_starts.dtype != torch.int32:
        found = f"{expert_starts.dtype} {tuple(expert_starts.shape)}"
        raise UsageError(f"A stack of {experts} experts needs {experts + 1} int32 starts, not {found}.")
    return _call(operand, weights, None, expert_starts, tokens, dtype)


def _call(
    operand: Operand,
    weight: ScaledWeight,
    bias: Tensor | None,
    expert_starts: Tensor | None,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    y: Tensor = torch.ops.atom.gemm_w4a16(
        operand.codes, operand.token_scale, weight.blocks, weight.row_scale, bias, expert_starts, weight.element,
        weight.group, weight.scale, weight.shape[0], tokens, dtype,
    )  # fmt: skip
    return y


def _check(operand: Operand, weight: ScaledWeight, tokens: int, dtype: torch.dtype, bias: Tensor | None) -> None:
    codes, planes = operand.codes, PLANES * weight.blocks.shape[-2]
    if dtype not in OUTPUTS:
        raise UsageError(f"The GEMM puts out bfloat16 or float16, not {dtype}.")
    if codes.dim() != 3 or (codes.shape[0], codes.shape[2]) != (planes, BLOCK) or codes.element_size() != 1:
        raise UsageError(
            f"The operand is {codes.dtype} {tuple(codes.shape)}, the weight needs ({planes}, tokens, {BLOCK}) in bytes."
        )
    padded = codes.shape[1]
    if padded % 8 or padded < tokens:
        raise UsageError(f"The operand has {padded} token rows; {tokens} tokens need a multiple of 8 that holds them.")
    if operand.token_scale.numel() < padded or operand.token_scale.dtype != torch.float32:
        raise UsageError(f"token_scale must be fp32 of {padded} values, not {tuple(operand.token_scale.shape)}.")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (weight.shape[0],)):
        raise UsageError(f"The bias must be fp32 ({weight.shape[0]},), not {bias.dtype} {tuple(bias.shape)}.")
    for name, tensor in (("operand", codes), ("weight", weight.blocks), ("bias", bias)):
        if tensor is not None and not tensor.is_contiguous():
            raise UsageError(f"The {name} of the GEMM must be contiguous; its strides are {tensor.stride()}.")


# ------------------------------------------------------------------------------------------------ tiles


def tile_for(rows: int, blocks: int, tokens: int, multiprocessors: int, group: int, scale: StoredScale) -> Tile:
    """The tile for `tokens` tokens, `rows` output channels and `blocks` blocks of 128 channels: a rule.

    It follows what was measured on an H100 (docs/kernel-log.md).
    """
    narrow = -(-rows // 64) <= multiprocessors  # row groups: few enough that tiles must be cut to feed every SM
    power = 128 if multiprocessors >= 128 else 0  # so many blocks cut most weights evenly
    evenly = power if narrow else 0
    if tokens <= 8:
        tile = Tile(8, 1, 4, 6, 4, split="all", blocks=power, fragments=1)
    elif tokens <= 32 and not narrow:
        tile = Tile(16 if tokens <= 16 else 32, 2, 2, 6, 4 if tokens <= 16 else 2, split="all", fragments=1)
    elif tokens <= 16:
        tile = Tile(16, 1, 4, 6, 4, split="all", blocks=evenly, fragments=1)
    elif tokens <= 32:
        tile = Tile(32, 1, 4, 4, 4, split="all", blocks=evenly, fragments=1)
    elif narrow and tokens <= (128 if blocks <= 32 else 64):  # wide tiles are worth their splits beyond 4096 channels
        tile = Tile(64, 1, 2, 5, 2, split="all", blocks=evenly, fragments=2)
    elif tokens <= 64:
        tile = Tile(64, 2, 1, 5, 2, split="all", fragments=2)
    elif tokens <= 256:
        tile = Tile(128, 2, 1, 5, split="all", blocks=evenly, fragments=2)
    else:
        pairs = tokens > 1024 and -(-rows // 128) % 2 == 0
        tile = Tile(128, 2, 1, 5, cluster=2 if pairs else 1, split="none", fragments=2)
    return fit(tile, group, scale)


def tile_for_experts(
    rows: int, blocks: int, experts: int, tokens: int, multiprocessors: int, group: int, scale: StoredScale
) -> Tile:
    """A tile for `tokens` tokens sorted by expert, as if those that have some had equally many, as in tune."""
    active = min(experts, tokens)
    tile = tile_for(rows * active, blocks, -(-tokens // active) + 7, multiprocessors, group, scale)
    return fit(replace(tile, cluster=1), group, scale, experts)


def fit(tile: Tile, group: int, scale: StoredScale, experts: int = 0) -> Tile:
    """The same tile with as many stages as shared memory holds beside the table of experts."""
    while _shared_bytes(tile, group, scale) + tile.stages * 16 + (experts + 1) * 8 > SHARED_LIMIT:
        tile = replace(tile, stages=tile.stages - 1)
    return tile


def defines(tile: Tile, weight: ScaledWeight, dtype: torch.dtype, experts: int = 0) -> dict[str, int | str]:
    """What the source is compiled with."""
    return tile.defines(dtype, experts) | {
        "ELEMENT": weight.element.upper(),
        "GROUP": weight.group,
        "SCALE": weight.scale,
    }


def _shared_bytes(tile: Tile, group: int, scale: StoredScale) -> int:
    return tile.shared_bytes(weight_layouts.block_bytes(group, scale), PLANES)


def launch(
    tile: Tile,
    operand: Operand,
    weight: ScaledWeight,
    output: Tensor,
    bias: Tensor | None = None,
    expert_starts: Tensor | None = None,
) -> None:
    """Enqueue y (tokens, out_features) = x W^T on torch's current stream with the given tile.

    With `expert_starts` (experts + 1,) the weight is a stack: tokens starts[e] ... starts[e + 1] - 1 take expert e.
    """
    device, (tokens, rows), (row_groups, blocks) = output.device, output.shape, weight.blocks.shape[-3:-1]
    experts = 0 if expert_starts is None else expert_starts.numel() - 1
    shared_bytes = _shared_bytes(tile, weight.group, weight.scale)
    kernel = compiler.load_kernel(SOURCE, "gemm", device, defines(tile, weight, output.dtype, experts), shared_bytes)
    token_tiles, processors = -(-tokens // tile.tokens), compiler.multiprocessors(device)
    if expert_starts is None:
        row_tiles = -(-rows // (tile.rows * tile.cluster)) * tile.cluster
        grid, split_tiles = deal(tile, row_tiles * token_tiles, processors)
    else:  # how many tiles there are is known on the device
        row_tiles = row_groups // tile.row_groups
        grid, split_tiles = tile.blocks or processors * tile.blocks_per_sm, int(tile.split == "all")
    partials = flags = None
    if split_tiles:  # a tile of sums for each block, and a flag for each of its warps that own rows
        _, partials, flags = workspace(device, "w4a16", grid * tile.rows * tile.tokens, grid * tile.row_groups * 4)
    kernel.launch(
        grid, tile.threads, weight.blocks, None, operand.codes, weight.row_scale, None, operand.token_scale, None, bias,
        output, partials, flags, expert_starts, rows, tokens, operand.codes.shape[1], blocks, row_tiles, token_tiles,
        split_tiles, overlap=True,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------- the operator


def _gemm(
    codes: Tensor,
    token_scale: Tensor,
    blocks: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    expert_starts: Tensor | None,
    element: str,
    group: int,
    scale: str,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    output = torch.empty(tokens, rows, dtype=dtype, device=codes.device)
    if tokens == 0:
        return output
    weight = ScaledWeight((rows, blocks.shape[-2] * BLOCK), element, group, scale, blocks, row_scale)  # type: ignore[arg-type]
    processors = compiler.multiprocessors(codes.device)
    if expert_starts is None:
        tile = tile_for(rows, blocks.shape[-2], tokens, processors, group, weight.scale)
    else:
        experts, channels = blocks.shape[0], blocks.shape[-2]
        tile = tile_for_experts(rows, channels, experts, tokens, processors, group, weight.scale)
    launch(tile, Operand(codes, codes, token_scale, token_scale, codes), weight, output, bias, expert_starts)
    return output


def _gemm_shape(codes: Tensor, *rest: Any) -> Tensor:
    *_, rows, tokens, dtype = rest
    return codes.new_empty(tokens, rows, dtype=dtype)


_library = torch.library.Library("atom", "FRAGMENT")
_library.define(
    "gemm_w4a16(Tensor codes, Tensor token_scale, Tensor blocks, Tensor row_scale, Tensor? bias, "
    "Tensor? expert_starts, str element, int group, str scale, SymInt rows, SymInt tokens, ScalarType dtype) -> Tensor"
)
_library.impl("gemm_w4a16", _gemm, "CUDA")
torch.library.register_fake("atom::gemm_w4a16", _gemm_shape, lib=_library)
