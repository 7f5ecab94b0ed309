"""What a run would take: a few blocks of the model go the whole road, and the rest follows.

Time is linear in the blocks. On a GPU the trial has all sequences of the run. With fewer, experts of a mixture see
fewer tokens than they have channels, and forcing the routing, which the run need not do, costs time; and noise would be
multiplied. Where all would take too long, two trials with fewer say how a block's time grows with them. Memory of GPU
and host depends on neither beyond two blocks and one chunk of sequences. The disk is counted: the checkpoint, and the
hidden states between two blocks.
"""

from __future__ import annotations

import hashlib
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from atomcli.checkpoint.digests import HASHING
from atomcli.checkpoint.source import Source
from atomcli.errors import UsageError
from atomcli.models.tensors import block_name, outer_shapes
from atomcli.pipeline.budget import plan_bytes
from atomcli.pipeline.compress import compress
from atomcli.pipeline.held import WAITING, held_on
from atomcli.pipeline.model import Walk, start_walk
from atomcli.pipeline.ranks import SLOTS
from atomcli.pipeline.select import groups_of, uniform
from atomcli.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger("atomcli")
# The first, those as all in the middle of a model (the one before is written, the one after read), and the last. Two in
# the middle tell of each other's noise; on a CPU, where a block takes minutes, noise is a small part of it.
_BLOCKS = {"cpu": 3, "cuda": 4}
_TOKENS = 1 << 18  # so many are tried on a GPU: as many as 128 sequences of 2048 have
_HASHED = 1 << 26  # bytes that are hashed to learn how long all of them take


@dataclass(frozen=True)
class Forecast:
    """Seconds of a run, and the bytes that it needs at its peak; `gpu_bytes` None without one."""

    seconds: float
    seconds_per_block: float
    host_bytes: int
    gpu_bytes: int | None
    disk_bytes: int


