"""Packed weights and operands hold what the fragments of the hardware say, element by element."""

import pytest
import torch

from atomcli.errors import UnsupportedError
from atomcli.formats.scheme import SCHEMES, ActivationFormat, Scheme, WeightFormat
from atomcli.formats.weights import QuantizedWeight
from atomcli.kernels import layouts


def thread_holds(word_register: int, thread: int, byte: int, step: int) -> tuple[int, int]:
    """(row in the row group, channel in the block) of one byte of an A operand, from the PTX tables of wgmma m64k32."""
    warp, lane = divmod(thread, 32)
    row = 16 * warp + lane // 4 + 8 * (word_register % 2)
    return row, 32 * step + 16 * (word_register // 2) + 4 * (lane % 4) + byte


def test_int8_blocks_are_in_register_order() -> None:
    codes = torch.randint(-128, 128, (128, 256), dtype=torch.int8)
    packed = layouts.pack_int8(codes).view(torch.int8)
    assert packed.shape == (2, 2, layouts.INT8_BLOCK_BYTES)
    for step, thread, register, byte in ((0, 0, 0, 0), (1, 37, 1, 2), (3, 127, 3, 3), (2, 64, 2, 1)):
        row, channel = thread_holds(register, thread, byte, step)
        assert packed[1, 1, step * 2048 + thread * 16 + register * 4 + byte] == codes[64 + row, 128 + channel]


def test_int4_blocks_unpack_to_code_times_multiplier() -> None:
    codes = torch.randint(-8, 8, (100, 300), dtype=torch.int8)
    multipliers = torch.randint(-15, 16, (100, 3), dtype=torch.int8)
    packed = layouts.pack_int4(codes, multipliers).int()
    assert packed.shape == (2, 3, layouts.INT4_BLOCK_BYTES)
    expected = torch.nn.functional.pad(codes, (0, 84, 0, 28)).int()
    expected *= torch.nn.functional.pad(multipliers, (0, 0, 0, 28)).int().repeat_interleave(128, 1)
    for group, block, step, thread, register, byte in (
        (0, 0, 0, 0, 0, 0),
        (1, 1, 3, 77, 2, 3),
        (0, 2, 1, 127, 1, 1),
        (1, 2, 2, 3, 3, 2),
    ):
        row, channel = thread_holds(register, thread, byte, step)
        word = step * 2 + register // 2
        stored = packed[group, block, word // 4 * 2048 + thread * 16 + word % 4 * 4 + byte]
        nibble = stored >> 4 if register % 2 else stored & 15
        multiplier = packed[group, block, 4096 + row]
        value = (nibble - 8 + (multiplier >> 7)) * (multiplier & 15)
        assert value == expected[64 * group + row, 128 * block + channel]


def test_operand_rows_are_swizzled_by_their_number() -> None:
    codes = torch.randint(-128, 128, (11, 256), dtype=torch.int8)
    packed = layouts.pack_operand(codes, 16).view(torch.int8)
    for token, channel in ((0, 0), (3, 17), (10, 255), (9, 130)):
        block, inside = divmod(channel, 128)
        chunk = (inside // 16) ^ (token % 8)
        assert packed[block, token, chunk * 16 + inside % 16] == codes[token, channel]
    assert not packed[:, 11:].any()


def test_refuses_what_the_gemm_does_not_read() -> None:
    scheme = Scheme(WeightFormat("int4", 64, "two_level"), ActivationFormat("int8"))
    weight = QuantizedWeight.from_codes(
        scheme, torch.zeros(8, 128, dtype=torch.int8), torch.ones(8, 2, dtype=torch.int8), torch.ones(8)
    )
    with pytest.raises(UnsupportedError, match="two-level scales of 128"):
        layouts.prepare_weight(weight)


def mxfp4_weight(rows: int, channels: int, low: int, high: int) -> QuantizedWeight:
    """Random codes, and exponents low ... high of their groups; one group of the second row is zero, far below."""
    codes = torch.randint(0, 16, (rows, channels), dtype=torch.int8)
    exponents = torch.randint(low, high + 1, (rows, -(-channels // 32)), dtype=torch.uint8)
    codes[1, :32], exponents[1, 0] = 0, 0
    codes[2, 0], exponents[2, 0], exponents[2, 1] = 7, high, low
    return QuantizedWeight.from_codes(SCHEMES["mxfp4"], codes, exponents)


def test_mxfp4_blocks_unpack_to_code_times_power() -> None:
    weight = mxfp4_weight(100, 300, 110, 121)
    packed = layouts.prepare_mxfp4(weight)
    assert packed is not None
    assert packed.body.shape == (2, 3, layouts.MXFP4_BLOCK_BYTES)
    expected = torch.nn.functional.pad(weight.dequantize(), (0, 84, 0, 28))
    for thread in (0, 5, 37, 127):
        for group, block, step, register in ((0, 0, 0, 0), (1, 1, 3, 2), (0, 2, 1, 1), (1, 2, 2, 3)):
            place = step // 2 * 2048 + thread * 16 + (step * 2 + register // 2) % 4 * 4
            word = int.from_bytes(bytes(packed.body[group, block, place : place + 4].tolist()), "little")
            for byte in range(4):
                row, channel = thread_holds(register, thread, byte, step)
                power = int(packed.body[group, block, 4096 + row * 4 + step])
                magnitude = word >> 16 * (register % 2) + 4 * byte & 7
                sign = word >> (8 * byte + (3 if register % 2 else 7)) & 1
                assert power % 8 == 0
                assert 8 <= power <= 96
                e4m3 = (0, power, *(power + 4 * code for code in range(2, 8)))[magnitude] | sign << 7
                value = torch.tensor(e4m3, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
                value *= packed.row_scale[64 * group + row]
                assert value == expected[64 * group + row, 128 * block + channel]


def test_mxfp4_rows_of_too_many_octaves_are_not_taken() -> None:
    assert layouts.prepare_mxfp4(mxfp4_weight(64, 256, 100, 112)) is None
    assert layouts.prepare_mxfp4(mxfp4_weight(64, 256, 0, 3)) is not None  # below the smallest row scale: still normal
