import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from atomcli.checkpoint import files, writer
from atomcli.checkpoint.manifest import MANIFEST, ShardRecord, make_manifest, read_manifest
from atomcli.errors import InputError, RunError, UsageError

TENSORS = {
    "b.weight_packed": torch.arange(12, dtype=torch.uint8).reshape(3, 4),
    "a.weight_scale": torch.ones(3, 2, dtype=torch.float16),
    "c.row": torch.tensor([1.0, 2.0, 3.0]),
}


def test_bytes_depend_on_the_tensors_alone(tmp_path: Path) -> None:
    first = writer.write_shard(tmp_path, "a.safetensors", TENSORS)
    backwards = {name: TENSORS[name].clone() for name in reversed(TENSORS)}
    second = writer.write_shard(tmp_path, "b.safetensors", backwards)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert first.sha256 == second.sha256
    assert first.bytes == (tmp_path / "a.safetensors").stat().st_size
    transposed = TENSORS | {"b.weight_packed": TENSORS["b.weight_packed"].T.contiguous().T}
    assert writer.write_shard(tmp_path, "c.safetensors", transposed).sha256 == first.sha256
    changed = TENSORS | {"c.row": torch.tensor([1.0, 2.0, 3.5])}
    assert writer.write_shard(tmp_path, "c.safetensors", changed).sha256 != first.sha256


def test_a_record_survives_the_journal(tmp_path: Path) -> None:
    record = writer.write_shard(tmp_path, "a.safetensors", TENSORS)
    assert ShardRecord.from_dict(json.loads(json.dumps(record.to_dict()))).to_dict() == record.to_dict()


def test_shard_names_sort_in_block_order() -> None:
    names = [writer.shard_file(block) for block in (None, *range(120))]
    assert names == sorted(names)
    assert names[:2] == ["model-00000.safetensors", "model-00001.safetensors"]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 100, 100))
    with pytest.raises(RunError, match=r"disk of .*a\.safetensors is full: \d+ bytes are missing") as caught:
        writer.write_shard(tmp_path, "a.safetensors", TENSORS)
    assert not list(tmp_path.iterdir())
    missing, total = (int(word) for word in caught.value.what.split() if word.isdigit())
    assert total - missing == 100


class FullDisk:
    """A raw file that takes `room` bytes and then fails as a full disk does."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(self.room, len(data))
        self.room -= taken
        return self.file.write(data[:taken])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


@pytest.mark.parametrize("room", [1, 8, 200, -1])
def test_a_disk_that_fills_up_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    total = writer.write_shard(tmp_path, "a.safetensors", TENSORS).bytes
    room %= total
    before = (tmp_path / "a.safetensors").read_bytes()
    real_open = Path.open

    def small_disk(self: Path, mode: str = "r", **kwargs: Any) -> Any:
        opened = real_open(self, mode, **kwargs)
        return FullDisk(opened, room) if "w" in mode else opened

    monkeypatch.setattr(Path, "open", small_disk)
    with pytest.raises(RunError, match=rf"is full: {total - room} bytes are missing for this file of {total} bytes"):
        writer.write_shard(tmp_path, "a.safetensors", TENSORS | {"c.row": torch.zeros(3)})
    monkeypatch.undo()
    # What was there is still whole, and the part that was written gives its room back.
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_an_interrupted_shard_never_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.write_shard(tmp_path, "a.safetensors", TENSORS)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors.tmp"]
    writer.write_shard(tmp_path, "a.safetensors", TENSORS)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_small_files_report_a_full_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="3 bytes are missing"):
        files.write_json(tmp_path / "journal.json", {})
    assert not (tmp_path / "journal.json").exists()


def test_a_read_only_directory(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="can't be written"):
        writer.write_shard(tmp_path / "nowhere", "a.safetensors", TENSORS)


def test_index_and_manifest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    shards = [
        writer.write_shard(tmp_path, writer.shard_file(block), {f"{block}.{name}": t for name, t in TENSORS.items()})
        for block in (1, 0)
    ]
    writer.finish(tmp_path, shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["0.c.row"] == "model-00001.safetensors"
    assert index["metadata"]["total_size"] == 2 * sum(tensor.nbytes for tensor in TENSORS.values())
    manifest = read_manifest(tmp_path)
    assert manifest.to_dict() == make_manifest(tmp_path, shards).to_dict()
    assert manifest.files["config.json"].bytes == 2
    assert manifest.shards["model-00002.safetensors"].tensors["1.c.row"].shape == (3,)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards = [writer.write_shard(tmp_path, writer.shard_file(block), TENSORS) for block in (0, 1)]
    with pytest.raises(RunError, match="is in two shards"):
        writer.finish(tmp_path, shards)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 7}, "is of version 7"),
        ({"shards": [{}]}, r"atom_manifest\.json is damaged"),
        ({"files": []}, r"atom_manifest\.json is damaged"),
        ({"shards": 3}, r"atom_manifest\.json is damaged"),
        ({"shards": [{"file": 3, "bytes": 0, "sha256": "", "tensors": {}}]}, r"atom_manifest\.json is damaged"),
        ({"files": {"../config.json": {"bytes": 0, "sha256": ""}}}, r"'\.\./config\.json' is not a file beside it"),
    ],
)
def test_a_damaged_manifest(checkpoint: Path, change: dict[str, Any], message: str) -> None:
    path = checkpoint / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read_manifest(checkpoint)


def test_publishing_is_one_rename(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = writer.unfinished(out)
    assert made.name == "out.unfinished"
    made.mkdir()
    (made / "config.json").write_text("{}")
    out.mkdir()
    writer.publish(made, out)
    assert [file.name for file in out.iterdir()] == ["config.json"]
    assert not made.exists()


def test_an_output_that_no_rename_can_replace_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    writer.refuse_occupied(empty)
    (tmp_path / "link").symlink_to(empty)
    with pytest.raises(UsageError, match="is a link"):
        writer.refuse_occupied(tmp_path / "link")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is a link to nothing"):
        writer.refuse_occupied(tmp_path / "dangling")
    monkeypatch.chdir(empty)
    with pytest.raises(UsageError, match="is where it is called from"):
        writer.refuse_occupied(Path())
    monkeypatch.setattr(Path, "is_mount", lambda path: path == empty)
    with pytest.raises(UsageError, match="is a mount point"):
        writer.refuse_occupied(empty)


def test_an_occupied_output_is_never_touched(tmp_path: Path) -> None:
    made = tmp_path / "out.unfinished"
    made.mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(UsageError, match="is not empty"):
        writer.publish(made, out)
    assert (out / "precious").read_text() == "x"
    with pytest.raises(UsageError, match="is a file"):
        writer.refuse_occupied(out / "precious")
    writer.refuse_occupied(tmp_path / "free")
