"""The stream: hidden states of the calibration sequences between two blocks, kept in files.

Each generation of the stream has a file for each slot of sequences, written from front to back and read in chunks of a
few sequences: processes and threads that write at once would wait for one another in one file. The page cache keeps
them in memory as long as there is room, and a full disk is an error instead of a crash.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from atomcli.checkpoint.files import write_error
from atomcli.errors import InputError, RunError
from atomcli.pipeline.held import Held

T = TypeVar("T")
_LOG = logging.getLogger("atomcli")

# Chunks of sequences are so large that the widest activation of a block takes about this much memory in fp32: on the
# CPU what malloc reuses without asking the system (twice as fast as 64 MiB), on a GPU enough to fill it.
_CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
# Bytes to which torch aligns what it allocates: products may differ in the last bit by where their operands lie.
_ALIGNMENT = 512


class Stream:
    """Hidden states (sequences, tokens, hidden) in `dtype`, or those of some of the sequences (`rows`).

    `path` names the generation. What is written as one part is read as that part, from a file of its own. What `held`
    has of it is read from there; it is of the generation that was written last.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        rows: range | None = None,
        held: Held | None = None,
    ) -> None:
        self.path, self.shape, self.dtype, self.held = path, shape, dtype, held
        self.rows = range(shape[0]) if rows is None else rows

    def part(self, rows: range) -> Stream:
        """The same stream, of which only these sequences are read and written."""
        return Stream(self.path, self.shape, self.dtype, rows, self.held)

    def at(self, path: Path) -> Stream:
        """Another generation of the same sequences, in another file."""
        return Stream(path, self.shape, self.dtype, self.rows, self.held)

    @property
    def file(self) -> Path:
        """Where these sequences are."""
        if len(self.rows) == self.shape[0]:
            return self.path
        return self.path.with_name(f"{self.path.stem}.{self.rows.start:05d}{self.path.suffix}")

    def remove(self) -> None:
        """Delete a generation: the files of all parts."""
        self.settle()
        for file in (self.path, *self.path.parent.glob(f"{self.path.stem}.*{self.path.suffix}")):
            file.unlink(missing_ok=True)

    @property
    def _bytes(self) -> int:
        return len(self.rows) * math.prod(self.shape[1:]) * self.dtype.itemsize

    def chunks(self, sequences: int) -> Iterator[Tensor]:
        """The hidden states, `sequences` at a time, each (n, tokens, hidden); InputError when the file is damaged."""
        if self.held is not None and (slot := self.held.slot(self.rows)) is not None:
            yield from (chunk.clone() if chunk.data_ptr() % _ALIGNMENT else chunk for chunk in slot.split(sequences))
            return
        self.settle()
        if not self.rows:
            return
        if not self.file.is_file() or self.file.stat().st_size != self._bytes:
            raise InputError(
                f"{self.file}, which the journal mentions, is missing or has the wrong size",
                f"Delete {self.path.parent} and run the same command again",
            )
        with self.file.open("rb", buffering=0) as file:
            for start in range(0, len(self.rows), sequences):
                rows = min(sequences, len(self.rows) - start)
                chunk = torch.empty(rows, *self.shape[1:], dtype=self.dtype)
                view, filled = memoryview(chunk.view(-1).view(torch.uint8).numpy().data), 0
                while filled < len(view):
                    read = file.readinto(view[filled:])
                    if not read:
                        raise InputError(f"{self.file} ended while it was read", "Run the same command again")
                    filled += read
                yield chunk

    def write(self, chunks: Iterator[Tensor], where: str, sync: bool = True) -> None:
        """Write all of its sequences; `where` names what put them out. RunError when not finite or the disk is full.

        Without `sync` the caller calls `settle` before it relies on the file.
        """
        slot = self.held.room(self.rows, self.shape[1:], self.dtype) if self.held is not None else None
        if not self.rows:
            return
        written = self._write_to_file(chunks, where) if slot is None else self._hold(slot, chunks, where)
        if written != len(self.rows):
            raise RunError(f"{where} put out {written} sequences of hidden states instead of {len(self.rows)}")
        if sync:
            self.sync()

    def _hold(self, slot: Tensor, chunks: Iterator[Tensor], where: str) -> int:
        """Put all chunks where the GPU holds them, and begin to write them to the file; returns their sequences."""
        assert self.held is not None
        written = 0
        for chunk in chunks:
            slot[written : written + chunk.shape[0]] = chunk
            written += chunk.shape[0]
        check_finite(slot, where)
        self.held.keep(self.rows, slot)

        def write(copy: Tensor) -> None:
            with self._opened() as file:
                _write_all(file, copy.view(-1))

        self.held.copy_out(slot, self.path, write)
        return written

    def _write_to_file(self, chunks: Iterator[Tensor], where: str) -> int:
        """Write all chunks, each while the next is computed; returns their sequences."""
        written = 0
        with self._opened() as file, ThreadPoolExecutor(1, "atom") as pool:
            writing: Future[None] | None = None
            for chunk in chunks:
                check_finite(chunk, where)
                flat = chunk.detach().to("cpu", self.dtype).contiguous().view(-1)
                if writing is not None:
                    writing.result()
                writing = pool.submit(_write_all, file, flat)
                written += chunk.shape[0]
            if writing is not None:
                writing.result()
        return written

    @contextmanager
    def _opened(self) -> Iterator[FileIO]:
        """The file, to be written; RunError says how much of it the disk didn't take."""
        missing = self._bytes
        try:
            with self.file.open("wb", buffering=0) as file:
                try:
                    yield file
                finally:
                    missing -= file.tell()
        except OSError as error:
            raise write_error(self.file, error, self._bytes, missing) from error

    def settle(self) -> None:
        """Wait until all that was written is in the file, where a process that dies can't lose it."""
        if self.held is not None:
            self.held.settle(self.path)

    def sync(self) -> None:
        """Make what was written survive a power cut as well; RunError when the disk doesn't take it."""
        self.settle()
        try:
            with self.file.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(self.file, error, 0, 0) from error


