"""Weights of tokens by the residual stream: how much an error in what a linear adds to the stream matters.

The output of o and down is added to the residual stream, and the next norm divides by the stream's size. The same
error therefore matters less where the stream is large, as at massive first tokens: a token counts 1 / mean square.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# The norm that reads the stream which a site's output is added to.
_NORMS = {"o": "input_layernorm", "down": "post_attention_layernorm"}


class ResidualWeights:
    """What the forward that is under way says about its tokens."""

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}
        self._experts: Tensor | None = None

    def of(self, site: str, expert: int | None) -> Tensor | None:
        """Weights (tokens,) fp32 of the tokens that a site's linears read now; None where all count alike."""
        weights = self._weights.get(site)
        if weights is None or expert is None:
            return weights
        assert self._experts is not None
        tokens, _ = torch.where(self._experts == expert)
        return weights[tokens]

    def see_norm(self, site: str, hidden: Tensor) -> None:
        """The stream (..., hidden) before the norm of `site`."""
        mean_square = hidden.reshape(-1, hidden.shape[-1]).float().square().mean(dim=-1)
        self._weights[site] = 1 / mean_square.clamp_min(torch.finfo(torch.float32).tiny)

    def see_routing(self, experts: Tensor) -> None:
        """The experts (tokens, k) of each token."""
        self._experts = experts


@contextmanager
def residual_weights(block: nn.Module) -> Iterator[ResidualWeights]:
    """Watch a block's residual stream while it runs."""
    weights = ResidualWeights()
    handles = [
        block.get_submodule(norm).register_forward_pre_hook(_norm_hook(weights, site)) for site, norm in _NORMS.items()
    ]
    experts = getattr(block.mlp, "experts", None)
    if experts is not None:
        handles.append(experts.register_forward_pre_hook(lambda module, inputs: weights.see_routing(inputs[1])))
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()


def _norm_hook(weights: ResidualWeights, site: str) -> Any:
    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        weights.see_norm(site, inputs[0])

    return watch
