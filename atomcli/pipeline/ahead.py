"""Beside the work: the next block comes from the disk, and the last one goes there."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from atomcli.pipeline.held import Held
from atomcli.pipeline.model import Walk


class Ahead:
    """Reads the next block of a model into the host's memory while the present one is worked on."""

    def __init__(self, walk: Walk, pool: ThreadPoolExecutor, held: Held | None = None) -> None:
        self._walk, self._pool, self._held = walk, pool, held
        self._coming: dict[int, Future[dict[str, Tensor]]] = {}

    def take(self, index: int) -> dict[str, Tensor]:
        """The tensors of block `index` on the device, by their names in the block; what is held there makes room."""
        coming = self._coming.pop(index, None) or self._pool.submit(self._walk.load, index)
        arrived = coming.result()
        del coming
        if index + 1 < self._walk.blocks:
            self._coming[index + 1] = self._pool.submit(self._walk.load, index + 1)
        if self._held is not None:
            self._held.make_room(sum(tensor.nbytes for tensor in arrived.values()))
        return self._walk.place(arrived)


class Behind:
    """Writes what a block came to while the next one is worked on: never more than one block."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._writing: Future[None] | None = None

    def write(self, work: Callable[[], None]) -> None:
        """Begin `work` when the one before is done; what that one raised is raised here."""
        self.settle()
        self._writing = self._pool.submit(work)

    def settle(self) -> None:
        """Wait until all that was begun is done."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()
