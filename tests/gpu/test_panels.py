"""Panels in one kernel compute what their operations compute one by one."""

import pytest
import torch

from atomcli.algorithms.gptq import error_factor, gptq
from atomcli.formats.scheme import ActivationFormat, Scheme, WeightFormat

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "format",
    [
        WeightFormat("int4", 128, "two_level"),
        WeightFormat("int4", 256, "fp16"),
        WeightFormat("e2m1", 32, "e8m0"),
        WeightFormat("int8", None, "row"),
    ],
    ids=lambda format: f"{format.element}-{format.scale}",
)
def test_a_gpu_rounds_as_the_cpu_does(format):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 300, generator=generator)
    inputs = torch.randn(900, 300, generator=generator)
    hessian = inputs.t() @ inputs
    scheme, factor = Scheme(format, ActivationFormat("float"), 20), error_factor(hessian)
    expected = gptq(weight, factor, hessian.diagonal(), scheme, "search")
    with torch.inference_mode():
        gptq(weight.cuda(), factor.cuda(), hessian.diagonal().cuda(), scheme, "search")
    for _ in range(2):
        found = gptq(weight.cuda(), factor.cuda(), hessian.diagonal().cuda(), scheme, "search")
        different = (found.body_codes().cpu() != expected.body_codes()).float().mean()
        assert different < 0.01, "only ties may fall differently"
