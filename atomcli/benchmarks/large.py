"""What quantizing a large model takes: `python -m atomcli.benchmarks.large SHAPE BLOCKS DIRECTORY`.

A model of a published shape is made up in DIRECTORY (see `parents`; one that is there is used again) and quantized on
random tokens; what it took comes as one line of JSON: seconds of every step, peaks of memory and disk, a digest of the
files. What each step took goes to stderr as well, at once: a run that is cut off has said what it found.
Under torchrun the processes share the run; the digests of one and of several must be equal. With --plan the forecast is
made first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from atomcli.benchmarks.parents import PARENTS, parent_config, write_parent
from atomcli.checkpoint.digests import sha256_file
from atomcli.checkpoint.manifest import REPORT
from atomcli.checkpoint.source import open_source
from atomcli.pipeline.compress import compress
from atomcli.pipeline.forecast import Stopwatch, forecast, forget_host_peak, host_peak
from atomcli.pipeline.ranks import ALONE, Ranks, together
from atomcli.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Measured:
    """One run: seconds in all and of each step of each stage, peaks in bytes, and what came out."""

    processes: int
    device: str
    seconds: float
    steps: dict[str, list[float]]
    host_bytes: int
    gpu_bytes: int | None
    disk_bytes: int
    kld: float
    sha256: str


class Said(Stopwatch):
    """A progress that says at once how long each step took."""

    def advance(self, done: int, detail: str = "") -> None:
        super().advance(done, detail)
        if done:
            sys.stderr.write(f"{self._stage} {done}: {self.steps[self._stage][-1]:.2f} s\n")
            sys.stderr.flush()


class Largest:
    """The largest sum of the sizes of files that was seen."""

    bytes = 0


@contextmanager
def largest_size(*directories: Path, seconds: float = 0.02) -> Iterator[Largest]:
    """Look at the directories every so many seconds, from a thread of its own."""
    seen, ended = Largest(), threading.Event()

    def look() -> None:
        while not ended.wait(seconds):
            seen.bytes = max(seen.bytes, sum(_size(path) for each in directories for path in each.rglob("*")))

    watching = threading.Thread(target=look, daemon=True)
    watching.start()
    try:
        yield seen
    finally:
        ended.set()
        watching.join()


def _size(path: Path) -> int:
    """Bytes of a file; none of one that has gone meanwhile."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def recipe_for(name: str, clip: str | None, samples: int, tokens: int) -> Recipe:
    """A recipe that ships, with so much text and perhaps another clip of the weights."""
    recipe = load_recipe(name).resolved()
    recipe["calibration"] |= {"samples": samples, "sequence_length": tokens}
    if clip is not None:
        recipe["weights"]["clip"] = clip
    return Recipe.model_validate(recipe)


def measure(
    model: Path, out: Path, recipe: Recipe, device: torch.device | None = None, ranks: Ranks = ALONE
) -> Measured:
    """Quantize the model directory `model` into `out`, which is deleted before and after."""
    settings, watch = recipe.calibration, Said()
    unfinished = out.with_name(f"{out.name}.unfinished")
    shape = (settings.samples, settings.sequence_length)
    tokens = torch.randint(3, 259, shape, generator=torch.Generator().manual_seed(0))  # the bytes of its tokenizer
    tokens[:, 0] = 1
    if ranks.first:
        for directory in (out, unfinished):
            shutil.rmtree(directory, ignore_errors=True)
    ranks.wait()
    forget_host_peak()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    with largest_size(out, unfinished) as disk:
        source = open_source(str(model))
        report = compress(source, recipe, out, tokens=tokens, progress=watch, device=device, ranks=ranks)
    seconds = time.monotonic() - started
    on_gpu = report["device"].startswith("cuda")
    found = Measured(
        ranks.size,
        torch.cuda.get_device_name() if on_gpu else report["device"],
        seconds,
        watch.steps,
        host_peak(),
        torch.cuda.max_memory_reserved() if on_gpu else None,
        disk.bytes,
        report["proof"]["kld"],
        _digest(out) if ranks.first else "",
    )
    ranks.wait()
    if ranks.first:
        shutil.rmtree(out)
    return found


def _digest(directory: Path) -> str:
    """SHA-256 (hex) over all files of a checkpoint but its report, which holds timings."""
    files = [path for path in sorted(directory.iterdir()) if path.name != REPORT]
    return hashlib.sha256("".join(path.name + sha256_file(path) for path in files).encode()).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    """Make the model, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m atomcli.benchmarks.large")
    parser.add_argument("shape", choices=PARENTS)
    parser.add_argument("blocks", type=int)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--recipe", default="atom-w4a4")
    parser.add_argument("--clip", help="of the weights: a ratio, or search; the recipe says it otherwise")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--divide", type=int, default=1, help="of widths and heads, to try it on a small machine")
    parser.add_argument("--plan", action="store_true")
    given = parser.parse_args(arguments)
    recipe = recipe_for(given.recipe, given.clip, given.samples, given.tokens)
    model = given.directory / f"{given.shape}-{given.blocks}-{given.divide}"
    line: dict[str, Any] = {"shape": given.shape, "blocks": given.blocks, "recipe": given.recipe, "clip": given.clip}
    with together() as ranks:
        if ranks.first and not model.exists():
            small = {"head_dim": 64} if given.divide > 1 else {}
            write_parent(parent_config(given.shape, given.blocks, divide=given.divide, **small), model)
        ranks.wait()
        if given.plan and ranks.size == 1:
            line["plan"] = asdict(forecast(open_source(str(model)), recipe, given.directory))
        line |= asdict(measure(model, given.directory / "out", recipe, ranks.device, ranks))
        if ranks.first:
            sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
