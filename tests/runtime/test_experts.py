"""Experts as separate linears: the routing and the sums of transformers' fused ones."""

from dataclasses import replace

import pytest
import torch

from atomcli.algorithms.rounding import round_to_nearest
from atomcli.formats.scheme import SCHEMES
from atomcli.models.registry import describe
from atomcli.runtime.decoder import quantize_linear, read_block
from atomcli.runtime.experts import Experts
from atomcli.runtime.linear import QuantLinear, input_layout
from tests.helpers.tiny import random_parent


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_equal_the_fused_ones(name: str) -> None:
    own, _ = random_parent(name)
    own.set_experts_implementation("eager")
    block = own.model.layers[1].mlp
    fused = block.experts
    experts = Experts.replacing(fused).to_empty(device="cpu")
    for index, expert in enumerate(experts):
        gate, up = fused.gate_up_proj[index].chunk(2)
        expert.gate_proj.weight.data, expert.up_proj.weight.data = gate, up
        expert.down_proj.weight.data = fused.down_proj[index]
    hidden = torch.randn(2, 9, 80)
    with torch.no_grad():
        expected = block(hidden)
        block.experts = experts
        torch.testing.assert_close(block(hidden), expected, rtol=1e-5, atol=1e-6)


def test_an_expert_without_tokens_is_not_run() -> None:
    own, _ = random_parent("mixtral")
    experts = Experts.replacing(own.model.layers[0].mlp.experts).to_empty(device="cpu")
    for parameter in experts.parameters():
        parameter.data.normal_()
    experts[2].register_forward_hook(lambda *args: pytest.fail("expert 2 has no tokens"))
    chosen = torch.tensor([[0, 1], [3, 0], [1, 3]])
    out = experts(torch.randn(3, 80), chosen, torch.full((3, 2), 0.5))
    assert torch.isfinite(out).all()


def test_what_runs_experts_is_decided_anew_when_one_is_quantized() -> None:
    """The statistics run a block before it is quantized; it must not keep to what served it then."""
    _, source = random_parent("mixtral")
    block, scheme = read_block(describe(source.config), 0, source), replace(SCHEMES["w8a8"], outliers=0)
    experts = block.mlp.experts
    assert experts.kernel_choice().reason == "some expert is not quantized"
    for name, linear in list(block.named_modules()):
        if ".experts." in name and isinstance(linear, torch.nn.Linear):
            assert experts.kernel_choice().reason == "some expert is not quantized"
            weight = round_to_nearest(linear.weight.data, torch.ones(linear.in_features), scheme, 1.0)
            layout = input_layout(scheme, linear.in_features)
            quantize_linear(block, name, QuantLinear.from_weight(weight, layout))
    assert experts.kernel_choice().reason != "some expert is not quantized"
