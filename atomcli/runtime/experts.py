"""Experts as separate linears, so that each can be quantized; routing is transformers' own."""

from typing import Any

import torch
from torch import Tensor, nn


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

    @classmethod
    def replacing(cls, fused: Any) -> "Experts":
        """Empty experts of the number, sizes and activation of transformers' fused module, on the meta device."""
        count, width, hidden = fused.num_experts, fused.intermediate_dim, fused.hidden_dim
        return cls(Expert(hidden, width, fused.act_fn, "meta") for _ in range(count))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, hidden), the experts of each token and their weights (tokens, k) -> (tokens, hidden).

        The order of the additions is that of transformers' own loop over the experts.
        """
        combined = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            tokens, rank = torch.where(top_k_index == index)
            routed = self[index](hidden_states[tokens]) * top_k_weights[tokens, rank, None]
            combined.index_add_(0, tokens, routed.to(combined.dtype))
        return combined
