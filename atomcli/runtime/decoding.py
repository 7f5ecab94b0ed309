"""Decode steps of many sequences on static buffers, as CUDA graphs for a ladder of batch sizes.

Python decides who decodes, the graph runs: a step reads each row's pending token, stores its key and value, chooses the
next token and leaves it, with the row's new length, where the next step reads them. Rows without a sequence have length
0 and touch nothing. On a CPU, and for models whose steps ask the host something, the same step runs as plain calls.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from atomcli.runtime.fused import FusedModel
from atomcli.runtime.sampling import GREEDY, Sampling, greedy, sample

_DENSE_LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96)


def ladder(rows: int) -> tuple[int, ...]:
    """The batch sizes that are captured for up to `rows` sequences; a step takes the next one that holds it."""
    steps = [*(size for size in _DENSE_LADDER if size < rows), *range(128, rows, 64), rows]
    return tuple(sorted(set(steps)))


class DecodeRows:
    """Up to `rows` sequences that decode together; row i of the buffers is sequence i.

    `pools` are the model's pages; a row's table has room for `pages` of them.
    """

    def __init__(self, model: FusedModel, pools: Sequence[Tensor], rows: int, pages: int) -> None:
        self.model, self.pools, self.rows = model, pools, rows
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
        self._stale = False
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle() if model.capturable else None
        self.logits: Tensor | None = None

    def place(self, row: int, token: int, length: int, pages: Sequence[int], sampling: Sampling = GREEDY) -> None:
        """Put a sequence into a row: its pending token, its number of cached tokens and its pages."""
        self._host["tokens"][row], self._host["lengths"][row] = token, length
        self._host["temperature"][row], self._host["top_p"][row] = sampling.temperature, sampling.top_p
        self._host["seeds"][row] = sampling.seed
        self.set_pages(row, pages)

    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        """The pages of a row's sequence, after it was given more."""
        self._host["page_table"][row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self._stale = True

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
        return self.finish(active)

    def start(self, active: int, sampled: bool = False) -> None:
        """Enqueue one step of the first `active` rows; without `sampled` every row is greedy."""
        size = next(size for size in self.sizes if size >= active)
        if self._memory is not None and (size, sampled) not in self._graphs:
            self.capture(size, sampled)
        if self._stale:
            for name, buffer in self._host.items():
                self._device[name].copy_(buffer, non_blocking=True)
            self._stale = False
        if self._memory is None:
            self.logits = self._run(active, sampled)
        else:
            graph, self.logits = self._graphs[size, sampled]
            graph.replay()

    def finish(self, active: int) -> list[int]:
        """Wait for the step that was started last: the chosen tokens of the first `active` rows."""
        chosen = self._device["tokens"][:active].cpu()
        self._host["tokens"][:active] = chosen
        self._host["lengths"][:active] += 1
        tokens: list[int] = chosen.tolist()
        return tokens

    def capture(self, size: int, sampled: bool = False) -> None:
        """Capture the step of `size` rows; all graphs share one pool of memory, so the largest should come first."""
        self._device["lengths"].zero_()  # idle rows: what runs here to warm up stores nothing
        self._stale = True
        side = torch.cuda.Stream(self.model.device)
        side.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(side):
            self._run(size, sampled)
        torch.cuda.current_stream(self.model.device).wait_stream(side)
        torch.cuda.synchronize(self.model.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits = self._run(size, sampled)
        self._graphs[size, sampled] = (graph, logits)

    @torch.inference_mode()
    def _run(self, rows: int, sampled: bool) -> Tensor:
        tokens, lengths, table, temperature, top_p, seeds = (buffer[:rows] for buffer in self._device.values())
        active, positions, page = lengths > 0, lengths.long(), self.model.format.page
        pages = table.gather(1, (positions // page)[:, None])[:, 0].long()
        slots = torch.where(active, pages * page + positions % page, -1)
        grown = lengths + active
        step = self.model.step(positions, slots, table, grown)
        logits = self.model.logits(*self.model.hidden(tokens, step, self.pools))
        chosen = sample(logits, temperature, top_p, seeds, positions) if sampled else greedy(logits)
        tokens.copy_(chosen)
        lengths.copy_(grown)
        return logits
