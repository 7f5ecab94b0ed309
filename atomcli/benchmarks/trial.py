"""What all rows of the accuracy bench stand on: the parent as files, its recording, tokens, and where rows are kept."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from atomcli.benchmarks.scores import Job, save_recording, save_tokens
from atomcli.checkpoint.directory import DirectorySource
from atomcli.checkpoint.source import Source
from atomcli.checkpoint.tensorfile import TensorFile
from atomcli.checkpoint.writer import finish, publish, shard_file, unfinished, write_shard
from atomcli.errors import InputError
from atomcli.evaluation.divergence import record
from atomcli.evaluation.scoring import Progress as Counter
from atomcli.models.registry import describe
from atomcli.models.tensors import account
from atomcli.pipeline.calibrate import calibrate, tokens_digest, tokens_for
from atomcli.pipeline.progress import Progress
from atomcli.recipe import Recipe
from atomcli.runtime import decoder

_BLOCK = re.compile(r"model\.layers\.(\d+)\.")


class Watcher(Progress, Protocol):
    """Progress that can also count for work which reports its own steps."""

    def counter(self, stage: str, unit: str) -> Counter:
        """A callback (done, total) for one stage."""


@dataclass(frozen=True)
class Trial:
    """What all rows have in common: the parent, the text to calibrate on, what is measured, and where it is kept.

    `calibration` is a recipe whose calibration section counts for every row. windows: int64 (n, length).
    """

    source: Source
    calibration: Recipe
    windows: Tensor
    out: Path
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    group: int = 128
    device: str = "cpu"


@dataclass
class Ground:
    """The files that a trial's rows stand on, and the parent's linears: name -> (out_features, in_features)."""

    trial: Trial
    parent: Path
    tokens: Path
    recording: Path
    digest: str
    linears: Mapping[str, tuple[int, int]]
    names_on_disk: Mapping[str, str]
    _artifact: Path | None = field(default=None)

    def job(self, directory: Path, method: str) -> Job:
        """The job of one row."""
        trial = self.trial
        measured = directory / f"text-{key_of(self.recording.name)}.json"
        asked = key_of([file_digest(task) for task in trial.tasks], trial.limit)
        return Job(
            method=method,
            parent=self.parent,
            tokens=self.tokens,
            recording=self.recording,
            checkpoint=directory / "checkpoint",
            made=directory / "made.json",
            text=measured,
            tasks_result=directory / f"tasks-{asked}.json",
            group=trial.group,
            seed=trial.calibration.calibration.seed,
            tasks=trial.tasks,
            limit=trial.limit,
            device=trial.device,
        )

    def artifact(self, watcher: Watcher) -> Path:
        """Our calibration of the trial's text, made when the first recipe needs it."""
        if self._artifact is None:
            self._artifact = self.trial.out / f"calibration-{self.digest[:12]}"
            calibrate(
                self.trial.source, self.trial.calibration, self._artifact, device=self.trial.device, progress=watcher
            )
        return self._artifact

    def row_directory(self, name: str, *depends_on: Any) -> Path:
        """Where a row is kept; everything that it depends on, the measured text apart, is in its name."""
        key = key_of(self.trial.source.fingerprint(), self.digest, *depends_on)
        directory = self.trial.out / "rows" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-')}-{key}"
        directory.mkdir(parents=True, exist_ok=True)
        return directory


def prepare(trial: Trial, watcher: Watcher) -> Ground:
    """The parent as a directory, the calibration tokens and the parent's recording; what is there is used again."""
    source = trial.source
    trial.out.mkdir(parents=True, exist_ok=True)
    parent = source.path if isinstance(source, DirectorySource) else export(source, trial.out / "parent")
    tokens = tokens_for(source, trial.calibration)
    digest = tokens_digest(tokens)
    tokens_file = trial.out / f"tokens-{digest[:12]}.safetensors"
    if not tokens_file.is_file():
        save_tokens(tokens, tokens_file)
    recording = trial.out / f"recording-{key_of(source.fingerprint(), tokens_digest(trial.windows))}.safetensors"
    if not recording.is_file():
        model = decoder.load_parent(source).to(trial.device)  # type: ignore[arg-type]
        save_recording(record(model, trial.windows, watcher.counter("parent", "window")), recording)
        del model
    found = account(describe(source.config), source.config, source.names(), source.shape).quantizable
    inside = {name: disk for name, disk in found.items() if _BLOCK.match(name)}
    linears = {name: (source.shape(disk)[0], source.shape(disk)[1]) for name, disk in inside.items()}
    return Ground(trial, parent, tokens_file, recording, digest, linears, inside)


def stored_bits(directory: Path, ground: Ground, code_bits: int = 4) -> float:
    """Bits per weight of all linears in the blocks, by the tensors that a directory's safetensors files hold for them.

    Scales, zero points, orders and outliers count with every bit; codes that a format keeps one in a byte (INT8
    tensors called `weight`) count `code_bits`. Raises InputError for a linear without any tensor.
    """
    size = dict.fromkeys(ground.linears, 0.0)
    owners = {name: name for name in ground.linears}
    owners |= {disk.removesuffix(".weight"): name for name, disk in ground.names_on_disk.items()}
    for path in sorted(directory.glob("*.safetensors")):
        for tensor, entry in TensorFile(path).entries.items():
            linear, _, part = tensor.rpartition(".")
            if linear in owners and part != "bias":
                bits = 8 * (entry.end - entry.start)
                unpacked = part == "weight" and entry.dtype == torch.int8
                size[owners[linear]] += bits * code_bits / 8 if unpacked else bits
    if missing := [name for name, bits in size.items() if not bits]:
        raise InputError(f"{directory} has no tensors of {missing[0]}")
    return sum(size.values()) / sum(rows * columns for rows, columns in ground.linears.values())


def export(source: Source, out: Path) -> Path:
    """The parent as a directory that transformers and every peer can read, in its own dtype, one shard per block."""
    if out.is_dir():
        return out
    directory = unfinished(out)
    directory.mkdir(parents=True, exist_ok=True)
    blocks: dict[int | None, list[str]] = {}
    for name in sorted(source.names()):
        matched = _BLOCK.match(name)
        blocks.setdefault(int(matched[1]) if matched else None, []).append(name)
    source.save_companions(directory)
    shards = [
        write_shard(directory, shard_file(block), {name: source.read(name) for name in names})
        for block, names in blocks.items()
    ]
    finish(directory, shards)
    publish(directory, out)
    return out


def file_digest(name: str | Path) -> str:
    """The contents of a file, or the name of what is none."""
    path = Path(name).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(name)


def key_of(*parts: Any) -> str:
    """Twelve letters that differ when anything in `parts` does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]
