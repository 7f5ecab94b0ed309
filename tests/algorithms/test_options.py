"""Options of the method: relative damping, random signs."""

import pytest
import torch

from atomcli.algorithms.gptq import error_factor, gptq, relative_error
from atomcli.algorithms.outliers import input_layout
from atomcli.algorithms.rotation import random_signs
from atomcli.formats.scheme import scheme_named


def uneven_hessian(channels: int = 48) -> torch.Tensor:
    """Channels whose energies span six orders of magnitude."""
    x = torch.randn(500, channels, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, channels)
    return 2 * x.t() @ x / 500


def test_relative_damping_is_relative_to_each_channel():
    hessian = uneven_hessian()
    factor = error_factor(hessian, 0.1, "relative")
    damped = hessian + 0.1 * torch.diag(hessian.diagonal())
    expected = torch.linalg.inv(damped.double()) * hessian.diagonal().mean()
    assert torch.allclose((factor.t() @ factor).double(), expected, rtol=1e-2)
    # Relative to the mean, the quietest channels are nothing but damping.
    drowned = error_factor(hessian, 0.1)
    assert float(drowned[0, 0]) == pytest.approx(0.1**-0.5, rel=1e-3)


def test_relative_damping_survives_dead_channels():
    hessian = uneven_hessian()
    hessian[5], hessian[:, 5] = 0, 0
    factor = error_factor(hessian, 0.01, "relative")
    weight = torch.randn(16, 48, generator=torch.Generator().manual_seed(1))
    quantized = gptq(weight, factor, hessian.diagonal(), scheme_named("w4a16-g16"), 1.0).dequantize()
    assert relative_error(weight, quantized, hessian) < 0.05


def test_signs_are_seeded_and_differ_by_place():
    signs = random_signs(256, 7, "3.down")
    assert signs.dtype == torch.int8
    assert set(signs.tolist()) == {-1, 1}
    assert torch.equal(signs, random_signs(256, 7, "3.down"))
    assert not torch.equal(signs, random_signs(256, 8, "3.down"))
    assert not torch.equal(signs, random_signs(256, 7, "4.down"))
    assert abs(int(signs.sum())) < 60


def test_signs_only_go_before_a_hadamard():
    energy, signs = torch.rand(64), random_signs(64, 0, "0.qkv")
    layout = input_layout(energy, scheme_named("w4a8-g16-o16"), signs)
    assert layout.signs is signs
    x, weight = torch.randn(5, 64), torch.randn(8, 64)
    assert torch.allclose(layout.apply(x) @ layout.apply(weight).t(), x @ weight.t(), atol=1e-4)
    assert input_layout(energy, scheme_named("w8a8"), signs).signs is None
