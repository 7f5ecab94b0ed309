"""Runs CUDA kernels on a CPU: the source is compiled by g++ against tests/kernels/host, each thread is a fiber.

It checks what a kernel computes, index by index, where there is no card; it says nothing about time or races.
"""

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from atomcli.resources import resource_directory

HOST = Path(__file__).parent / "host"
COMPILER = shutil.which("g++")
# No contraction: the device code says where it wants an FMA.
OPTIONS = ("-std=c++20", "-O1", "-w", "-fPIC", "-ffp-contract=off")


@functools.cache
def _precompiled() -> tempfile.TemporaryDirectory[str]:
    """The emulator's header, parsed once for all kernels."""
    folder = tempfile.TemporaryDirectory(prefix="atom-emulator-")
    shutil.copy(HOST / "cuda_on_host.h", folder.name)
    header = Path(folder.name) / "cuda_on_host.h"
    subprocess.run([COMPILER, *OPTIONS, "-x", "c++-header", "-o", f"{header}.gch", header], check=True)
    return folder


@functools.cache
def _build(file: str, entry: str, defines: tuple[tuple[str, int | str], ...]) -> ctypes.CDLL:
    sources = {path.name: path.read_text() for path in resource_directory("cuda").glob("*.cu*")}
    # In place of headers whose instructions belong to one architecture.
    sources |= {path.name: path.read_text() for path in HOST.glob("*.cuh")}
    # The block's dynamic shared memory is an array of the emulator.
    sources = {name: re.sub(r"extern __shared__[^;]*shared_bytes\[\];", "", text) for name, text in sources.items()}
    with tempfile.TemporaryDirectory(prefix="atom-emulator-") as folder:
        for name, content in sources.items():
            (Path(folder) / name).write_text(content)
        main = Path(folder) / "main.cpp"
        main.write_text(
            f'{sources[file]}\nextern "C" void run(unsigned x, unsigned y, unsigned z, unsigned threads, void** args) '
            f"{{ host::launch({entry}, {{x, y, z}}, threads, args); }}\n"
        )
        library = Path(folder) / f"lib{hashlib.sha256(repr(defines).encode()).hexdigest()[:16]}.so"
        macros = [f"-D{name}={value}" for name, value in defines]
        include = ("-shared", "-include", str(Path(_precompiled().name) / "cuda_on_host.h"))
        subprocess.run([COMPILER, *OPTIONS, *include, *macros, "-o", library, main], check=True, cwd=folder)
        return ctypes.CDLL(str(library))


class HostKernel:
    """The stand-in for atomcli.kernels.compiler.Kernel: the same launch arguments, CPU tensors."""

    def __init__(self, file: str, entry: str, defines: Mapping[str, int | str]) -> None:
        self.library = _build(file, entry, tuple(sorted(defines.items())))

    def launch(
        self, grid: int | tuple[int, ...], block: int, *arguments: torch.Tensor | float | None, **_: object
    ) -> None:
        """Run one grid to its end."""
        values: list[ctypes.c_void_p | ctypes.c_int32 | ctypes.c_float] = []
        for value in arguments:
            if value is None or isinstance(value, torch.Tensor):
                values.append(ctypes.c_void_p(0 if value is None else value.data_ptr()))
            else:
                values.append(ctypes.c_int32(value) if isinstance(value, int) else ctypes.c_float(value))
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        x, y, z = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1, 1)[:3]
        self.library.run(x, y, z, block, pointers)
