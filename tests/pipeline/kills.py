"""Kill -9 at random moments, again and again: `python -m tests.pipeline.kills COUNT [SEED]`.

A child is forked, so that a start costs nothing, and killed after a random time; the next child continues what it
left. Whenever one gets through, its checkpoint must be byte for byte that of a run that nobody killed.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from atomcli.checkpoint.source import Source, open_source
from atomcli.pipeline.compress import compress
from tests.helpers.tiny import random_parent, random_tokens
from tests.pipeline.conftest import files_of, small_recipe


def make(source: Source, out: Path) -> None:
    compress(source, small_recipe(), out, tokens=random_tokens(6, 24), device="cpu")


def child(source: Source, out: Path) -> int:
    """Start a process that makes `out`; answers its id."""
    process = os.fork()
    if process:
        return process
    try:
        make(source, out)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def kills(count: int, seed: int, directory: Path) -> tuple[int, int, set[str]]:
    """Kill `count` children; answers kills, finished runs, and what the killed ones left (names of files)."""
    draw = random.Random(seed)
    random_parent("llama", torch.float32, num_hidden_layers=3)[0].save_pretrained(directory / "parent")
    source = open_source(str(directory / "parent"))
    started = time.monotonic()
    make(source, directory / "whole")
    whole = time.monotonic() - started
    expected, killed, finished, left = files_of(directory / "whole"), 0, 0, set()
    out = directory / "out"
    while killed < count:
        process = child(source, out)
        time.sleep(draw.random() ** 2 * 1.2 * whole)  # more often early: a continued run has less to do
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            killed += 1
            left |= {path.name for path in directory.rglob("*")}
            continue
        assert os.WEXITSTATUS(status) == 0, f"kill {killed}, seed {seed}: a continued run failed"
        assert files_of(out) == expected, f"kill {killed}, seed {seed}: the bytes differ"
        shutil.rmtree(out)
        finished += 1
    process = child(source, out)
    assert os.waitpid(process, 0)[1] == 0
    assert files_of(out) == expected
    assert {path.name for path in directory.iterdir()} - {"cache"} == {"out", "parent", "whole"}
    return killed, finished + 1, left


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["ATOM_CACHE"] = f"{scratch}/cache"
        seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
        done, through, names = kills(int(sys.argv[1]), seed, Path(scratch))
        print(f"{done} kills, {through} runs got through, byte for byte; left on the way: {', '.join(sorted(names))}")
