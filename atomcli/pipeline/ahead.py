"""Reading ahead: the next block comes from the disk while the present one is worked on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from atomcli.pipeline.model import Walk


class Ahead:
    """Reads the next block of a model into the host's memory while the present one is worked on."""

    def __init__(self, walk: Walk, pool: ThreadPoolExecutor) -> None:
        self._walk, self._pool = walk, pool
        self._coming: dict[int, Future[dict[str, Tensor]]] = {}

    def take(self, index: int) -> dict[str, Tensor]:
        """The tensors of block `index` on the device, by their names in the block."""
        coming = self._coming.pop(index, None) or self._pool.submit(self._walk.load, index)
        held = coming.result()
        del coming
        if index + 1 < self._walk.blocks:
            self._coming[index + 1] = self._pool.submit(self._walk.load, index + 1)
        return self._walk.place(held)
