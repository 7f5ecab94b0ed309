"""The row kernels: what the assembler makes of them, for the longest rows that a block takes."""

import pytest

from atomcli.kernels import rowwise
from atomcli.kernels.compiler import compile_source
from tests.kernels.disassembly import compiles


@compiles
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_block_of_the_most_threads_fits_an_sm(chunks: int, dtype: str, arch: str) -> None:
    defines: dict[str, int | str] = {"INPUT": dtype, "CHUNKS": chunks, "RESIDUAL": 1}
    norm = compile_source(rowwise.SOURCE, arch, defines).resources["add_norm"]
    assert norm.registers * rowwise.MAX_THREADS <= 64 << 10
    assert norm.spill_bytes == 0
