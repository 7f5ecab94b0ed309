"""All experts of a block as two products on tokens sorted by expert: gate and up under each other, then down.

Every shape is known to the host and every count stays on the device, so a step over experts can be a CUDA graph.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atomcli.formats.weights import stack_rows
from atomcli.kernels import dispatch, quantize
from atomcli.runtime.linear import QuantLinear, reads_alike


@dataclass(frozen=True)
class GroupedExperts:
    """The products of a block's experts, `count` of them, of `width` hidden channels each."""

    gate_up: dispatch.ExpertProduct
    down: dispatch.ExpertProduct
    count: int
    width: int

    @classmethod
    def of(cls, experts: Sequence[Any]) -> "GroupedExperts":
        """Repack experts that `choose` has found to share a kernel."""
        stacked = [stack_rows([expert.gate_proj.weight_tensors, expert.up_proj.weight_tensors]) for expert in experts]
        gate_up = dispatch.prepare_experts(stacked, experts[0].gate_proj.layout)
        down = dispatch.prepare_experts(
            [expert.down_proj.weight_tensors for expert in experts], experts[0].down_proj.layout
        )
        for linear in _linears(experts):
            linear.keep_on_host()
        return cls(gate_up, down, len(experts), experts[0].gate_proj.out_features)

    def __call__(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """hidden (tokens, channels), the experts of each token and their weights (tokens, k) -> like hidden."""
        order, starts = sort_by_expert(chosen, self.count)
        rows, kind = order.numel(), hidden.dtype
        routed = hidden[order // chosen.shape[1]]
        operand = quantize.quantize(routed, self.gate_up.scheme, self.gate_up.layout, self.gate_up.container)
        both = self.gate_up.multiply(operand, starts, rows, kind)
        operand = quantize.silu_mul_quantize(
            both[:, : self.width], both[:, self.width :], self.down.scheme, self.down.layout, self.down.container
        )
        return combine(self.down.multiply(operand, starts, rows, kind), order, weights)


def sort_by_expert(chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The order (tokens * k,) of chosen (tokens, k), flattened, by expert, and where each expert's part begins.

    The second is int32 (count + 1,). Tokens of one expert keep their order.
    """
    experts, order = chosen.reshape(-1).sort(stable=True)
    bounds = torch.arange(count + 1, device=chosen.device, dtype=experts.dtype)
    return order, torch.searchsorted(experts, bounds, out_int32=True)


def combine(routed: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Each token's weighted sum (tokens, channels) of what its experts gave, rows in `order`; weights (tokens, k)."""
    scaled = routed * weights.reshape(-1)[order][:, None]
    unsorted = torch.empty_like(scaled)
    unsorted[order] = scaled
    return unsorted.view(*weights.shape, -1).sum(1).to(routed.dtype)


def choose(experts: Sequence[Any]) -> dispatch.Choice:
    """What runs all experts as one product, or why each of them runs on its own."""
    linears = list(_linears(experts))
    if not all(isinstance(linear, QuantLinear) for linear in linears):
        return dispatch.Choice(None, "some expert is not quantized")
    if "SiLU" not in type(experts[0].act_fn).__name__:
        return dispatch.Choice(None, f"the experts' activation is {type(experts[0].act_fn).__name__}, not SiLU")
    if any(linear.bias is not None for linear in linears):
        return dispatch.Choice(None, "some expert has a bias")
    gate, down = experts[0].gate_proj, experts[0].down_proj
    for expert in experts:
        for linear, first in ((expert.gate_proj, gate), (expert.up_proj, gate), (expert.down_proj, down)):
            if linear.scheme != first.scheme or not reads_alike(first, linear):
                return dispatch.Choice(None, "the experts differ in scheme or in the layout of their input")
    found = [dispatch.choose_for_experts(each.scheme, each.device, each.in_features) for each in (gate, down)]
    return next((each for each in found if each.kernel is None), found[0])


def is_observed(experts: Sequence[Any]) -> bool:
    """Whether somebody wants to see the dequantized inputs, which only the reference has."""
    return any(linear.observer is not None for linear in _linears(experts))


def _linears(experts: Sequence[Any]) -> Iterator[Any]:
    return (linear for expert in experts for linear in (expert.gate_proj, expert.up_proj, expert.down_proj))
