"""How time and memory of `atom quantize` grow with depth and width: `python -m atomcli.benchmarks.scaling OUT.json`.

Every model is made up, quantized in a process of its own, and deleted. CPU seconds are counted, with one thread: they
say the same on a machine that others use, too. `plot` draws what was measured and the law fitted to it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atomcli.benchmarks.parents import parent_config, write_parent
from atomcli.checkpoint.source import open_source
from atomcli.pipeline.compress import compress
from atomcli.recipe import Recipe, load_recipe

BLOCKS = (1, 2, 4, 8, 16)
DIVIDE = (8, 4)  # Llama-2-7B with hidden size 512 and 1024
SAMPLES, TOKENS = 4, 128


@dataclass(frozen=True)
class Run:
    """One model: its size, and the CPU seconds and largest resident size (bytes) of the process that quantized it."""

    hidden: int
    blocks: int
    block_bytes: int
    seconds: float
    memory: int


@dataclass(frozen=True)
class Law:
    """seconds = once + blocks * per_block * (hidden / 1024) ^ exponent; memory grows by `depth_bytes` a block."""

    once: float
    per_block: float
    exponent: float
    depth_bytes: float
    error: float


def measure(shape: str, divide: int, blocks: int, samples: int = SAMPLES, tokens: int = TOKENS) -> Run:
    """Quantize a made-up model in a forked process, so that its memory is its own."""
    config = parent_config(shape, blocks, divide=divide, head_dim=64, vocab_size=2000)
    with tempfile.TemporaryDirectory() as scratch:
        directory = write_parent(config, Path(scratch) / "parent")
        child = os.fork()
        if not child:
            code = 1
            try:
                os.environ["ATOM_CACHE"] = f"{scratch}/cache"
                _quantize(directory, Path(scratch) / "out", samples, tokens)
                code = 0
            finally:
                os._exit(code)
        _, status, used = os.wait4(child, 0)
        if status:
            raise ChildProcessError(f"{shape} / {divide} with {blocks} blocks failed")
        source = open_source(str(directory))
        block = sum(2 * int(np.prod(source.shape(name))) for name in source.names() if ".layers.0." in name)
    return Run(config["hidden_size"], blocks, block, used.ru_utime + used.ru_stime, used.ru_maxrss << 10)


def _quantize(directory: Path, out: Path, samples: int, tokens: int) -> None:
    torch.set_num_threads(1)
    recipe = load_recipe("atom-w4a4").resolved()
    recipe["calibration"] |= {"samples": samples, "sequence_length": tokens}
    text = torch.randint(3, 259, (samples, tokens), generator=torch.Generator().manual_seed(0))
    compress(open_source(str(directory)), Recipe.model_validate(recipe), out, tokens=text, device="cpu")


def fit(runs: Sequence[Run]) -> Law:
    """The law that is nearest to the measured times, relative to each; and the slope of memory over depth."""
    from scipy.optimize import least_squares

    hidden, blocks, seconds = (np.array([float(getattr(run, key)) for run in runs]) for key in _KEYS)

    def predicted(law: Any) -> Any:
        return law[0] + blocks * law[1] * (hidden / 1024) ** law[2]

    found = least_squares(lambda law: predicted(law) / seconds - 1, [1.0, 1.0, 2.0]).x
    slopes = [
        np.polyfit([r.blocks for r in part], [r.memory for r in part], 1)[0]
        for part in ([run for run in runs if run.hidden == size] for size in sorted(set(hidden)))
        if len(part) > 1
    ]
    error = float(np.abs(predicted(found) / seconds - 1).max())
    once, per_block, exponent = (float(value) for value in found)
    return Law(once, per_block, exponent, float(max(slopes)), error)


_KEYS = ("hidden", "blocks", "seconds")


def plot(runs: Sequence[Run], law: Law, path: Path) -> None:
    """Time and memory over the number of blocks, measured and fitted, as SVG (or what the name says)."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "atom"
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for size in sorted({run.hidden for run in runs}):
        part = [run for run in runs if run.hidden == size]
        depth = np.array([run.blocks for run in part])
        (line,) = time.plot(depth, [run.seconds for run in part], "o", label=f"hidden size {size}")
        fitted = law.once + depth * law.per_block * (size / 1024) ** law.exponent
        time.plot(depth, fitted, color=line.get_color(), linewidth=1)
        memory.plot(depth, [run.memory / 1e6 for run in part], "o-", label=f"hidden size {size}")
    time.set(xlabel="blocks", ylabel="CPU seconds (line: the law)", xscale="log", yscale="log")
    memory.set(xlabel="blocks", ylabel="largest resident size (MB)", ylim=(0, None))
    for axes in (time, memory):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(out: Path) -> None:
    """Measure every size and write the runs, the law and the plot beside them."""
    torch.set_num_threads(1)
    runs = [measure("llama-2-7b", divide, blocks) for divide in DIVIDE for blocks in BLOCKS]
    law = fit(runs)
    document = {"runs": [asdict(run) for run in runs], "law": asdict(law)}
    out.write_text(json.dumps(document, indent=2) + "\n")
    plot(runs, law, out.with_suffix(".svg"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