def _write_all(file: FileIO, values: Tensor) -> None:
    """Write all bytes of values (n,) to an unbuffered file, which may take less than it is given."""
    data, done = memoryview(values.view(torch.uint8).numpy().data), 0
    while done < len(data):
        done += file.write(data[done:])


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items (chunks, blocks), each read while one works on the one before."""
    with ThreadPoolExecutor(1, "atom") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def check_finite(x: Tensor, where: str) -> None:
    """RunError naming `where` when x holds NaN or Inf."""
    low, high = torch.aminmax(x.detach())
    if not bool(torch.isfinite(low)) or not bool(torch.isfinite(high)):
        count = int((~torch.isfinite(x)).sum())
        raise RunError(
            f"{where} put out {count} NaN or Inf of {x.numel()} values",
            "The model overflows in its own dtype, or its weights are damaged; nothing was published.",
        )


def chunk_sequences(tokens: int, width: int, device: torch.device) -> int:
    """How many sequences of `tokens` go through a block at a time, whose widest activation has `width` channels."""
    return max(1, _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cpu"]) // (4 * tokens * width))


class AtOnce:
    """How many sequences go through a block together; fewer from where memory runs out, which changes no result."""

    def __init__(self, sequences: int) -> None:
        self.sequences = sequences

    def halve(self, sequences: int, error: Exception) -> None:
        """Memory ran out with so many sequences: says so; RunError when it doesn't suffice for one."""
        if sequences == 1:
            raise RunError(
                f"Memory does not suffice for one sequence in one block: {_short(error)}",
                "Give fewer tokens with --sequence-length, or take a larger machine; finished blocks are kept",
            ) from error
        self.sequences = (sequences + 1) // 2
        _LOG.warning("out of memory with %d sequences at a time: going on with %d", sequences, self.sequences)


def run(
    stream: Stream, at_once: AtOnce | int, block: Callable[[Tensor], Tensor], again: Callable[[], None] | None = None
) -> Iterator[Tensor]:
    """What `block` makes of each chunk of a stream; of halves of a chunk where memory doesn't suffice for it.

    What the GPU holds of the sequences makes room first. `again` is called before a chunk is computed anew.
    """
    limit = AtOnce(at_once) if isinstance(at_once, int) else at_once
    with torch.inference_mode():
        for chunk in one_ahead(stream.chunks(limit.sequences)):
            waiting = [chunk]
            while waiting:
                output, piece = None, waiting.pop(0)
                try:
                    if piece.shape[0] <= limit.sequences:
                        output = block(piece)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if stream.held is None or not stream.held.release():
                        limit.halve(piece.shape[0], error)
                    if again is not None:
                        again()
                if output is None:  # the memory that the error held is free only here
                    free_unused()
                    waiting[:0] = piece.split(limit.sequences)
                else:
                    yield output


@contextmanager
def enough_memory(task: str) -> Iterator[None]:
    """RunError saying that memory doesn't suffice to do `task`, where it runs out and nothing smaller can be tried."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"Memory does not suffice to {task}: {_short(error)}", "Take a larger machine; finished blocks are kept"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of its GPU, ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def free_unused() -> None:
    """Give back GPU memory that torch keeps for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _short(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
