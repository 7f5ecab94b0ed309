"""The start of a decode step in one kernel: slots, rotations and embeddings of every row's pending token.

cuda/begin_decode.cu on a GPU, the same in torch elsewhere. One torch operator, `atom::begin_decode`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SOURCE, ENTRY = "begin_decode.cu", "begin_decode"
THREADS = 256
PIECE = 16  # bytes that a thread copies at once


class Pending(NamedTuple):
    """Of B rows: positions int64 (B,), slots int64 (B,), cos and sin fp32 (B, head_dim / 2), embedded (B, hidden)."""

    positions: Tensor
    slots: Tensor
    cos: Tensor
    sin: Tensor
    embedded: Tensor


def begin_decode(
    tokens: Tensor, lengths: Tensor, page_table: Tensor, page: int, cos: Tensor, sin: Tensor, embedding: Tensor
) -> Pending:
    """Of B rows that hold `lengths` int32 (B,) tokens each and are about to take `tokens` int64 (B,).

    page_table int32 (B, pages) of `page` tokens; cos and sin fp32 (positions, head_dim / 2) of every position;
    embedding (vocabulary, hidden). Lengths grow by one in place; a row of length 0 stays idle and has a negative slot.
    """
    if tokens.is_cuda and embedding.shape[1] * embedding.element_size() % PIECE == 0:
        return Pending(*torch.ops.atom.begin_decode(tokens, lengths, page_table, page, cos, sin, embedding))
    active, positions = lengths > 0, lengths.long()
    held = page_table.gather(1, (positions // page)[:, None])[:, 0].long()
    slots = torch.where(active, held * page + positions % page, -1)
    lengths += active
    return Pending(positions, slots, cos[positions], sin[positions], torch.nn.functional.embedding(tokens, embedding))


def _outputs(tokens: Tensor, cos: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = len(tokens)
    positions, slots = torch.empty_like(tokens), torch.empty_like(tokens)
    row_cos, row_sin = cos.new_empty((rows, cos.shape[1])), cos.new_empty((rows, cos.shape[1]))
    return positions, slots, row_cos, row_sin, embedding.new_empty((rows, embedding.shape[1]))


@torch.library.custom_op("atom::begin_decode", mutates_args=("lengths",), device_types="cuda")
def _begin_decode(
    tokens: Tensor, lengths: Tensor, page_table: Tensor, page: int, cos: Tensor, sin: Tensor, embedding: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from atomcli.kernels.compiler import load_kernel

    results = _outputs(tokens, cos, embedding)
    positions, slots, row_cos, row_sin, embedded = results
    if len(tokens):
        load_kernel(SOURCE, ENTRY, tokens.device).launch(
            len(tokens), THREADS, tokens, lengths, page_table, cos, sin, embedding, positions, slots, row_cos, row_sin,
            embedded, page, page_table.stride(0), cos.shape[1],
            embedding.shape[1] * embedding.element_size() // PIECE, overlap=True,
        )  # fmt: skip
    return results


@_begin_decode.register_fake
def _begin_decode_fake(
    tokens: Tensor, lengths: Tensor, page_table: Tensor, page: int, cos: Tensor, sin: Tensor, embedding: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _outputs(tokens, cos, embedding)
