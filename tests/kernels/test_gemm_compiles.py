"""Every tile of the sm_90a GEMM compiles: 8-bit MMAs, no spills, nothing serialized. Needs no GPU."""

import re
from pathlib import Path

import pytest
import torch

from atomcli.errors import RunError
from atomcli.kernels import compiler, layouts, tiles, tune
from tests.kernels.disassembly import compiles, disassembles, sass

pytestmark = compiles


@disassembles
@pytest.mark.parametrize("kind", ["w4", "w8", "mxfp4"])
@pytest.mark.parametrize("tile", tune.TILES, ids=str)
def test_tile_compiles_to_its_mmas_without_spills(tile: tiles.Tile, kind: layouts.Kind, tmp_path: Path) -> None:
    tile = tune.fit(tile, kind)
    program = compiler.compile_source(tiles.source(kind), "90a", tile.defines(torch.bfloat16))
    assert program.resources["gemm"].spill_bytes == 0
    listing = sass(program.cubin, tmp_path)
    if kind == "mxfp4":
        assert re.search(r"QGMMA.64x\d+x32.F32.E4M3.E4M3", listing)
    else:
        assert f"IGMMA.64x{tile.tokens}x32.S8.S8" in listing
    assert "UBLKCP" in listing
    assert not re.search(r"\b(LDL|STL)\b", listing)


def test_errors_carry_the_compilers_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.cu").write_text("__global__ void kernel() { undeclared = 1; }")
    monkeypatch.setattr(compiler, "resource_directory", lambda name: tmp_path)
    with pytest.raises(RunError, match='identifier "undeclared" is undefined'):
        compiler.compile_source("broken.cu", "90a")


def test_a_changed_header_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "resource_directory", lambda name: tmp_path)
    (tmp_path / "kernel.cu").write_text(
        '#include "value.cuh"\nextern "C" __global__ void kernel(int* p) { *p = VALUE; }'
    )
    cubins = []
    for value in (1, 2, 1):
        (tmp_path / "value.cuh").write_text(f"#define VALUE {value}")
        cubins.append(compiler.compile_source("kernel.cu", "90a").cubin)
    assert cubins[0] == cubins[2] != cubins[1]
