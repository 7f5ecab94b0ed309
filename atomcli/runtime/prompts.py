"""Short prompts on static buffers, as CUDA graphs: launched one by one, a block's kernels take longer than they run.

A pass of up to 512 tokens of up to 8 sequences is padded to the next size. Padding tokens store nothing and belong to
no sequence; what comes out for them is never looked at.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from atomcli.runtime.fused import FusedModel
from atomcli.runtime.graphs import capture

SIZES = (32, 64, 128, 256, 512)
ROWS = 8


class PromptRows:
    """Prefills of a few tokens; `pools` are the model's pages, a sequence's table has room for `pages` of them."""

    def __init__(self, model: FusedModel, pools: Sequence[Tensor], pages: int) -> None:
        self.model, self.pools = model, pools
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "tokens": ((SIZES[-1],), torch.int64),
            "positions": ((SIZES[-1],), torch.int64),
            "slots": ((SIZES[-1],), torch.int64),
            "table": ((ROWS, pages), torch.int32),
            "starts": ((ROWS + 1,), torch.int32),
            "lengths": ((ROWS,), torch.int32),
        }
        self._device = {
            name: torch.zeros(shape, dtype=dtype, device=model.device) for name, (shape, dtype) in shapes.items()
        }
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle() if model.capturable else None

    def fits(self, tokens: int, sequences: int) -> bool:
        """Whether a pass of so many tokens and sequences can run here."""
        return tokens <= SIZES[-1] and sequences <= ROWS

    @torch.inference_mode()
    def run(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, table: Tensor, starts: Tensor, lengths: Tensor
    ) -> Tensor:
        """Logits (sequences, vocabulary) after each sequence's last token here; arguments as in `FusedModel.step`."""
        size = next(size for size in SIZES if size >= len(tokens))
        sequences = len(lengths)
        if self._memory is not None and size not in self._graphs:
            self._capture(size)
        self._device["slots"].fill_(-1)
        self._device["lengths"].zero_()
        for name, values in (("tokens", tokens), ("positions", positions), ("slots", slots), ("lengths", lengths)):
            self._device[name][: len(values)] = values
        self._device["table"][:sequences, : table.shape[1]] = table
        self._device["starts"][: sequences + 1] = starts
        self._device["starts"][sequences + 1 :] = starts[-1]
        if self._memory is None:
            return self._run(size)[:sequences]
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:sequences]

    def _capture(self, size: int) -> None:
        self._device["slots"].fill_(-1)
        self._device["lengths"].zero_()
        self._device["starts"].zero_()
        self._graphs[size] = capture(partial(self._run, size), self.model.device, self._memory)

    def _run(self, size: int) -> Tensor:
        tokens, positions, slots = (self._device[name][:size] for name in ("tokens", "positions", "slots"))
        starts = self._device["starts"]
        step = self.model.step(positions, slots, self._device["table"], self._device["lengths"], query_starts=starts)
        x, residual = self.model.hidden(tokens, step, self.pools)
        last = (starts[1:].long() - 1).clamp(min=0)
        return self.model.logits(x[last], residual[last])
