"""One safetensors file, opened by its header and read a tensor at a time.

The file is read, not memory-mapped: what a read returns is the only copy in memory, and letting go of it gives the
memory back. A mapping would keep every page that was ever touched in the process's resident size, and a private
one counts in full against a memory limit. Reading the header ourselves also lets a damaged file be named precisely.
Specification: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atomcli.checkpoint.files import unreadable
from atomcli.errors import InputError

# The format's own limit; it keeps a corrupt length from being taken for an allocation request.
MAX_HEADER_BYTES = 100_000_000

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes [start, end) of the file, C order, little endian."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """A safetensors file whose header has been read and checked against the file's size.

    Raises InputError naming the file when it is unreadable, truncated, or its header contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size, header, data_start = _read_header(path)
        metadata = header.pop("__metadata__", {})
        self.metadata: dict[str, str] = metadata if isinstance(metadata, dict) else {}
        self.entries = {name: _entry(path, name, value, data_start) for name, value in header.items()}
        self._check_layout(data_start)

    def _check_layout(self, data_start: int) -> None:
        """Tensors must tile the data section exactly: a gap or an overlap is damage, a short file is truncation."""
        position = data_start
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != position:
                raise _corrupt(self.path, f"tensor {name} begins at byte {entry.start}, not at {position}")
            position = entry.end
        if position > self.size:
            raise InputError(
                f"{self.path} is truncated: its header promises {position} bytes, the file has {self.size}",
                "Copy or download the file again.",
            )
        if position < self.size:
            raise _corrupt(self.path, f"{self.size - position} bytes follow the last tensor")

    def read_bytes(self, name: str) -> bytearray:
        """The raw bytes of one tensor, in a fresh buffer."""
        entry = self.entries[name]
        return read_range(self.path, entry.start, entry.end - entry.start, f"tensor {name}")

    def digest(self, name: str) -> str:
        """SHA-256 (hex) of one tensor's bytes."""
        return hashlib.sha256(self.read_bytes(name)).hexdigest()

    def read(self, name: str, pinned: bool = False) -> Tensor:
        """One tensor in its stored dtype and shape; the tensor owns its memory, which a GPU copies from if `pinned`."""
        entry = self.entries[name]
        if (length := entry.end - entry.start) == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        # Not a bytearray: that is filled with zeros first, under the interpreter's lock, and all other threads wait.
        if pinned:
            raw = torch.empty(length, dtype=torch.uint8, pin_memory=True)
        else:
            raw = torch.from_numpy(np.empty(length, np.uint8))
        _read_into(memoryview(raw.numpy().data), self.path, entry.start, f"tensor {name}")
        return raw.view(entry.dtype).reshape(entry.shape)


def read_range(path: Path, start: int, length: int, what: str) -> bytearray:
    """Bytes [start, start + length) of a file; InputError naming `what` when they can't be had."""
    buffer = bytearray(length)
    _read_into(memoryview(buffer), path, start, what)
    return buffer


def _read_into(view: memoryview, path: Path, start: int, what: str) -> None:
    length = len(view)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            filled = 0
            while filled < length:
                # Linux returns at most 2 GiB a call.
                count = file.readinto(view[filled:])
                if not count:
                    raise InputError(
                        f"{path} ended after {start + filled} bytes while {what} was read",
                        "The file changed or was cut off; copy or download it again.",
                    )
                filled += count
    except OSError as error:
        raise unreadable(path, error) from error


def _corrupt(path: Path, detail: str) -> InputError:
    return InputError(f"{path} is not a valid safetensors file: {detail}", "Copy or download the file again.")


def _read_header(path: Path) -> tuple[int, dict[str, Any], int]:
    """(file size, header as JSON, offset of the data section)."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or size < 8 + length <= 8 + MAX_HEADER_BYTES:
                raise InputError(
                    f"{path} is truncated: it has {size} bytes, fewer than its header alone needs",
                    "Copy or download the file again.",
                )
            if length > MAX_HEADER_BYTES:
                raise _corrupt(path, f"its header claims {length} bytes")
            raw = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not a JSON object")
    return size, header, 8 + length


def _entry(path: Path, name: str, value: Any, data_start: int) -> Entry:
    try:
        dtype_name, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        elements = math.prod(shape)
        # Not bool, which is an int to Python; and no more than torch can count, also where another size is 0.
        well_formed = all(type(n) is int and n >= 0 for n in (*shape, start, end)) and end >= start
        well_formed = well_formed and math.prod(max(n, 1) for n in shape) < 1 << 62
    except (KeyError, TypeError, ValueError) as error:
        raise _corrupt(path, f"the entry of tensor {name} has no dtype, shape and data_offsets") from error
    if not well_formed:
        raise _corrupt(path, f"tensor {name} has shape {list(shape)} at bytes {start} to {end}")
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise InputError(
            f"{path} stores tensor {name} as {dtype_name}, which atom doesn't read",
            f"Known dtypes are {', '.join(DTYPES)}.",
        )
    if elements * dtype.itemsize != end - start:
        raise _corrupt(path, f"tensor {name} of shape {list(shape)} in {dtype_name} can't have {end - start} bytes")
    return Entry(dtype, shape, data_start + start, data_start + end)
