"""What the assembler made of a kernel: its SASS, through nvdisasm where one is installed."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from atomcli.errors import UnsupportedError
from atomcli.kernels.compiler import _nvrtc


def _nvdisasm() -> str | None:
    """On the PATH, or where the wheel nvidia-cuda-nvdisasm puts it."""
    wheel = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin" / "nvdisasm"
    return shutil.which("nvdisasm") or (str(wheel) if wheel.exists() else None)


def _has_compiler() -> bool:
    try:
        _nvrtc()
    except UnsupportedError:
        return False
    return True


compiles = pytest.mark.skipif(not _has_compiler(), reason="needs NVRTC (pip install 'cupy-cuda13x[ctk]')")
disassembles = pytest.mark.skipif(_nvdisasm() is None, reason="needs nvdisasm (pip install nvidia-cuda-nvdisasm)")


def sass(cubin: bytes, folder: Path) -> str:
    """The disassembly of a cubin; `folder` is scratch."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([_nvdisasm() or "nvdisasm", "-c", path], check=True, capture_output=True, text=True).stdout
