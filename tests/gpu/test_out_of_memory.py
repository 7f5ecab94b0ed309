"""A GPU with too little memory: chunks get smaller and no token is lost or counted twice, or there is a sentence."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atomcli.benchmarks.parents import parent_config, write_parent
from atomcli.checkpoint.manifest import read_report

pytestmark = pytest.mark.gpu

# Of 512 sequences of 512 tokens 32 go through a block at a time, whose activations take more than half a gigabyte;
# GPTQ of 1024 channels takes next to nothing.
PROGRAM = """
import sys, torch
torch.cuda.set_per_process_memory_fraction(float(sys.argv.pop(1)) / torch.cuda.get_device_properties(0).total_memory)
from atomcli.cli.app import main
main()
"""


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("oom")
    config = parent_config("llama-2-7b", 2, hidden_size=512, intermediate_size=1024, num_attention_heads=8,
                           num_key_value_heads=8, head_dim=64, vocab_size=300)  # fmt: skip
    write_parent(config, directory / "parent")
    (directory / "text.txt").write_text("Atoms are small, and there are many of them. " * 8000)
    return directory


def quantize(parent: Path, out: str, megabytes: float) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "-c", PROGRAM, str(megabytes * 1e6), "quantize", str(parent / "parent")),
        *("-o", str(parent / out), "--dataset", str(parent / "text.txt")),
        *("--samples", "512", "--sequence-length", "512", "--no-color"),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])


def layers(parent: Path, out: str) -> list[dict[str, Any]]:
    return read_report(parent / out)["layers"]


def test_smaller_chunks_make_the_same_checkpoint(parent):
    whole, little = quantize(parent, "whole", 8000), quantize(parent, "little", 420)
    assert whole.returncode == 0, whole.stderr
    assert "out of memory" not in whole.stderr
    assert little.returncode == 0, little.stderr
    assert "out of memory with 32 sequences at a time: going on with 16" in little.stderr
    for one, other in zip(layers(parent, "whole"), layers(parent, "little"), strict=True):
        assert one["tokens"] == other["tokens"] == 512 * 512
        # The matrix library may round a smaller product differently, and nothing else may differ.
        assert one["error"] == pytest.approx(other["error"], rel=0.02)
        assert one["bytes"] == other["bytes"]


def test_memory_for_less_than_one_sequence_is_a_sentence(parent):
    ended = quantize(parent, "none", 30)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "Memory does not suffice" in " ".join(ended.stderr.split())
    assert not (parent / "none").exists()
