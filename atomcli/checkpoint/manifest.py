"""What a finished checkpoint says about itself: atom_manifest.json, the digests of every tensor, shard and file."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from atomcli.checkpoint.card import CARD
from atomcli.checkpoint.digests import sha256_file
from atomcli.checkpoint.directory import COMPANIONS, CONFIG, INDEX
from atomcli.checkpoint.files import is_file_name, read_json
from atomcli.errors import InputError

MANIFEST = "atom_manifest.json"
REPORT = "atom_report.json"
JOURNAL = "journal.json"
VERSION = 1


@dataclass(frozen=True)
class TensorRecord:
    """One tensor: safetensors dtype name ("U8", "BF16", ...), shape, and the SHA-256 (hex) of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """One finished shard: file name, size in bytes, SHA-256 (hex) of the file, and its tensors by name."""

    file: str
    bytes: int
    sha256: str
    tensors: Mapping[str, TensorRecord]

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data, for the journal and the manifest."""
        tensors = {
            name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "sha256": tensor.sha256}
            for name, tensor in sorted(self.tensors.items())
        }
        return {"file": self.file, "bytes": self.bytes, "sha256": self.sha256, "tensors": tensors}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ShardRecord":
        """The record that `to_dict` wrote; KeyError or TypeError when it isn't one."""
        tensors = {
            name: TensorRecord(tensor["dtype"], tuple(tensor["shape"]), tensor["sha256"])
            for name, tensor in data["tensors"].items()
        }
        return cls(data["file"], data["bytes"], data["sha256"], MappingProxyType(tensors))


@dataclass(frozen=True)
class FileRecord:
    """A file beside the shards: size in bytes and SHA-256 (hex)."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything a checkpoint must hold, by file name."""

    shards: Mapping[str, ShardRecord]
    files: Mapping[str, FileRecord]

    def to_dict(self) -> dict[str, Any]:
        """The manifest as plain data."""
        return {
            "version": VERSION,
            "shards": [self.shards[file].to_dict() for file in sorted(self.shards)],
            "files": {
                name: {"bytes": record.bytes, "sha256": record.sha256} for name, record in sorted(self.files.items())
            },
        }


def make_manifest(directory: Path, shards: Iterable[ShardRecord]) -> Manifest:
    """The manifest of a directory: the given shards, and config, index, card and tokenizer files as they lie now."""
    files = {
        name: FileRecord((directory / name).stat().st_size, sha256_file(directory / name))
        for name in (CONFIG, INDEX, CARD, *COMPANIONS)
        if (directory / name).is_file()
    }
    return Manifest({shard.file: shard for shard in shards}, files)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint; InputError when it is absent, unreadable or of another version."""
    path = directory / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{directory} holds no {MANIFEST}, so nothing says what it must contain",
            "Only finished checkpoints written by `atom quantize` have one.",
        )
    data = read_json(path)
    if data.get("version") != VERSION:
        raise InputError(
            f"{path} is of version {data.get('version')!r}, and this atom reads version {VERSION}", "Update atomcli."
        )
    try:
        shards = [ShardRecord.from_dict(shard) for shard in data["shards"]]
        files = {name: FileRecord(record["bytes"], record["sha256"]) for name, record in data["files"].items()}
        for name in (*files, *(shard.file for shard in shards)):
            if not is_file_name(name):
                raise ValueError(f"{name!r} is not a file beside it")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__} {error}", "Copy the checkpoint again.") from error
    return Manifest({shard.file: shard for shard in shards}, files)


def read_report(directory: Path) -> dict[str, Any]:
    """atom_report.json as plain data, empty when there is none."""
    return read_json(directory / REPORT, missing_ok=True)
