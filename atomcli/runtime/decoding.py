"""Decode steps of many sequences on static buffers, as CUDA graphs for a ladder of batch sizes.

Python decides who decodes, the graph runs: a step reads each row's pending token, stores its key and value, chooses the
next token and leaves it, with the row's new length, where the next step reads them. Rows without a sequence have length
0 and touch nothing. On a CPU, and for models whose steps ask the host something, the same step runs as plain calls.
"""

from collections import deque
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from atomcli.runtime.fused import FusedModel
from atomcli.runtime.graphs import capture
from atomcli.runtime.sampling import GREEDY, Sampling, greedy, sample

_DENSE_LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96)


def ladder(rows: int) -> tuple[int, ...]:
    """The batch sizes that are captured for up to `rows` sequences; a step takes the next one that holds it."""
    steps = [*(size for size in _DENSE_LADDER if size < rows), *range(128, rows, 64), rows]
    return tuple(sorted(set(steps)))


class _Flight:
    """A step under way: its tokens on their way to the host."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=tokens.is_cuda)
        self._tokens.copy_(tokens, non_blocking=True)
        self._landed = torch.cuda.Event() if tokens.is_cuda else None
        if self._landed is not None:
            self._landed.record()

    def tokens(self) -> Tensor:
        """The chosen tokens int64 (rows,), once they are there."""
        if self._landed is not None:
            self._landed.synchronize()
        return self._tokens


class DecodeRows:
    """Up to `rows` sequences that decode together; row i of the buffers is sequence i.

    `pools` are the model's pages; a row's table has room for `pages` of them. A step may be started before the tokens
    of the one before are read, as long as no row was changed: the device needs nothing of the host in between.
    """

    def __init__(self, model: FusedModel, pools: Sequence[Tensor], rows: int, pages: int) -> None:
        self.model, self.pools, self.rows, self.pages = model, pools, rows, pages
        self.sizes = ladder(rows)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "tokens": ((rows,), torch.int64),
            "lengths": ((rows,), torch.int32),
            "page_table": ((rows, pages), torch.int32),
            "temperature": ((rows,), torch.float32),
            "top_p": ((rows,), torch.float32),
            "seeds": ((rows,), torch.int64),
        }
        on_gpu = model.device.type == "cuda"
        self._host = {
            name: torch.zeros(shape, dtype=dtype, pin_memory=on_gpu) for name, (shape, dtype) in shapes.items()
        }
        self._device = {name: tensor.to(model.device, copy=True) for name, tensor in self._host.items()}
        self._stale = self._table_stale = False
        self._flights: deque[_Flight] = deque()
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle() if model.capturable else None
        self.logits: Tensor | None = None

    def place(self, row: int, token: int, length: int, pages: Sequence[int], sampling: Sampling = GREEDY) -> None:
        """Put a sequence into a row: its pending token, its number of cached tokens and its pages."""
        self._stale = True
        self._host["tokens"][row], self._host["lengths"][row] = token, length
        self._host["temperature"][row], self._host["top_p"][row] = sampling.temperature, sampling.top_p
        self._host["seeds"][row] = sampling.seed
        self.set_pages(row, pages)

    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        """The pages of a row's sequence, after it was given more; possible while a step is under way."""
        self._host["page_table"][row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self._table_stale = True

    def move(self, source: int, target: int) -> None:
        """Move a sequence to another row, and leave its own idle."""
        if source != target:
            for buffer in self._host.values():
                buffer[target] = buffer[source]
        self._host["lengths"][source] = 0
        self._stale = True

    def step(self, active: int, sampled: bool = False) -> list[int]:
        """Decode one token of each of the first `active` rows; the chosen tokens, which are pending now."""
        self.start(active, sampled)
        return self.finish()

    @property
    def can_go_ahead(self) -> bool:
        """Whether another step may be started before the last one's tokens are read."""
        return not self._stale

    def start(self, active: int, sampled: bool = False) -> None:
        """Enqueue one step of the first `active` rows; without `sampled` every row is greedy."""
        assert not (self._stale and self._flights), "rows were changed while a step was under way"
        size = next(size for size in self.sizes if size >= active)
        if self._memory is not None and (size, sampled) not in self._graphs:
            self.capture(size, sampled)
        stale = self._host if self._stale else ("page_table",) if self._table_stale else ()
        for name in stale:
            self._device[name].copy_(self._host[name], non_blocking=True)
        self._stale = self._table_stale = False
        if self._memory is None:
            self.logits = self._run(active, sampled)
        else:
            graph, self.logits = self._graphs[size, sampled]
            graph.replay()
        self._flights.append(_Flight(self._device["tokens"][:active]))

    def finish(self) -> list[int]:
        """Wait for the oldest step that was started and not finished yet: the tokens its rows chose."""
        chosen = self._flights.popleft().tokens()
        self._host["tokens"][: len(chosen)] = chosen
        self._host["lengths"][: len(chosen)] += 1
        tokens: list[int] = chosen.tolist()
        return tokens

    def capture(self, size: int, sampled: bool = False) -> None:
        """Capture the step of `size` rows; all graphs share one pool of memory, so the largest should come first."""
        self._device["lengths"].zero_()  # idle rows: what runs here to warm up stores nothing
        self._stale = True
        self._graphs[size, sampled] = capture(partial(self._run, size, sampled), self.model.device, self._memory)

    @torch.inference_mode()
    def _run(self, rows: int, sampled: bool) -> Tensor:
        tokens, lengths, table, temperature, top_p, seeds = (buffer[:rows] for buffer in self._device.values())
        step, positions = self.model.decode_step(tokens, lengths, table)
        logits = self.model.logits(*self.model.hidden(tokens, step, self.pools))
        if sampled:
            tokens.copy_(sample(logits, temperature, top_p, seeds, positions))
        else:
            greedy(logits, out=tokens)
        return logits
