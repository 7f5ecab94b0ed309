"""Tensor parallelism: which part of a linear's tensors one rank holds. Plain torch, no vLLM.

Column parallel (q, k, v, gate, up): a rank has a range of rows; codes, scales and outliers are cut alike, and every
rank reads the whole input. Row parallel (o, down): a rank has some body channels, whole groups of them, and the last
rank has the outliers, which stand at the end.

What a rank's input looks like depends on the format. Where nothing about a channel's code depends on channels of other
ranks (a scale per group, no permutation, no group or Hadamard block across a border), each rank quantizes its own
channels. Otherwise (one scale per token, or a permutation across heads) the ranks gather the input, quantize all of it
and multiply their own channels: the codes are then those of one rank, and so are the tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atomcli.errors import UnsupportedError
from atomcli.formats.groups import group_count
from atomcli.formats.scheme import Scheme
from atomcli.kernels.layouts import BLOCK
from atomcli.kernels.quantize import KernelLayout, Operand


@dataclass(frozen=True)
class Part:
    """What one rank holds of a linear: rows [start, stop), body channels [start, stop), the outliers or not."""

    rows: tuple[int, int]
    body: tuple[int, int]
    outliers: bool

    def scheme(self, scheme: Scheme) -> Scheme:
        """The scheme of the part: without outliers where they lie elsewhere."""
        return scheme if self.outliers else replace(scheme, outliers=0)

    def in_features(self, scheme: Scheme) -> int:
        """Channels of the part."""
        return self.body[1] - self.body[0] + self.scheme(scheme).outliers

    def channels(self, scheme: Scheme, in_features: int) -> Tensor:
        """Which of the layout's channels they are, int64."""
        body = torch.arange(*self.body)
        if not self.outliers:
            return body
        return torch.cat([body, torch.arange(scheme.body(in_features), in_features)])


@dataclass(frozen=True)
class RowSplit:
    """How the input channels of a row-parallel linear are dealt to the ranks; `gathered`: each sees the whole input."""

    parts: tuple[Part, ...]
    gathered: bool


def column_part(scheme: Scheme, in_features: int, rows: tuple[int, int]) -> Part:
    """Rows [start, stop) over all channels."""
    return Part(rows, (0, scheme.body(in_features)), True)


def split_rows(
    name: str, scheme: Scheme, out_features: int, in_features: int, ranks: int, *, permuted: bool, kernels: bool
) -> RowSplit:
    """The parts of a row-parallel linear; with `kernels` they end where the kernels' blocks of channels do.

    Raises UnsupportedError when there are fewer pieces than ranks.
    """
    rows, body = (0, out_features), scheme.body(in_features)
    if ranks == 1:
        return RowSplit((Part(rows, (0, body), True),), False)
    piece = _piece(scheme, kernels)
    if not permuted and _codes_are_local(scheme) and _borders_fit(scheme, in_features, ranks, piece):
        width = in_features // ranks
        own = tuple(
            Part(rows, (rank * width, min((rank + 1) * width, body)), rank == ranks - 1) for rank in range(ranks)
        )
        return RowSplit(own, False)
    bounds = _deal(body, scheme.outliers, piece, ranks)
    if bounds is None:
        raise UnsupportedError(
            f"{name} has {body} body channels in pieces of {piece} and {scheme.outliers} outliers, which "
            f"tensor_parallel_size {ranks} can't split",
            "Use fewer ranks",
        )
    parts = (Part(rows, span, rank == ranks - 1) for rank, span in enumerate(bounds))
    return RowSplit(tuple(parts), True)


def tensor_part(suffix: str, tensor: Tensor, scheme: Scheme, in_features: int, part: Part) -> Tensor:
    """The part's share of a checkpoint tensor of a linear; a linear's permutation and signs stay whole."""
    if suffix in ("permutation", "signs", "weight_tensor_scale"):
        return tensor
    tensor = tensor[part.rows[0] : part.rows[1]]
    start, stop = part.body
    if suffix == "weight_packed":
        return tensor[:, start // 2 : -(-stop // 2)]
    if suffix == "weight_codes":
        return tensor[:, start:stop]
    if suffix == "weight":
        return tensor.index_select(1, part.channels(scheme, in_features).to(tensor.device))
    if suffix in ("weight_scale", "weight_exponent", "weight_multiplier"):
        group = scheme.weights.group
        assert group is not None
        return tensor[:, start // group : group_count(stop, group)]
    return tensor


def slice_operand(operand: Operand, layout: KernelLayout, part: Part) -> Operand:
    """The k-blocks of a quantized input that a part multiplies: views, but for the scales of s8 groups."""
    first, last = part.body[0] // BLOCK, -(-part.body[1] // BLOCK)
    codes, outliers, scales = operand.codes, operand.outlier_codes, operand.group_scales
    planes = max(1, codes.shape[0] // layout.blocks)  # two of a k-block where inputs are fp16 numbers
    held = codes[planes * first : codes.shape[0] if part.outliers and last == layout.body_blocks else planes * last]
    if scales.dim() == 3:
        scales = scales[first:last]
    elif scales.numel():
        per_block = scales.shape[0] // layout.body_blocks
        scales = scales[first * per_block : last * per_block]
    return operand._replace(codes=held, outlier_codes=outliers if part.outliers else outliers[:0], group_scales=scales)


def _piece(scheme: Scheme, kernels: bool) -> int:
    """Channels that stay together: whole groups, whole bytes, whole k-blocks."""
    widths = [2, scheme.weights.group or 1, scheme.activations.group or 1]
    return max(*widths, BLOCK if kernels else 1)  # groups are powers of two


def _codes_are_local(scheme: Scheme) -> bool:
    """Whether the code of a body channel depends on its own group only."""
    return scheme.activations.element == "float" or scheme.activations.scale in ("fp16", "e8m0")


def _borders_fit(scheme: Scheme, in_features: int, ranks: int, piece: int) -> bool:
    block = max(piece, scheme.hadamard_block) if scheme.transform == "hadamard" else piece
    width, left = divmod(in_features, ranks)
    return not left and width % block == 0 and scheme.outliers < width


def _deal(body: int, outliers: int, piece: int, ranks: int) -> list[tuple[int, int]] | None:
    """Body channels of each rank, evenly with the outliers counted to the last; None where a rank would have none."""
    pieces, tail = -(-body // piece), -(-outliers // piece)
    ends = [min(round((rank + 1) * (pieces + tail) / ranks), pieces - (ranks - 1 - rank)) for rank in range(ranks)]
    ends[-1] = pieces
    starts = [0, *ends[:-1]]
    if any(stop <= start for start, stop in zip(starts, ends, strict=True)):
        return None
    return [(start * piece, min(stop * piece, body)) for start, stop in zip(starts, ends, strict=True)]
