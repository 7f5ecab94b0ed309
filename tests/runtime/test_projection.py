"""What a single token takes of a projection in 16 bits: the kernel, run on the host, gives what torch gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

from atomcli.formats.scheme import KVFormat
from atomcli.kernels import dispatch, gemv_w16
from atomcli.kernels.gemv_w16 import Tile
from atomcli.runtime.fused import FusedModel
from tests.helpers.fused import fused_logits, tiny_model
from tests.helpers.tiny import random_tokens
from tests.kernels.emulator import COMPILER, HostKernel


def on_host(x: Tensor, weight: Tensor, bias: Tensor | None, **before: Any) -> tuple[Tensor, Tensor]:
    """`gemv_w16.linear` without a card."""
    prologue, gated = before.get("prologue", "plain"), before.get("gated", False)
    y, total = gemv_w16.outputs(x, weight, prologue, gated)
    gemv_w16.launch(
        lambda how: HostKernel(gemv_w16.SOURCE, gemv_w16.ENTRY, how.defines),
        x, before.get("other"), before.get("norm_weight"), weight, bias, prologue, before.get("epsilon", 0.0), gated,
        y, total, 2, Tile(64, 1, 2),
    )  # fmt: skip
    return y, total


@pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_16_bit_model_decodes_one_token_on_its_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name, None, KVFormat("float"), dtype=torch.bfloat16)
    tokens = random_tokens(1, 8)
    calls: list[str] = []

    def served(weight: Tensor, bias: Tensor | None) -> dispatch.OneToken:
        def kernel(x: Tensor, **before: Any) -> tuple[Tensor, Tensor]:
            calls.append(before.get("prologue", "plain") + (" gated" if before.get("gated") else ""))
            return on_host(x, weight, bias, **before)

        return kernel

    with torch.inference_mode():
        want = fused_logits(FusedModel.of(model), tokens, (5, 1, 1, 1)).float()
        monkeypatch.setattr(dispatch, "prepare_one_token", served)
        got = fused_logits(FusedModel.of(model), tokens, (5, 1, 1, 1)).float()
    layers = model.config.num_hidden_layers
    step = ["norm", *["plain", "add_norm gated", "plain", "add_norm"] * layers]
    assert calls == step * 3
    assert torch.equal(got[:, :5], want[:, :5])
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).max() < 2e-2


def test_torch_serves_where_there_is_no_card() -> None:
    choice = dispatch.choose_for_one_token(torch.empty(64, 64, dtype=torch.bfloat16))
    assert choice.kernel is None
    assert choice.reason
    assert dispatch.prepare_one_token(torch.empty(64, 64, dtype=torch.bfloat16), None) is None
