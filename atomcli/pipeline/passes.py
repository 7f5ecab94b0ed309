"""All calibration sequences through the embedding, or through a block: from one generation of a stream to the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from atomcli.models.tensors import block_name
from atomcli.pipeline.model import Walk
from atomcli.pipeline.ranks import Ranks
from atomcli.pipeline.stream import AtOnce, Stream, run
from atomcli.runtime.decoder import embed, read_outer


def embedded(walk: Walk, tokens: Tensor, rows: Iterable[range]) -> Iterator[Iterator[Tensor]]:
    """The first block's input, for each range of rows one sequence at a time."""
    model = read_outer(walk.family, walk.source)

    def one_by_one(part: range) -> Iterator[Tensor]:
        with torch.inference_mode():
            for row in part:
                yield embed(model, tokens[row : row + 1])

    for part in rows:
        yield one_by_one(part)


def write_embedded(walk: Walk, tokens: Tensor, stream: Stream, rows: list[range]) -> None:
    """Begin a stream: the first block's input for these ranges of its sequences."""
    for part, outputs in zip(rows, embedded(walk, tokens, rows), strict=True):
        stream.part(part).write(outputs, "the embedding", sync=False)


def pass_through(
    walk: Walk, block: nn.Module, index: int, before: Stream, after: Stream, at_once: AtOnce, ranks: Ranks
) -> None:
    """Run a block over the sequences of this process."""
    for rows, _ in ranks.rounds(before.shape[0]):
        outputs = run(before.part(rows), at_once, lambda chunk: walk.forward(block, index, chunk))
        after.part(rows).write(outputs, block_name(index), sync=False)


def drop(stream: Stream, ranks: Ranks) -> None:
    """Delete a generation when every process is done with it."""
    stream.settle()
    ranks.wait()
    if ranks.first:
        stream.remove()
