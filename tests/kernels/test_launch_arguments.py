"""What a launch tells the driver: where each argument lies and what is there, grid, stream and attributes."""

import ctypes
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from atomcli.errors import RunError
from atomcli.kernels import compiler
from atomcli.kernels.compiler import Defines, Kernel

Argument = torch.Tensor | int | float | None
Told = dict[str, Any]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Told]:
    """What a driver that does nothing was told, launch by launch: pointers, and the bytes that they point to."""
    launches: list[Told] = []

    def launch(config: Any, handle: ctypes.c_void_p, pointers: Any, extra: None) -> int:
        given = config._obj
        launches.append({
            "grid": tuple(given.grid), "block": tuple(given.block), "shared": given.shared_bytes,
            "stream": given.stream,
            "attributes": [(given.attributes[n].id, given.attributes[n].value) for n in range(given.attribute_count)],
            "handle": handle.value, "pointers": list(pointers),
            "bytes": [ctypes.string_at(pointer, 4) for pointer in pointers],
        })  # fmt: skip
        return 7 if given.block[0] > 1024 else 0

    monkeypatch.setattr(compiler, "cuda_driver", lambda: SimpleNamespace(cuLaunchKernelEx=launch))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)
    return launches


@pytest.fixture
def kernel() -> Kernel:
    """A kernel that was never loaded."""
    made = Kernel.__new__(Kernel)
    made.entry, made.shared_bytes, made.device_index, made.handle = "nothing", 512, 1, ctypes.c_void_p(99)
    return made


def number(argument: Argument) -> tuple[Callable[[int], Any], int | float]:
    """How the driver reads an argument, and what it should find."""
    if isinstance(argument, int):
        return ctypes.c_int32.from_address, argument
    if isinstance(argument, float):
        return ctypes.c_float.from_address, argument
    return ctypes.c_uint64.from_address, 0 if argument is None else argument.data_ptr()


def test_each_argument_lies_aligned_where_its_pointer_says(kernel: Kernel, told: list[Told]) -> None:
    tensor = torch.zeros(3)
    arguments = (3, tensor, None, 2.5, -7, True, tensor[1:], torch.nn.Parameter(tensor), 1.25, (1 << 31) - 1)
    kernel.launch(1, 32, *arguments)
    pointers = told[0]["pointers"]
    assert len(pointers) == len(arguments)
    for argument, pointer in zip(arguments, pointers, strict=True):
        read, expected = number(argument)
        assert pointer % (4 if isinstance(argument, int | float) else 8) == 0
        assert read(pointer).value == expected


def test_the_next_launch_passes_its_own_arguments(kernel: Kernel, told: list[Told]) -> None:
    first, second = torch.zeros(1), torch.zeros(1)
    for arguments in ((1, first, None), (2, second, None), (3, None, first), (4.0, second, 5), (1, first, None)):
        kernel.launch(1, 32, *arguments)
        for argument, pointer in zip(arguments, told[-1]["pointers"], strict=True):
            read, expected = number(argument)
            assert read(pointer).value == expected


def test_what_is_neither_a_number_nor_a_tensor_is_no_argument(kernel: Kernel, told: list[Told]) -> None:
    with pytest.raises(AttributeError, match="data_ptr"):
        kernel.launch(1, 32, np.int64(3))  # type: ignore[arg-type]
    assert told == []


def test_threads_do_not_share_what_they_pass(kernel: Kernel, told: list[Told]) -> None:
    kernel.launch(1, 32, 1)
    other = threading.Thread(target=kernel.launch, args=(1, 32, 2))
    other.start()
    other.join()
    assert told[0]["pointers"] != told[1]["pointers"]
    assert ctypes.c_int32.from_address(told[0]["pointers"][0]).value == 1


def test_grid_stream_and_attributes(kernel: Kernel, told: list[Told]) -> None:
    kernel.launch((3, 2), 64, 1, overlap=True)
    kernel.launch(5, 96, 1)
    with pytest.raises(RunError, match=r"nothing: the driver refused the launch of 5x1x1 blocks of 2048 threads"):
        kernel.launch(5, 2048, 1)
    one, two, _ = told
    assert (one["grid"], one["block"], one["shared"], one["stream"], one["handle"]) == (
        (3, 2, 1),
        (64, 1, 1),
        512,
        101,
        99,
    )
    assert one["attributes"] == [(6, 1)]
    assert (two["grid"], two["block"], two["attributes"]) == ((5, 1, 1), (96, 1, 1), [])


def test_defines_are_equal_by_what_they_say() -> None:
    one, other = Defines({"A": 1, "B": "x"}), Defines({"B": "x", "A": 1})
    assert one == other
    assert hash(one) == hash(other)
    assert one != Defines({"A": 1, "B": "y"})
