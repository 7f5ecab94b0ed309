"""From a CUDA C++ file in `cuda/` to a kernel one can launch: compile with NVRTC, keep the cubin, load, launch.

Everything up to loading works on a machine without a GPU, for every architecture; the tests rely on it. A source
includes nothing but our own headers, so a cubin depends on exactly what its cache key is made of: the source, the
headers it includes, the defines, the options, the architecture and the version of NVRTC.
"""

import ctypes
import functools
import hashlib
import logging
import os
import re
import struct
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atomcli.errors import RunError, UnsupportedError
from atomcli.resources import resource_directory

log = logging.getLogger("atomcli")

OPTIONS = ("-std=c++17", "--ptxas-options=-v")  # -v: only then do warnings about serialized wgmma reach the log

# ptxas serializes the warpgroup MMAs of a kernel and merely warns about it: half the speed, so an error here.
SERIALIZED = re.compile(r"\(C751[0-58]\)")
INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """What the assembler says one kernel needs."""

    registers: int
    spill_bytes: int
    stack_bytes: int


@dataclass(frozen=True)
class Program:
    """A compiled source: the cubin, the compiler's log and the resources of each kernel in it."""

    cubin: bytes
    log: str

    @functools.cached_property
    def resources(self) -> dict[str, Resources]:
        found = {}
        usage = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
        for entry, *numbers in re.findall(rf"Compiling entry function '(.+?)'.*?{usage}", self.log, re.DOTALL):
            stack, stores, loads, registers = (int(number) for number in numbers)
            found[entry] = Resources(registers, stores + loads, stack)
        return found


def cache_directory() -> Path:
    return Path(os.environ.get("ATOM_CACHE") or Path.home() / ".cache" / "atom") / "kernels"


@functools.cache
def architecture(device: torch.device) -> str:
    """The compilation target of a card: "90a" for an H100. The suffix gives instructions of just that generation."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}" + ("a" if major >= 9 else "")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many SMs the card has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def compile_source(file: str, arch: str, defines: Mapping[str, int | str] | None = None) -> Program:
    """Compile `cuda/<file>` for `arch` ("80", "90a", ...) with `defines`, or take it from the cache.

    Raises RunError with the compiler's log, also when the compiler serialized warpgroup MMAs.
    """
    source = (resource_directory("cuda") / file).read_text()
    headers = _headers(source)
    options = (f"-arch=sm_{arch}", *OPTIONS, *(f"-D{name}={value}" for name, value in sorted((defines or {}).items())))
    parts = (source, *(text for item in sorted(headers.items()) for text in item), *options, str(_nvrtc().getVersion()))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    stem = f"{Path(file).stem}-{key[:32]}"
    program = _read_cached(stem)
    if program is None:
        program = _compile(file, source, headers, options)
        _write_cached(stem, program)
    return program


def _headers(source: str) -> dict[str, str]:
    """All headers that a source includes, directly or through another: name -> text."""
    headers, pending = {}, INCLUDE.findall(source)
    while pending:
        name = pending.pop()
        if name not in headers:
            headers[name] = (resource_directory("cuda") / name).read_text()
            pending += INCLUDE.findall(headers[name])
    return headers


def require_compiler() -> None:
    """Raise UnsupportedError if CuPy or NVRTC can't be loaded."""
    _nvrtc()


@functools.cache
def _nvrtc() -> Any:
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
        return nvrtc
    except Exception as error:  # CuPy reports a library it can't find by an exception of another package
        raise UnsupportedError(
            f"The CUDA runtime compiler can't be loaded: {type(error).__name__}: {str(error).splitlines()[0]}",
            "Install it with `pip install 'cupy-cuda13x[ctk]'`",
        ) from error


def _compile(file: str, source: str, headers: Mapping[str, str], options: tuple[str, ...]) -> Program:
    nvrtc = _nvrtc()
    texts, names = (tuple(item.encode() for item in items) for items in (headers.values(), headers))
    program = nvrtc.createProgram(source, file, texts, names)
    try:
        nvrtc.compileProgram(program, options)
        # CuPy takes the cubin for a string and drops its last byte, the top byte of an alignment.
        compiled = Program(nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program))
    except nvrtc.NVRTCError as error:
        raise RunError(f"{file} does not compile with {' '.join(options)}:\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)
    if SERIALIZED.search(compiled.log):
        raise RunError(f"{file}: the assembler serialized warpgroup MMAs with {' '.join(options)}:\n{compiled.log}")
    return compiled


def _read_cached(stem: str) -> Program | None:
    try:
        return Program(
            (cache_directory() / f"{stem}.cubin").read_bytes(), (cache_directory() / f"{stem}.log").read_text()
        )
    except OSError:
        return None


def _write_cached(stem: str, program: Program) -> None:
    """The log first: a cubin that is there is complete. A cache that can't be written costs time, nothing else."""
    try:
        cache_directory().mkdir(parents=True, exist_ok=True)
        for suffix, content in ((".log", program.log.encode()), (".cubin", program.cubin)):
            with tempfile.NamedTemporaryFile(dir=cache_directory(), delete=False) as file:
                file.write(content)
            Path(file.name).replace(cache_directory() / (stem + suffix))
    except OSError as error:
        log.warning("compiled kernels are not kept: %s", error)


class _LaunchAttribute(ctypes.Structure):  # CUlaunchAttribute of cuda.h
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("union", ctypes.c_byte * 60))


