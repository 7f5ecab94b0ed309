"""The stream: hidden states of the calibration sequences between two blocks, kept in files.

Each generation of the stream is one file, written from front to back and read in chunks of a few sequences. The page
cache keeps it in memory as long as there is room, and a full disk is an error instead of a crash.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from atomcli.checkpoint.files import write_error
from atomcli.errors import InputError, RunError

# Chunks of sequences are so large that the widest activation of a block takes about this much memory in fp32: on the
# CPU what malloc reuses without asking the system (twice as fast as 64 MiB), on a GPU enough to fill it.
_CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}


class Stream:
    """Hidden states (sequences, tokens, hidden) in `dtype`, in one file."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype

    def chunks(self, sequences: int) -> Iterator[Tensor]:
        """The hidden states, `sequences` at a time, each (n, tokens, hidden); InputError when the file is damaged."""
        count, row = self.shape[0], math.prod(self.shape[1:]) * self.dtype.itemsize
        if not self.path.is_file() or self.path.stat().st_size != count * row:
            raise InputError(
                f"{self.path}, which the journal mentions, is missing or has the wrong size",
                f"delete {self.path.parent} and run the same command again",
            )
        with self.path.open("rb", buffering=0) as file:
            for start in range(0, count, sequences):
                rows = min(sequences, count - start)
                buffer = bytearray(rows * row)
                view, filled = memoryview(buffer), 0
                while filled < len(buffer):
                    read = file.readinto(view[filled:])
                    if not read:
                        raise InputError(f"{self.path} ended while it was read", "run the same command again")
                    filled += read
                # The copy is aligned as torch aligns: products may differ in the last bit by where their operands lie.
                yield torch.frombuffer(buffer, dtype=self.dtype).view(rows, *self.shape[1:]).clone()

    def write(self, chunks: Iterator[Tensor], where: str) -> None:
        """Write the whole stream; `where` names what put it out. RunError when it is not finite or the disk is full."""
        total = math.prod(self.shape) * self.dtype.itemsize
        written = 0
        try:
            with self.path.open("wb", buffering=0) as file:
                for chunk in chunks:
                    check_finite(chunk, where)
                    flat = chunk.detach().to("cpu", self.dtype).contiguous().view(-1)
                    data = memoryview(flat.view(torch.uint8).numpy().data)
                    done = 0
                    while done < len(data):
                        done += file.write(data[done:])
                    written += done
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(self.path, error, total, total - written) from error
        if written != total:
            raise RunError(f"{where} put out {written} bytes of hidden states instead of {total}")


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


def run(stream: Stream, sequences: int, block: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """What `block` makes of each chunk of a stream."""
    with torch.inference_mode():
        for chunk in stream.chunks(sequences):
            yield block(chunk)
