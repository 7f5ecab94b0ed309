"""What comes before a product runs in it: the norms of a block with q/k/v and gate/up, SiLU(gate) * up with down.

vLLM's blocks call a norm and then the linear that reads it; our kernels normalize, quantize and write the operand in
one pass over the rows. So norm and product together take the norm's place in the block, and the linear hands on what it
is given; nothing takes the activation's place, and down reads gate and up. vLLM's model code stays as it is: modules
are exchanged once the weights are there, before anything is compiled, and only in blocks built as expected.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from atomcli.runtime.projection import Norm, Projection

# A linear, the module of the block that holds it, and the norm that it alone reads.
BEFORE = {"qkv_proj": ("self_attn", "input_layernorm"), "gate_up_proj": ("mlp", "post_attention_layernorm")}


class Holders:
    """Which module holds which, as vLLM builds a model from now on until `rest`: a linear doesn't know its block."""

    def __init__(self) -> None:
        self._holder: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
        self._hook = register_module_module_registration_hook(self._note)

    def rest(self) -> None:
        """The model is built."""
        self._hook.remove()

    def of(self, module: nn.Module | None) -> nn.Module | None:
        """The module that holds `module`, if that was seen."""
        found = None if module is None else self._holder.get(module)
        return None if found is None else found()

    def _note(self, holder: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is not None:
            self._holder[module] = weakref.ref(holder)


class Normed(nn.Module):
    """In a block's norm's place: the norm, and the product that reads it."""

    def __init__(self, handle: Tensor, out_features: int) -> None:
        super().__init__()
        self.register_buffer("handle", handle, persistent=False)
        self.out_features = out_features

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """x (..., K) -> the product (..., out_features); with a residual like x also x + residual."""
        if residual is None:
            return torch.ops.atom.served_linear(x, self.handle, self.out_features)
        return torch.ops.atom.served_normed(x, residual, self.handle, self.out_features)


def fuse_norm(holders: Holders, layer: Any, projection: Projection) -> Callable[..., Any] | None:
    """Put q/k/v or gate/up where the norm before them is: what their operator is to run; None, with all as it was."""
    own = layer.prefix.rpartition(".")[2]
    part, name = BEFORE.get(own, ("", ""))
    inner = holders.of(layer)
    block = holders.of(inner)
    norm: Any = getattr(block, name, None)
    expected = getattr(block, part, None) is inner is not None and getattr(inner, own, None) is layer
    if not (expected and _plain(norm)):
        return None
    before = Norm(norm.weight.detach().to(layer.atom_handle.device), float(norm.variance_epsilon))

    def run(x: Tensor, residual: Tensor | None = None) -> Any:
        y, total = projection.normed(x, residual, before)
        return y if residual is None else (y, total)

    setattr(block, name, Normed(layer.atom_handle, layer.atom_out_features))
    return run


def fuse_activation(holders: Holders, layer: Any, projection: Projection) -> Callable[..., Any] | None:
    """Let down read gate and up: what its operator is to run; None, with all as it was."""
    mlp: Any = holders.of(layer)
    expected = getattr(mlp, "down_proj", None) is layer and isinstance(getattr(mlp, "act_fn", None), SiluAndMul)
    if not expected:
        return None
    mlp.act_fn = nn.Identity()
    return projection.gated


def _plain(norm: Any) -> bool:
    """Whether this is an RMSNorm over all channels, with weights."""
    return type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None
