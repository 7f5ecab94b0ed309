"""Memory: a model that does not fit is compressed all the same."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from atomcli.benchmarks.parents import parent_config, write_parent
from tests.helpers.tiny import VOCABULARY

BLOCKS, HIDDEN, WIDTH = 32, 320, 640
BLOCK_BYTES = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDTH)  # fp32

# The limit is on what the process allocates beyond what Python, torch and transformers hold after their imports.
PRELUDE = textwrap.dedent("""
    import resource, sys, threading
    from pathlib import Path
    import torch
    from atomcli.checkpoint.source import open_source
    from atomcli.pipeline.compress import compress
    from atomcli.runtime.decoder import load_parent
    from tests.helpers.tiny import random_tokens
    from tests.pipeline.conftest import small_recipe

    torch.set_num_threads(1)
    threading.stack_size(1 << 20)  # RLIMIT_DATA counts the 8 MiB of stack that each thread could use
    torch.ones(64, 64) @ torch.ones(64, 64)
    source = open_source(sys.argv[1])
    held = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[3]), held + int(sys.argv[3])))
""")
PROGRAM = textwrap.dedent("""
    compress(source, small_recipe(), Path(sys.argv[2]), tokens=random_tokens(4, 64), device="cpu")
    try:
        load_parent(source)
    except (MemoryError, RuntimeError) as error:
        sys.exit(0 if "memory" in str(error).lower() or isinstance(error, MemoryError) else repr(error))
    sys.exit("the limit must be one that the whole model exceeds")
""")


CONFIG = parent_config(
    "llama-2-7b",
    BLOCKS,
    hidden_size=HIDDEN,
    intermediate_size=WIDTH,
    num_attention_heads=5,
    num_key_value_heads=5,
    head_dim=HIDDEN // 5,
    vocab_size=VOCABULARY,
    tie_word_embeddings=True,
    dtype="float32",
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts anonymous memory on Linux only")
def test_a_model_larger_than_the_memory_is_compressed(tmp_path):
    limit = 16 * BLOCK_BYTES  # half of the blocks: two for the road, the rest for buffers that torch and malloc keep
    parent = write_parent(CONFIG, tmp_path / "parent")
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "ATOM_CACHE": str(tmp_path / "cache"),
    }

    command = [sys.executable, "-c", PRELUDE + PROGRAM, str(parent), str(tmp_path / "out"), str(limit)]
    ours = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ours.returncode == 0, ours.stderr[-2000:]
    assert (tmp_path / "out" / "atom_manifest.json").is_file()
