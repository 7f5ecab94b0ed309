"""The GEMM for 4-bit weights and 16-bit activations: y = x W^T with fp16 operands and fp32 sums, on sm_90a.

cuda/gemm_w4a16_sm90a.cu is the skeleton of the integer GEMM with weights that become fp16 numbers in registers.
Integers times integer multipliers, MXFP4 and NVFP4 do so exactly; products with fp16 scales are rounded to 11 bits, an
eighth of what the rounding of the output to bf16 costs. One torch operator, `atom::gemm_w4a16`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from atomcli.formats.scheme import Scheme
from atomcli.kernels import compiler, gemm_launch, weight_layouts
from atomcli.kernels.layouts import BLOCK
from atomcli.kernels.quantize import Operand
from atomcli.kernels.tiles import SHARED_LIMIT, Tile
from atomcli.kernels.weight_layouts import ScaledWeight, StoredScale

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
    gemm_launch.check_experts(weights.blocks, expert_starts)
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
    planes = PLANES * weight.blocks.shape[-2]
    gemm_launch.check(operand, planes, weight.blocks, weight.shape[0], tokens, dtype, bias)


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
    experts = 0 if expert_starts is None else expert_starts.numel() - 1
    shared_bytes = _shared_bytes(tile, weight.group, weight.scale)
    kernel = compiler.load_kernel(
        SOURCE, "gemm", output.device, defines(tile, weight, output.dtype, experts), shared_bytes
    )
    gemm_launch.launch(kernel, tile, operand, weight.blocks, weight.row_scale, output, bias, expert_starts)


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


_library = torch.library.Library("atom", "FRAGMENT")
_library.define(
    "gemm_w4a16(Tensor codes, Tensor token_scale, Tensor blocks, Tensor row_scale, Tensor? bias, "
    "Tensor? expert_starts, str element, int group, str scale, SymInt rows, SymInt tokens, ScalarType dtype) -> Tensor"
)
_library.impl("gemm_w4a16", _gemm, "CUDA")
torch.library.register_fake("atom::gemm_w4a16", gemm_launch.empty_output, lib=_library)
