"""Two processes, each with its own GPU, make bit for bit what one makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def measured(directory: Path, shape: str, processes: int) -> dict[str, object]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    sizes = ("--divide", "8", "--samples", "32", "--tokens", "256")
    command = [sys.executable, *launcher, "-m", "atomcli.benchmarks.large", shape, "2", str(directory), *sizes]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "ATOM_CACHE": str(directory / "cache")}
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, cwd=Path(__file__).parents[2]
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("shape", ["llama-2-7b", "mixtral-8x7b"])
def test_two_gpus_make_what_one_makes(shape, tmp_path):
    one, two = measured(tmp_path, shape, 1), measured(tmp_path, shape, 2)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["sha256"] == two["sha256"]
