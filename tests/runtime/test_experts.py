"""Experts as separate linears: the routing and the sums of transformers' fused ones."""

import pytest
import torch

from atomcli.runtime.experts import Experts
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
