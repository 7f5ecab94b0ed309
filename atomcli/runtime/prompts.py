"""Prompts as CUDA graphs, a pass of some tokens of some sequences at a time: launched one by one, the kernels of a pass
take longer than they run.

On a card a pass of up to 2048 tokens of up to 8 sequences is padded to the next size that is captured. Padding tokens
store nothing and belong to no sequence; what comes out for them is never looked at.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from atomcli.runtime.fused import FusedModel
from atomcli.runtime.graphs import capture

SIZES = (32, 64, 128, 256, 512, 768, 1024, 1536, 2048)
ROWS = 8
_BUFFERS = ("tokens", "positions", "slots", "table", "starts", "lengths")


class Piece(NamedTuple):
    """Tokens of one sequence to compute, after the `start` tokens whose keys and values lie in its pages already."""

    tokens: Sequence[int] | np.ndarray
    start: int
    pages: Sequence[int]

    @property
    def end(self) -> int:
        """Tokens of the sequence that are cached afterwards."""
        return self.start + len(self.tokens)


class PromptRows:
    """Prefills in pages; `pools` are the model's, a sequence's table has room for `pages` of them."""

    def __init__(self, model: FusedModel, pools: Sequence[Tensor], pages: int) -> None:
        self.model, self.pools, self.pages = model, pools, pages
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle() if model.capturable else None
        if self._memory is not None:
            self._device = {name: tensor.to(model.device) for name, tensor in self._idle(SIZES[-1]).items()}

    @torch.inference_mode()
    def logits(self, pieces: Sequence[Piece]) -> Tensor:
        """Logits (pieces, vocabulary) after the last token of each; stores keys and values of all of them.

        On a card they lie where the next pass of this size writes its own.
        """
        size = sum(len(piece.tokens) for piece in pieces)
        if self._memory is None or size > SIZES[-1] or len(pieces) > ROWS:
            width = max(-(-piece.end // self.model.format.page) for piece in pieces)
            buffers = self._filled(pieces, size, len(pieces), width)
            return self._run({name: tensor.to(self.model.device) for name, tensor in buffers.items()}, size)
        size = next(captured for captured in SIZES if captured >= size)
        if size not in self._graphs:
            self._load(self._idle(size))
            self._graphs[size] = capture(partial(self._run, self._device, size), self.model.device, self._memory)
        self._load(self._filled(pieces, size, ROWS, self.pages))
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[: len(pieces)]

    def _idle(self, size: int) -> dict[str, Tensor]:
        """A pass of padding alone."""
        return self._filled([], size, ROWS, self.pages)

    def _filled(self, pieces: Sequence[Piece], size: int, rows: int, width: int) -> dict[str, Tensor]:
        """What a pass of `size` tokens of `rows` sequences reads, on the host."""
        page = self.model.format.page
        tokens, positions = np.zeros(size, np.int64), np.zeros(size, np.int64)
        slots = np.full(size, -1, np.int64)
        table = np.zeros((rows, width), np.int32)
        starts, lengths = np.zeros(rows + 1, np.int32), np.zeros(rows, np.int32)
        begin = 0
        for row, piece in enumerate(pieces):
            end = begin + len(piece.tokens)
            held = np.asarray(piece.pages[:width], np.int64)
            new = np.arange(piece.start, piece.end)
            tokens[begin:end], positions[begin:end] = piece.tokens, new
            slots[begin:end] = held[new // page] * page + new % page
            table[row, : len(held)] = held
            starts[row + 1], lengths[row] = end, piece.end
            begin = end
        starts[len(pieces) + 1 :] = begin
        arrays = (tokens, positions, slots, table, starts, lengths)
        return dict(zip(_BUFFERS, map(torch.from_numpy, arrays), strict=True))

    def _load(self, buffers: dict[str, Tensor]) -> None:
        for name, values in buffers.items():
            self._device[name][: len(values)].copy_(values)

    def _run(self, buffers: dict[str, Tensor], size: int) -> Tensor:
        tokens, positions, slots, table, starts, lengths = (buffers[name] for name in _BUFFERS)
        tokens, positions, slots = (buffer[:size] for buffer in (tokens, positions, slots))
        step = self.model.step(positions, slots, table, lengths, query_starts=starts)
        x, residual = self.model.hidden(tokens, step, self.pools)
        last = (starts[1:].long() - 1).clamp(min=0)
        return self.model.logits(x[last], residual[last])