class Shallow(Source):
    """The first blocks of a source, as a model of their own."""

    def __init__(self, whole: Source, blocks: int) -> None:
        self.whole, self.name, self.path, self.dtype = whole, whole.name, whole.path, whole.dtype
        changes: dict[str, Any] = {"num_hidden_layers": blocks}
        if getattr(whole.config, "layer_types", None):
            changes["layer_types"] = whole.config.layer_types[:blocks]
        self.config = type(whole.config).from_dict(whole.config.to_dict() | changes)
        beyond = tuple(f"{block_name(index)}." for index in range(blocks, whole.config.num_hidden_layers))
        self._names = frozenset(name for name in whole.names() if not name.startswith(beyond))

    def names(self) -> frozenset[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.whole.shape(name)

    def fingerprint(self) -> str:
        """Of no file: hashing all of a large model is part of the forecast, not of the trial."""
        return hashlib.sha256(f"{self.path} {self.config.num_hidden_layers}".encode()).hexdigest()

    def save_companions(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(directory)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.whole.tokenizer()

    def _read(self, name: str) -> Tensor:
        return self.whole.read(name)

    def _read_pinned(self, name: str) -> Tensor:
        return self.whole.read(name, pinned=True)


class Stopwatch:
    """A progress that writes down how long each step of each stage took."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {}
        self._stage, self._since = "", 0.0

    def begin(self, stage: str, total: int, unit: str = "block") -> None:
        """The clock starts."""
        self._stage, self._since = stage, time.monotonic()

    def advance(self, done: int, detail: str = "") -> None:
        """A step was taken."""
        now = time.monotonic()
        if done:
            self.steps.setdefault(self._stage, []).append(now - self._since)
        self._since = now

    def end(self) -> None:
        """Nothing to write down."""


def forecast(source: Source, recipe: Recipe, scratch: Path, device: torch.device | str | None = None) -> Forecast:
    """What `compress` of this source by this recipe takes on this machine; `scratch` has room for a few blocks.

    Raises UsageError for a recipe with a budget, whose measurements depend on its candidates, and what `compress` does.
    """
    if recipe.select is not None:
        raise UsageError("The time of a run that measures sensitivities can't be told from a few blocks")
    walk = start_walk(source, device)
    samples, length = recipe.calibration.samples, recipe.calibration.sequence_length
    blocks = min(_BLOCKS.get(walk.device.type, 3), walk.blocks)
    chunk = min(walk.sequences_at_once(length), -(-samples // SLOTS))
    if walk.device.type == "cuda":
        # Kernels that aren't in the cache are compiled before the clock runs; only a block before another puts anything
        # out, which takes kernels of its own.
        _trial(Shallow(source, min(2, blocks)), recipe, walk, chunk, length, scratch)
    trials = {
        number: _trial(Shallow(source, blocks), recipe, walk, number, length, scratch)
        for number in _numbers(walk.device, samples, length, chunk)
    }
    many = max(trials)
    last, host, gpu = trials[many], trials[many].host_bytes, trials[many].gpu_bytes
    middle = {
        stage: _at(samples, {number: _middle(trial.steps[stage], blocks) for number, trial in trials.items()})
        for stage in last.steps
    }
    tried = _at(samples, {number: trial.seconds for number, trial in trials.items()})
    checkpoint = _checkpoint_bytes(walk, recipe)
    # Files are hashed by several threads: the parent before anything else, and the shards twice in the proof.
    hashed = _parent_bytes(walk) + 2 * checkpoint * max(0, walk.blocks - blocks) / walk.blocks
    seconds = tried + (walk.blocks - blocks) * sum(middle.values()) + hashed / (_hash_rate() * HASHING)
    per_block = middle["calibrate"] + middle["quantize"]
    if gpu is not None:
        gpu += _held_bytes(walk, samples, length) - _held_bytes(walk, many, length)
        host += _waiting_bytes(walk, samples, length) - _waiting_bytes(walk, many, length)
    return Forecast(seconds, per_block, host, gpu, _disk(walk, recipe, checkpoint, samples, length))


def _numbers(device: torch.device, samples: int, length: int, chunk: int) -> list[int]:
    """How many sequences each trial has; a slot of the largest takes chunks as large as a slot of the run."""
    if device.type == "cuda":
        many = max(SLOTS * chunk, _TOKENS // length)
        return [samples] if samples <= many else [many // 2, many]
    few = min(samples, 2 if chunk == 1 else SLOTS * chunk)
    many = min(samples, (2 if chunk > 1 else 4) * few)  # far enough apart to tell the slope from noise
    return sorted({few, many})


@dataclass(frozen=True)
class Trial:
    """Seconds in all and of every step of each stage, and the peaks of the host's and the GPU's memory in bytes."""

    seconds: float
    steps: dict[str, list[float]]
    host_bytes: int
    gpu_bytes: int | None


def _trial(source: Source, recipe: Recipe, walk: Walk, samples: int, length: int, scratch: Path) -> Trial:
    """What so many sequences through all blocks of `source` take."""
    tokens = torch.randint(walk.config.vocab_size, (samples, length), generator=torch.Generator().manual_seed(0))
    watch, cuda = Stopwatch(), walk.device.type == "cuda"
    forget_host_peak()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(walk.device)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="atom-plan-") as directory, _unsaid():
        started = time.monotonic()
        compress(source, recipe, Path(directory) / "trial", tokens=tokens, device=walk.device, progress=watch)
        seconds = time.monotonic() - started
    return Trial(seconds, watch.steps, host_peak(), torch.cuda.max_memory_reserved(walk.device) if cuda else None)


def _middle(steps: list[float], blocks: int) -> float:
    """Seconds of a block in the middle: the mean of those between the first and the last of so many.

    What a stage does after its blocks may be a step as well. Of one or two blocks it is the last.
    """
    between = steps[1 : blocks - 1] or [steps[blocks - 1]]
    return sum(between) / len(between)


@contextmanager
def _unsaid() -> Iterator[None]:
    """What a trial would warn of is no news: so few sequences starve everything."""
    level = _LOG.level
    _LOG.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _LOG.setLevel(level)


def _at(samples: int, seconds: dict[int, float]) -> float:
    """The time for so many sequences, on the line through what was measured."""
    (few, short), *rest = sorted(seconds.items())
    if not rest:
        return short
    many, long = rest[-1]
    slope = max(0.0, (long - short) / (many - few))
    return long + slope * (samples - many)


def _hidden_bytes(walk: Walk, samples: int, length: int) -> int:
    """Bytes of the hidden states of all sequences between two blocks."""
    return samples * length * int(walk.config.hidden_size) * walk.source.dtype.itemsize


def _held_bytes(walk: Walk, samples: int, length: int) -> int:
    """Bytes of them that the GPU holds."""
    held = held_on(walk.device)
    return 0 if held is None else min(held.limit, _hidden_bytes(walk, samples, length))


def _waiting_bytes(walk: Walk, samples: int, length: int) -> int:
    """Bytes of them that may wait in the host's memory for the disk; torch takes powers of two for each slot."""
    slot = _hidden_bytes(walk, -(-samples // SLOTS), length)
    return min(WAITING, samples) << (slot - 1).bit_length()


def _checkpoint_bytes(walk: Walk, recipe: Recipe) -> int:
    """Bytes of the checkpoint."""
    return plan_bytes(walk, groups_of(recipe, walk), uniform(recipe, walk), recipe.transform_seed is not None)[0]


def _disk(walk: Walk, recipe: Recipe, checkpoint: int, samples: int, length: int) -> int:
    """Bytes of the checkpoint; or of its blocks and of the hidden states before and after one, if that is more."""
    streams = 2 if recipe.weights.rounding == "gptq" else 0
    hidden = _hidden_bytes(walk, samples, length)
    outside = sum(math.prod(shape) for shape in outer_shapes(walk.family, walk.config).values())
    return max(checkpoint, checkpoint - outside * walk.source.dtype.itemsize + streams * hidden)


def _parent_bytes(walk: Walk) -> int:
    return sum(math.prod(walk.source.shape(name)) for name in walk.source.names()) * walk.source.dtype.itemsize


def _hash_rate() -> float:
    """Bytes per second of SHA-256 on this machine."""
    data, started = bytes(_HASHED), time.monotonic()
    hashlib.sha256(data).digest()
    return _HASHED / (time.monotonic() - started)


def forget_host_peak() -> None:
    """Let Linux count the process's largest size from here on."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def host_peak() -> int:
    """The process's largest size since `forget_host_peak`; its present size where the system doesn't keep it."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10
    return int(psutil.Process().memory_info().rss)
