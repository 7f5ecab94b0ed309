"""Hidden states that stay on the GPU from block to block, so that a block waits for neither the bus nor the disk.

Their files are written all the same, beside the work, for the run to continue from. As many slots as a share of the
GPU's memory allows are held, from the first; the others, and all of them once memory runs out, go through the files.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from torch import Tensor

# Of the GPU's memory: 2 GB of 80 hold 128 sequences of 2048 tokens and 4096 channels.
_SHARE = 1 / 16
# Slots whose copies in the host's memory wait for the disk; the work waits for the oldest when there are more.
WAITING = 8
# One thread writes 4 GB a second into an ext4's page cache, four into a file each 14 (16 cores of an H100's host).
_WRITERS = 4


class Held:
    """The hidden states of one run's slots, each (sequences, tokens, hidden), by the slot's first sequence.

    There is one generation of them: what comes out of a block takes the place of what went in.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self.device, self.limit = device, limit
        self._slots: dict[int, Tensor] = {}
        self._full = False
        self._pool = ThreadPoolExecutor(_WRITERS, "atom")
        self._waiting: deque[tuple[Path, Future[None]]] = deque()

    def slot(self, rows: range) -> Tensor | None:
        """What is held of these sequences."""
        return self._slots.get(rows.start) if rows else None

    def room(self, rows: range, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Where the hidden states of these sequences go, each of `shape`; None where they are only in the file.

        It is theirs until `keep`: what goes into a block may be read from the file while what comes out is put here.
        """
        found = self.slot(rows)
        if found is not None or self._full or not rows:
            return found
        size = len(rows) * math.prod(shape) * dtype.itemsize
        if size + sum(slot.nbytes for slot in self._slots.values()) > self.limit:
            self._full = True
            return None
        try:
            return torch.empty(len(rows), *shape, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError:
            self._full = True
            return None

    def keep(self, rows: range, slot: Tensor) -> None:
        """What was put into the `room` of these sequences is whole: it is read from there."""
        if not self._full or rows.start in self._slots:
            self._slots[rows.start] = slot

    def release(self) -> bool:
        """Hold nothing from here on; whether that gave any memory back."""
        held, self._full = bool(self._slots), True
        self._slots.clear()
        return held

    def make_room(self, needed: int) -> None:
        """Hold nothing from here on where the device has fewer than `needed` bytes left."""
        if free_bytes(self.device) < needed:
            self.release()

    def copy_out(self, slot: Tensor, path: Path, write: Callable[[Tensor], None]) -> None:
        """Begin to `write` a copy of a slot, which the next block will change, to its file."""
        while len(self._waiting) >= WAITING:
            self._waiting.popleft()[1].result()
        copies, arrived = begin_copy({path.name: slot}, copy=True)

        def write_when_there() -> None:
            arrived()
            write(copies.pop(path.name))

        self._waiting.append((path, self._pool.submit(write_when_there)))

    def settle(self, path: Path) -> None:
        """Wait until what was begun for a file is in it; what went wrong is raised here."""
        for of, writing in list(self._waiting):
            if of == path:
                writing.result()


def begin_copy(tensors: Mapping[str, Tensor], copy: bool = False) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Tensors in the host's memory, and what to call, from any thread, before they are read there.

    A GPU copies them into pinned memory beside its work, fifty times as fast as into fresh pages. What is in the host's
    memory already is copied with `copy` only.
    """
    copies = {name: tensor.detach().to("cpu", non_blocking=True, copy=copy) for name, tensor in tensors.items()}
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return copies, lambda: None
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    return copies, done.synchronize


def free_bytes(device: torch.device) -> int:
    """Bytes of a device that nobody uses, those that torch keeps for later included."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def held_on(device: torch.device) -> Held | None:
    """Where a run on `device` holds its hidden states; None on a CPU, whose memory is where files are read to."""
    if device.type != "cuda":
        return None
    return Held(device, int(torch.cuda.get_device_properties(device).total_memory * _SHARE))
