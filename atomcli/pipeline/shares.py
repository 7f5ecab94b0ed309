"""What the processes of a run made of one block, given to all of them: every one goes on with the whole block."""

from __future__ import annotations

from torch import nn

from atomcli.pipeline.hessians import Target
from atomcli.pipeline.parameters import Outcome, Unwritten
from atomcli.pipeline.ranks import Ranks
from atomcli.runtime.decoder import quantize_linear


def share_linears(
    block: nn.Module, targets: list[Target], owners: list[int], outcomes: list[Outcome], ranks: Ranks
) -> list[Outcome]:
    """Put the linears that other processes quantized into `block`; returns all outcomes, in the targets' order."""
    if ranks.size == 1:
        return outcomes
    for target, owner in zip(targets, owners, strict=True):
        for name in target.linears:
            linear = block.get_submodule(name)
            if owner != ranks.rank:
                assert isinstance(linear, nn.Linear)
                linear = _empty(linear, target)
                quantize_linear(block, name, linear)
            for tensor in linear.state_dict().values():
                ranks.share(tensor, owner)
    told = {outcome.linear: outcome for rank in range(ranks.size) for outcome in ranks.tell(outcomes, rank)}
    return [told[name] for target in targets for name in target.linears]


def _empty(linear: nn.Linear, target: Target) -> Unwritten:
    """The quantized linear that takes the place of `linear`, with room for its tensors."""
    return Unwritten(
        linear.in_features,
        linear.out_features,
        target.scheme,
        bias=linear.bias is not None,
        permutation=target.layout.permutation is not None,
        signs=target.layout.signs is not None,
        dtype=linear.weight.dtype,
        device=linear.weight.device,
    )
