import pytest
import torch

from atomcli.formats import grids
from atomcli.formats.packing import pack_nibbles, unpack_nibbles

E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize("grid", [grids.INT4, grids.INT4_FULL, grids.UINT4, grids.INT8])
def test_integers_inside_the_range_are_exact_and_outside_saturate(grid: grids.Grid) -> None:
    values = torch.arange(grid.low, grid.high + 1)
    assert torch.equal(grids.decode(grids.encode(values, grid), grid), values)
    assert grids.encode(torch.tensor([-1e9, 1e9]), grid).tolist() == [grid.low, grid.high]


def test_e2m1_codes_follow_the_specification() -> None:
    codes = torch.arange(16, dtype=torch.int8)
    expected = torch.tensor(E2M1_VALUES + [-value for value in E2M1_VALUES])
    assert torch.equal(grids.decode(codes, grids.E2M1), expected)
    reencoded = grids.encode(expected, grids.E2M1)
    assert torch.equal(reencoded[codes != 8], codes[codes != 8])
    assert reencoded[8] == 0  # minus zero has one code


def test_e2m1_encodes_to_the_nearest_value_and_ties_to_the_even_mantissa() -> None:
    x = torch.linspace(-7, 7, 2801, dtype=torch.float64).float()
    table = torch.tensor(E2M1_VALUES + [-value for value in E2M1_VALUES[1:]])
    nearest = (x[:, None] - table).abs().amin(dim=1)
    chosen = (x - grids.decode(grids.encode(x, grids.E2M1), grids.E2M1)).abs()
    assert torch.allclose(chosen, nearest, atol=1e-6)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert grids.decode(grids.encode(ties, grids.E2M1), grids.E2M1).tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_reciprocal_of_nothing_is_nothing() -> None:
    scale = torch.tensor([0.0, 1e-38, -0.0, 2.0, -4.0])
    assert grids.reciprocal(scale).tolist() == [0, 0, 0, 0.5, -0.25]


@pytest.mark.parametrize("count", [1, 2, 7, 128])
@pytest.mark.parametrize("signed", [True, False])
def test_packing_is_lossless_and_low_nibble_first(count: int, signed: bool) -> None:
    low, high = (-8, 7) if signed else (0, 15)
    codes = torch.randint(low, high + 1, (5, count), generator=torch.Generator().manual_seed(count)).to(torch.int8)
    packed = pack_nibbles(codes)
    assert packed.shape == (5, (count + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, count, signed), codes)
    assert torch.equal(packed[:, 0] & 0xF, codes[:, 0].view(torch.uint8) & 0xF)
