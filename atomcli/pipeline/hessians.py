"""The Hessians of a block: what its linears' products see while calibration runs through it.

The block runs once with its weights in full precision, but already in their layouts and with quantized activations,
on what the quantized blocks before it put out. A sequence is summed by itself and counted once, so that neither the
size of a chunk nor a chunk that has to be computed again changes a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from atomcli.algorithms.products import tensor_cores
from atomcli.algorithms.rounding import unrounded
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import Scheme, WeightFormat
from atomcli.pipeline.ranks import Ranks
from atomcli.pipeline.residual import ResidualWeights, residual_weights
from atomcli.pipeline.routing import Once, Routing, routing_of
from atomcli.recipe import TokenWeights
from atomcli.runtime.decoder import quantize_linear
from atomcli.runtime.linear import QuantLinear

# H is symmetric: panels of so many rows are computed up to their own diagonal block, the rest is mirrored. On an H100 a
# product of 512 rows reaches a third of the rate of one of thousands.
_PANEL = {"cpu": 512, "cuda": 2048}


@dataclass(frozen=True)
class Target:
    """Linears that read the same input and are quantized alike: a site, or the part of it that is one expert's."""

    site: str
    expert: int | None
    linears: tuple[str, ...]
    scheme: Scheme
    layout: InputLayout
    energy: Tensor


class Hessian:
    """Accumulates H = 2 X^T X / n over the tokens (n, K) that a linear's product sees; `forced` of them by force."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.total = torch.zeros(channels, channels, dtype=torch.float32, device=device)
        self.tokens = self.forced = 0

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Tokens (n, K) fp32, each counted by its weight (n,) fp32 or once."""
        if not x.shape[0]:
            return
        if weights is not None:
            x = x * weights.sqrt()[:, None]
        for panel in self.panels():
            end = panel.shape[1]
            panel.addmm_(x[:, end - panel.shape[0] : end].t(), x[:, :end])
        self.tokens += x.shape[0]

    def panels(self) -> list[Tensor]:
        """The parts of the sum (rows, K') that are computed, which hold its lower triangle."""
        size, channels = _PANEL.get(self.total.device.type, 512), self.total.shape[0]
        ends = [min(start + size, channels) for start in range(0, channels, size)]
        return [self.total[start:end, :end] for start, end in zip([0, *ends], ends, strict=False)]

    def mean(self) -> Tensor:
        """The Hessian (K, K), zero when no token was seen."""
        lower = self.total.tril() * (2 / max(1, self.tokens))
        return lower + lower.tril(-1).t()


class InputsSeen(Exception):
    """Every input of a block was seen; what the block would still compute is not needed."""


@contextmanager
def watched(
    block: nn.Module,
    targets: list[Target],
    device: torch.device,
    token_weights: TokenWeights = "none",
    forced: Mapping[int, int] | None = None,
) -> Iterator[tuple[list[Hessian], Routing]]:
    """Let `block` run with full-precision weights and quantized activations, and collect a Hessian for each target.

    With `token_weights` residual the tokens of o and down are weighted (see `residual`); `forced` tokens of each
    sequence are shown to the experts it names. The block raises InputsSeen where it has shown its last input.
    Afterwards it has its own linears back.
    """
    originals: dict[str, nn.Module] = {}
    hessians: list[Hessian] = []
    handles = []
    with ExitStack() as stack:
        residual = stack.enter_context(residual_weights(block)) if token_weights == "residual" else None
        routing = stack.enter_context(routing_of(block, forced))
        try:
            for target in targets:
                hessian = Hessian(target.layout.in_features, device)
                hessians.append(hessian)
                first = block.get_submodule(target.linears[0])
                see = _seeing(hessian, target, routing, residual)
                if target.scheme.activations.element == "float":
                    handles.append(first.register_forward_pre_hook(_transformed(see, target.layout)))
                    continue
                scheme = replace(target.scheme, weights=WeightFormat("float"))
                for name in target.linears:
                    linear = linear_in(block, name)
                    originals[name] = linear
                    weight = unrounded(target.layout.apply(linear.weight), scheme, linear.weight.dtype)
                    quantize_linear(block, name, _Watched.from_weight(weight, target.layout, linear.bias))
                observed = block.get_submodule(target.linears[0])
                assert isinstance(observed, QuantLinear)
                observed.observer = see
            yield hessians, routing
        finally:
            for handle in handles:
                handle.remove()
            for name, original in originals.items():
                block.set_submodule(name, original)


class _Watched(QuantLinear):
    """A linear in full precision whose input is quantized and watched."""

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        """As any quantized linear, but on tensor cores: the weight has the model's 8 or 11 bits, x hardly more."""
        with tensor_cores():
            return super().forward(x, add_bias)


def _seeing(
    hessian: Hessian, target: Target, routing: Routing, residual: ResidualWeights | None
) -> Callable[[Tensor], None]:
    last = target.site == "down" and target.expert is None
    once = Once(routing, target.expert)

    def see(x: Tensor) -> None:
        weights = None if residual is None else residual.of(target.site, None)
        if weights is not None and target.expert is not None:
            weights = weights[routing.rows(target.expert)]
        for rows in once.rows(x):
            hessian.add(x[rows], None if weights is None else weights[rows])
            hessian.forced += (rows.stop - rows.start) * routing.forcing
        if last:
            raise InputsSeen

    return see


def _transformed(see: Callable[[Tensor], None], layout: InputLayout) -> Callable[..., None]:
    def watch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        see(layout.apply(arguments[0].reshape(-1, layout.in_features)))

    return watch


def linear_in(block: nn.Module, name: str) -> nn.Linear:
    """A block's linear that is not quantized yet, by its name in the block."""
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear), f"{name} is no linear in full precision"
    return linear


def pooled(targets: list[Target], hessians: list[Hessian | None], owners: list[int], ranks: Ranks) -> dict[str, Tensor]:
    """By site, the mean Hessian over all of its experts, where one of them saw fewer tokens than it has channels.

    Each process has the Hessians of the targets that it owns, and the tokens of all.
    """
    found: dict[str, Tensor] = {}
    for site in dict.fromkeys(target.site for target in targets if target.expert is not None):
        places = [place for place, target in enumerate(targets) if target.site == site and target.expert is not None]
        channels = targets[places[0]].layout.in_features
        seen = [hessians[place] for place in places]
        counts = ranks.reduce(torch.tensor([0 if each is None else each.tokens for each in seen]))
        if int(counts.min()) >= channels:
            continue
        held = Hessian(channels, targets[places[0]].energy.device)
        for place, each in zip(places, seen, strict=True):
            ranks.fold_one(held.total, None if each is None else each.total, owners[place])
        held.tokens = int(counts.sum())
        ranks.share(held.total, 0)
        found[site] = held.mean()
    return found
