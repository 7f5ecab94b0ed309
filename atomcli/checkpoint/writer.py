"""Writing a checkpoint: one shard per block, each published by an atomic rename, equal tensors giving equal bytes.

A checkpoint is made in OUT.unfinished and becomes OUT by one rename at the end, so OUT either holds everything or
doesn't exist. A shard is written to a temporary name, synced and renamed: a shard that has its name is whole.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import RawIOBase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from atomcli.checkpoint.directory import INDEX
from atomcli.checkpoint.files import TEMPORARY, disk_full, sync_directory, write_error, write_json
from atomcli.checkpoint.manifest import MANIFEST, Manifest, ShardRecord, TensorRecord, make_manifest
from atomcli.checkpoint.tensorfile import DTYPE_NAMES
from atomcli.errors import RunError, UsageError

_CHUNK = 1 << 24


def shard_file(block: int | None) -> str:
    """The name of a block's shard (block 0 is model-00001), or of the one for everything outside the blocks (None)."""
    return f"model-{0 if block is None else block + 1:05d}.safetensors"


def unfinished(out: Path) -> Path:
    """The directory in which the checkpoint OUT is made."""
    return out.with_name(out.name + ".unfinished")


def write_shard(directory: Path, file: str, tensors: Mapping[str, Tensor]) -> ShardRecord:
    """Write tensors as DIRECTORY/FILE (safetensors) so that the file appears whole or not at all.

    The bytes depend on names, dtypes, shapes and values only. Raises RunError when the disk is full.
    """
    header, order = _header(tensors)
    total = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    path = directory / file
    temporary = path.with_name(file + TEMPORARY)
    whole = hashlib.sha256(header)
    records: dict[str, TensorRecord] = {}
    try:
        # A file left by an interrupted run would count against the free space.
        temporary.unlink(missing_ok=True)
        disk = shutil.disk_usage(directory)
        # Some network file systems report no sizes at all.
        if disk.total and disk.free < total:
            raise disk_full(path, total, total - disk.free)
        with temporary.open("wb", buffering=0) as out, ThreadPoolExecutor(2) as pool:
            _write(out, memoryview(header))
            for name in order:
                tensor = tensors[name]
                data = _bytes(tensor)
                # hashlib lets go of the interpreter lock: both digests are taken while the bytes are written.
                digest, hashed = pool.submit(hashlib.sha256, data), pool.submit(whole.update, data)
                _write(out, data)
                hashed.result()
                records[name] = TensorRecord(
                    DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), digest.result().hexdigest()
                )
            os.fsync(out.fileno())
        temporary.replace(path)
        sync_directory(directory)
    except OSError as error:
        missing = total - temporary.stat().st_size if temporary.exists() else total
        temporary.unlink(missing_ok=True)
        raise write_error(path, error, total, missing) from error
    return ShardRecord(file, total, whole.hexdigest(), MappingProxyType(records))


def finish(directory: Path, shards: Iterable[ShardRecord]) -> Manifest:
    """Write the index and the manifest over finished shards; config and tokenizer files must lie there already."""
    shards = sorted(shards, key=lambda shard: shard.file)
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    if len(weight_map) != sum(len(shard.tensors) for shard in shards):
        raise RunError("A tensor is in two shards of the checkpoint", "Delete the .unfinished directory and run again.")
    # The size of the data as transformers counts it: tensors without headers.
    size = sum(shard.bytes - _header_bytes(directory / shard.file) for shard in shards)
    write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    manifest = make_manifest(directory, shards)
    write_json(directory / MANIFEST, manifest.to_dict())
    return manifest


def refuse_occupied(out: Path) -> None:
    """UsageError when OUT exists and is anything but an empty directory that a rename can replace."""
    hint = "Choose another with -o, or remove it yourself."
    if out.is_dir():
        if any(out.iterdir()):
            raise UsageError(f"The output directory {out} is not empty", hint)
        # Known only to the rename at the very end, which would fail after all the work.
        if kind := _irreplaceable(out):
            raise UsageError(f"The output {out} is {kind}, which a finished checkpoint can't replace", f"-o {out}/NAME")
    elif out.exists() or out.is_symlink():
        raise UsageError(f"The output directory {out} is a {'file' if out.exists() else 'link to nothing'}", hint)


def _irreplaceable(out: Path) -> str | None:
    """Why a rename can't replace an empty directory; None where it can."""
    if out.name in ("", ".."):
        return "where it is called from"
    if out.is_symlink():
        return "a link"
    return "a mount point" if out.is_mount() else None


def publish(directory: Path, out: Path) -> None:
    """Give a finished directory its name by one rename; UsageError when OUT is occupied, RunError when it fails."""
    refuse_occupied(out)
    try:
        sync_directory(directory)
        # On POSIX a rename replaces an empty directory.
        directory.rename(out)
        sync_directory(out.parent)
    except OSError as error:
        raise RunError(
            f"{directory} can't be renamed to {out}: {error.strerror or error}", "The finished files are in the former."
        ) from error


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[str]]:
    """The safetensors header (length, JSON, padding to 8 bytes) and the order of the tensors' bytes.

    Wider dtypes come first, then names: every tensor is aligned to its own element for readers that map the file.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in C order, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _write(out: RawIOBase, data: memoryview) -> None:
    """All of `data` to an unbuffered file, which may take less than it is given."""
    done = 0
    while done < len(data):
        done += out.write(data[done : done + _CHUNK]) or 0


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