class _LaunchConfig(ctypes.Structure):  # CUlaunchConfig of cuda.h
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
OVERLAP = ctypes.pointer(_LaunchAttribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1))


@functools.cache
def cuda_driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


class Kernel:
    """A kernel on one device, launched on torch's current stream.

    The driver is called directly: CuPy's own launch takes no launch attributes and three times as long.
    """

    def __init__(self, program: Program, entry: str, shared_bytes: int, device: torch.device) -> None:
        from cupy.cuda import driver, function

        self.device, self.entry = device, entry
        self.shared_bytes = shared_bytes
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes torch's context the current one
            self.device_index = torch.cuda.current_device()
            self.module = function.Module()
            self.module.load(program.cubin)
            self.handle = ctypes.c_void_p(self.module.get_function(entry).ptr)
            if shared_bytes > 48 << 10:
                driver.funcSetAttribute(self.handle.value, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)

    def launch(
        self,
        grid: int | tuple[int, ...],
        block: int,
        *arguments: torch.Tensor | int | float | None,
        overlap: bool = False,
    ) -> None:
        """Enqueue one launch. Tensors pass their address, None the null pointer, int and float 32 bits.

        `overlap`: programmatic dependent launch; the kernel may start while its predecessor in the stream still
        runs, and must itself wait (griddepcontrol.wait) before it touches what the predecessor writes.
        """
        x, y, z = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1, 1)[:3]
        config = _own.config
        config.grid, config.block = (x, y, z), (block, 1, 1)
        config.shared_bytes, config.stream = self.shared_bytes, torch._C._cuda_getCurrentRawStream(self.device_index)
        config.attributes, config.attribute_count = (OVERLAP, 1) if overlap else (None, 0)
        pointers = _own.packed(arguments)
        status = cuda_driver().cuLaunchKernelEx(ctypes.byref(config), self.handle, pointers, None)
        if status:
            raise RunError(
                f"{self.entry}: the driver refused the launch of {x}x{y}x{z} blocks of {block} threads with "
                f"{self.shared_bytes} bytes of shared memory (CUresult {status})"
            )


class _Arguments:
    """Room for arguments of some types: the bytes that a launch passes on, and where the driver finds each."""

    def __init__(self, kinds: tuple[type, ...]) -> None:
        codes = ["i" if issubclass(kind, int) else "f" if issubclass(kind, float) else "P" for kind in kinds]
        self._struct = struct.Struct("".join(codes))
        pointers = [place for place, code in enumerate(codes) if code == "P"]
        self._missing = [place for place in pointers if kinds[place] is type(None)]
        self._tensors = [place for place in pointers if place not in self._missing]
        self._values = (ctypes.c_char * self._struct.size)()
        ends = [struct.calcsize("".join(codes[: count + 1])) for count in range(len(codes))]
        begins = [end - struct.calcsize(code) for end, code in zip(ends, codes, strict=True)]
        start = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * len(codes))(*[start + begin for begin in begins])

    def pack(self, arguments: Sequence[torch.Tensor | int | float | None]) -> ctypes.Array:
        """Where the driver finds each of these arguments, until the next are packed."""
        numbers: list[Any] = list(arguments)
        for place in self._tensors:
            numbers[place] = numbers[place].data_ptr()
        for place in self._missing:
            numbers[place] = 0
        self._struct.pack_into(self._values, 0, *numbers)
        return self._pointers


class _Own(threading.local):
    """What a thread passes to the driver, made once: a launch has copied it when it returns, and can't wait for it."""

    def __init__(self) -> None:
        self.config = _LaunchConfig()
        self._arguments: dict[tuple[type, ...], _Arguments] = {}

    def packed(self, arguments: Sequence[torch.Tensor | int | float | None]) -> ctypes.Array:
        """Where the driver finds each argument."""
        kinds = tuple(map(type, arguments))
        room = self._arguments.get(kinds)
        if room is None:
            room = self._arguments[kinds] = _Arguments(kinds)
        return room.pack(arguments)


_own = _Own()


class Defines(dict[str, int | str]):
    """What a source is compiled with, never changed once made: a launch looks its kernel up by it."""

    def __hash__(self) -> int:  # type: ignore[override]
        if not hasattr(self, "_hash"):
            self._hash = hash(tuple(sorted(self.items())))
        return self._hash


_loaded: dict[tuple, Kernel] = {}


def load_kernel(
    file: str, entry: str, device: torch.device, defines: Mapping[str, int | str] | None = None, shared_bytes: int = 0
) -> Kernel:
    """The kernel `entry` of `cuda/<file>` on `device`, compiled and loaded on first use."""
    defines = defines if isinstance(defines, Defines) else Defines(defines or {})
    key = (file, entry, device.index, defines, shared_bytes)
    if key not in _loaded:
        _loaded[key] = Kernel(compile_source(file, architecture(device), defines), entry, shared_bytes, device)
    return _loaded[key]
