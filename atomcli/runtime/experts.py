"""Experts as separate linears, so that each can be quantized; routing is transformers' own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from atomcli.kernels import dispatch
from atomcli.runtime.grouped_experts import GroupedExperts, choose, is_observed


class Expert(nn.Module):
    """One expert's gated MLP; x (tokens, hidden) -> (tokens, hidden)."""

    def __init__(self, hidden: int, width: int, activation: nn.Module, device: torch.device | str | None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False, device=device)
        self.up_proj = nn.Linear(hidden, width, bias=False, device=device)
        self.down_proj = nn.Linear(width, hidden, bias=False, device=device)
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """The experts of one block, in place of transformers' fused tensors; called as those are."""

    _choice: dispatch.Choice | None = None
    _grouped: GroupedExperts | None = None

    @classmethod
    def replacing(cls, fused: Any) -> "Experts":
        """Empty experts of the number, sizes and activation of transformers' fused module, on the meta device."""
        count, width, hidden = fused.num_experts, fused.intermediate_dim, fused.hidden_dim
        return cls(Expert(hidden, width, fused.act_fn, "meta") for _ in range(count))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, hidden), the experts of each token and their weights (tokens, k) -> (tokens, hidden).

        All experts run as one product where a kernel serves them so. Elsewhere they run in turn, and the order of the
        additions is that of transformers' own loop.
        """
        sixteen_bits = hidden_states.dtype in (torch.bfloat16, torch.float16)
        if hidden_states.is_cuda and sixteen_bits and self.kernel_choice().kernel and not is_observed(list(self)):
            self._grouped = self._grouped or GroupedExperts.of(list(self))
            return self._grouped(hidden_states, top_k_index, top_k_weights)
        combined = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            tokens, rank = torch.where(top_k_index == index)
            routed = self[index](hidden_states[tokens]) * top_k_weights[tokens, rank, None]
            combined.index_add_(0, tokens, routed.to(combined.dtype))
        return combined

    def kernel_choice(self) -> dispatch.Choice:
        """What runs all experts as one product, or why each of them runs on its own."""
        self._choice = self._choice or choose(list(self))
        return self._choice

    def changed(self) -> None:
        """A linear of an expert was put in the place of another: what runs them is decided anew."""
        self._choice = self._grouped = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Experts":
        self.changed()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.changed()
        super()._load_from_state_dict(*args, **kwargs)
