"""Coordinate descent after GPTQ, and the linears of a site quantized together."""

import pytest
import torch

from atomcli.algorithms.descent import descend
from atomcli.algorithms.gptq import damped, error_factor, gptq, relative_error
from atomcli.algorithms.together import compensate
from atomcli.formats.scheme import WeightFormat
from tests.algorithms.test_rounding import FORMATS, IDS, problem, scheme_of


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_every_sweep_lowers_the_error(format):
    weight, hessian = problem(24, 300)
    scheme = scheme_of(format, 20)
    sweeps = [compensate([weight], hessian, scheme, 1.0, sweeps=count)[0] for count in (0, 1, 3)]
    errors = [relative_error(weight, each.dequantize(), damped(hessian)) for each in sweeps]
    assert errors[1] < errors[0] * 0.99
    assert errors[2] <= errors[1] * (1 + 1e-5)


def test_no_single_code_can_be_improved_in_the_end():
    weight, hessian = problem(6, 90, seed=3)
    scheme = scheme_of(WeightFormat("int4", 32, "two_level"), 10)
    found = compensate([weight], hessian, scheme, 1.0, sweeps=16)[0]
    best = _errors(weight, found.dequantize(), damped(hessian))
    step = torch.cat([found.scales().repeat_interleave(32, 1)[:, :80], found.outlier_scale[:, None].expand(-1, 10)], 1)
    codes = torch.cat([found.body_codes(), found.outlier_codes], 1)
    for column in range(90):
        low, high = (-8, 7) if column < 80 else (-127, 127)
        for change in (-1, 1):
            moved = found.dequantize()
            allowed = (codes[:, column] + change >= low) & (codes[:, column] + change <= high)
            moved[:, column] += change * step[:, column]
            worse = _errors(weight, moved, damped(hessian)) >= best * (1 - 1e-4)
            assert (worse | ~allowed).all(), column


def _errors(weight, quantized, hessian):
    difference = quantized.double() - weight
    return ((difference @ hessian.double()) * difference).sum(1)


def test_descent_leaves_scales_and_grid_points_alone():
    weight, hessian = problem(8, 96)
    scheme = scheme_of(WeightFormat("int4", 32, "fp16"), 0)
    before = gptq(weight, error_factor(hessian), hessian.diagonal(), scheme, 0.9)
    after = descend(weight, before, damped(hessian), 2)
    assert torch.equal(after.group_scales, before.group_scales)
    assert after.outlier_codes is None
    exact = descend(before.dequantize(), before, damped(hessian), 1)
    assert torch.equal(exact.codes, before.codes), "a weight on the grid has nothing to gain"


@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_linears_together_are_the_linears_alone(format, natural):
    """Rows never mix; only a scale per tensor is shared."""
    weight, hessian = problem(24, 300)
    scheme = scheme_of(format, 0 if natural else 20)
    first, second = compensate([weight[:16], weight[16:]], hessian, scheme, "search", natural=natural)
    assert first.shape == (16, 300)
    assert second.shape == (8, 300)
    alone = compensate([weight[16:]], hessian, scheme, "search", natural=natural)[0]
    if format.scale == "e4m3":
        assert torch.equal(first.unit, second.unit)
        return
    different = (second.dequantize() - alone.dequantize()).abs() > 1e-4 * alone.dequantize().abs()
    assert different.float().mean() < 0.02, "only ties may fall differently"
