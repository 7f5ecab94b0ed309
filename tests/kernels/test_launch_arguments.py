"""Where a launch tells the driver to find a kernel's arguments, and what lies there."""

import ctypes

import torch

from atomcli.kernels import compiler


def test_each_argument_lies_aligned_where_its_pointer_says() -> None:
    tensor = torch.zeros(3)
    arguments = (3, tensor, None, 2.5, -7, True, tensor[1:], 1.25, (1 << 31) - 1)
    pointers, values = compiler._packed(arguments)
    assert len(pointers) == len(arguments)
    for argument, pointer in zip(arguments, pointers, strict=True):
        if isinstance(argument, int):
            kind, expected = ctypes.c_int32, argument
        elif isinstance(argument, float):
            kind, expected = ctypes.c_float, argument
        else:
            kind, expected = ctypes.c_uint64, 0 if argument is None else argument.data_ptr()
        assert pointer % ctypes.sizeof(kind) == 0
        assert ctypes.addressof(values) <= pointer <= ctypes.addressof(values) + len(values) - ctypes.sizeof(kind)
        assert kind.from_address(pointer).value == expected


def test_launches_of_other_types_do_not_share_a_layout() -> None:
    first, _ = compiler._packed((1, 2))
    second, _ = compiler._packed((1, torch.zeros(1)))
    assert first[1] - first[0] == 4
    assert second[1] - second[0] == 8
