"""Stage 3, quantization parameters: from one block's weights and inputs to its quantized linears.

The order of the channels comes from the calibration artifact. The Hessians come from the quantized stream: the block
runs once with its weights in full precision, but already in their layouts and with quantized activations, on what the
quantized blocks before it put out. GPTQ (or rounding) then makes each linear's codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from atomcli.algorithms.clipping import choose_unit
from atomcli.algorithms.gptq import error_factor, gptq, relative_error
from atomcli.algorithms.ordered import descending_energy, gptq_in_order
from atomcli.algorithms.outliers import energy_permutation, fold_into_heads, input_layout, needs_order
from atomcli.algorithms.rotation import random_signs
from atomcli.algorithms.rounding import round_to_nearest, unrounded
from atomcli.errors import RunError
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import Scheme, WeightFormat
from atomcli.formats.weights import QuantizedWeight
from atomcli.pipeline.calibrate import Statistics
from atomcli.pipeline.model import Walk, full_name
from atomcli.pipeline.residual import ResidualWeights, residual_weights
from atomcli.pipeline.select import Plan
from atomcli.recipe import Order, Recipe, TokenWeights
from atomcli.runtime.decoder import quantize_linear
from atomcli.runtime.linear import QuantLinear


@dataclass(frozen=True)
class Target:
    """Linears that read the same input and are quantized alike: a site, or the part of it that is one expert's."""

    site: str
    expert: int | None
    linears: tuple[str, ...]
    scheme: Scheme
    layout: InputLayout
    energy: Tensor


@dataclass(frozen=True)
class Outcome:
    """What became of one linear: its name in the block, its relative output error and the tokens it was judged on."""

    linear: str
    error: float
    tokens: int


def fold(
    tensors: Mapping[str, Tensor],
    walk: Walk,
    index: int,
    plan: Plan,
    statistics: Mapping[str, Statistics],
    order: Order = "energy",
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Move input permutations into the rows of the linears before, where the family says so and the heads allow it.

    Returns the block's tensors, which compute the same as before, and the energies by site, in the new order.
    """
    tensors = dict(tensors)
    energies = {site: found.energy for site, found in statistics.items()}
    sites = {site.name: site for site in walk.family.sites(walk.config, index)}
    for each in walk.family.folds(walk.config, index):
        site = sites[each.site]
        scheme = plan.of_site(index, site)
        if scheme is None or not needs_order(scheme) or order == "natural":
            continue
        permutation = energy_permutation(energies[each.site])
        rows: Tensor | None = permutation
        if each.within_heads:
            rows = fold_into_heads(permutation, walk.config.num_attention_heads, walk.config.num_key_value_heads)
        if rows is None:
            continue
        for expert in range(walk.family.expert_count(walk.config, index) if site.expert else 1):
            for producer in (name.format(expert=expert) for name in each.into):
                for name in (f"{producer}.weight", f"{producer}.bias"):
                    if name in tensors:
                        tensors[name] = tensors[name][rows.to(tensors[name].device)]
            for reader in site.of_expert(expert):
                name = f"{reader}.weight"
                tensors[name] = tensors[name].index_select(1, permutation.to(tensors[name].device))
        energies[each.site] = energies[each.site][permutation]
    return tensors, energies


def input_ranges(walk: Walk, index: int, statistics: Mapping[str, Statistics]) -> dict[str, float]:
    """The largest absolute input of every linear of a block over the calibration tokens, by its name in the block."""
    ranges: dict[str, float] = {}
    for site in walk.family.sites(walk.config, index):
        found = statistics[site.name]
        largest = float(torch.maximum(-found.minimum, found.maximum).amax())
        for expert in range(walk.family.expert_count(walk.config, index) if site.expert else 1):
            ranges |= dict.fromkeys(site.of_expert(expert), largest)
    return ranges


def site_layout(
    energy: Tensor, scheme: Scheme, index: int, site: str, transform_seed: int | None, order: Order = "energy"
) -> InputLayout:
    """The layout of a site's input with channel energies (K,): their order, and the signs that a seed draws."""
    signs = None
    if transform_seed is not None and scheme.transform == "hadamard":
        signs = random_signs(energy.shape[0], transform_seed, f"{index}.{site}").to(energy.device)
    return input_layout(energy, scheme, signs, natural=order == "natural")


def targets(
    walk: Walk,
    index: int,
    plan: Plan,
    energies: Mapping[str, Tensor],
    transform_seed: int | None = None,
    order: Order = "energy",
) -> list[Target]:
    """The quantized linears of a block, grouped by the input they share."""
    found: list[Target] = []
    for site in walk.family.sites(walk.config, index):
        scheme = plan.of_site(index, site)
        if scheme is None:
            continue
        energy = energies[site.name].to(walk.device)
        layout = site_layout(energy, scheme, index, site.name, transform_seed, order)
        if layout.permutation is not None and _is_identity(layout.permutation):
            layout.permutation = None
        if site.expert:
            for expert in range(walk.family.expert_count(walk.config, index)):
                found.append(Target(site.name, expert, site.of_expert(expert), scheme, layout, energy))
        else:
            found.append(Target(site.name, None, site.linears, scheme, layout, energy))
    return found


# H is symmetric: panels of this many rows are computed up to their own diagonal block, the rest is mirrored.
_PANEL = 512


class Hessian:
    """Accumulates H = 2 X^T X / n over the tokens (n, K) that a linear's product sees."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.total = torch.zeros(channels, channels, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Tokens (n, K) fp32, each counted by its weight (n,) fp32 or once."""
        if not x.shape[0]:
            return
        if weights is not None:
            x = x * weights.sqrt()[:, None]
        for start in range(0, x.shape[1], _PANEL):
            end = min(start + _PANEL, x.shape[1])
            self.total[start:end, :end].addmm_(x[:, start:end].t(), x[:, :end])
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """The Hessian (K, K), zero when no token was seen."""
        lower = self.total.tril() * (2 / max(1, self.tokens))
        return lower + lower.tril(-1).t()


class InputsSeen(Exception):
    """Every input of a block was seen; what the block would still compute is not needed."""


@contextmanager
def watched(
    block: nn.Module, targets: list[Target], device: torch.device, token_weights: TokenWeights = "none"
) -> Iterator[list[Hessian]]:
    """Let `block` run with full-precision weights and quantized activations, and collect a Hessian for each target.

    With `token_weights` residual the tokens of o and down are weighted (see `residual`). The block raises InputsSeen
    where it has shown its last input. Afterwards it has its own linears back.
    """
    originals: dict[str, nn.Module] = {}
    hessians: list[Hessian] = []
    handles = []
    with ExitStack() as stack:
        residual = stack.enter_context(residual_weights(block)) if token_weights == "residual" else None
        try:
            for target in targets:
                hessian = Hessian(target.layout.in_features, device)
                hessians.append(hessian)
                first = block.get_submodule(target.linears[0])
                see = _seeing(hessian, target, residual)
                if target.scheme.activations.element == "float":
                    handles.append(first.register_forward_pre_hook(_transformed(see, target.layout)))
                    continue
                scheme = replace(target.scheme, weights=WeightFormat("float"))
                for name in target.linears:
                    linear = linear_in(block, name)
                    originals[name] = linear
                    weight = unrounded(target.layout.apply(linear.weight), scheme, linear.weight.dtype)
                    quantize_linear(block, name, QuantLinear.from_weight(weight, target.layout, linear.bias))
                observed = block.get_submodule(target.linears[0])
                assert isinstance(observed, QuantLinear)
                observed.observer = see
            yield hessians
        finally:
            for handle in handles:
                handle.remove()
            for name, original in originals.items():
                block.set_submodule(name, original)


def quantize_block(
    block: nn.Module, index: int, targets: list[Target], hessians: list[Hessian] | None, recipe: Recipe
) -> list[Outcome]:
    """Replace the linears of all targets by quantized ones; `hessians` belong to the targets, and None means RTN.

    Without Hessians the channels' energies take their place: the diagonal of a Hessian whose channels are unrelated.
    Raises RunError naming the linear whose numbers are not finite.
    """
    outcomes: list[Outcome] = []
    pooled = _pooled(targets, hessians) if hessians is not None else {}
    for position, target in enumerate(targets):
        tokens = hessians[position].tokens if hessians is not None else 0
        hessian = factor = None
        if hessians is not None:
            hessian = _enough(hessians[position], pooled.get(target.site))
            # Nobody needs this sum again, and a block's Hessians weigh more than its weights.
            hessians[position].total = torch.empty(0)
            importance = hessian.diagonal().clone()
        else:
            importance = _spread_energy(target)
        natural = recipe.order == "natural" and target.scheme.weights.group is not None
        order = descending_energy(hessian) if natural and hessian is not None else None
        unit = _shared_unit(block, target, importance, recipe) if natural else None
        for name in target.linears:
            linear = linear_in(block, name)
            weight = target.layout.apply(linear.weight)
            if target.scheme.weights.element == "float":
                quantized = unrounded(weight, target.scheme, linear.weight.dtype)
            elif hessian is not None:
                try:
                    if factor is None:
                        taken = hessian if order is None else hessian[order][:, order]
                        factor = error_factor(taken, recipe.weights.damping, recipe.weights.damping_rule)
                except RunError as failed:
                    raise RunError(f"{full_name(index, name)}: {failed.what}", failed.hint) from failed
                if order is None:
                    quantized = gptq(weight, factor, importance, target.scheme, recipe.weights.clip)
                else:
                    quantized = gptq_in_order(
                        weight, factor, order, importance, target.scheme, recipe.weights.clip, unit
                    )
            else:
                quantized = round_to_nearest(weight, importance, target.scheme, recipe.weights.clip, unit)
            _check_finite(quantized, full_name(index, name))
            error = relative_error(weight, quantized.dequantize(), importance if hessian is None else hessian)
            outcomes.append(Outcome(name, error, tokens))
            quantize_linear(block, name, QuantLinear.from_weight(quantized, target.layout, linear.bias))
    return outcomes


def _shared_unit(block: nn.Module, target: Target, importance: Tensor, recipe: Recipe) -> Tensor | None:
    """The largest tensor scale (1,) of a target's linears: engines fuse them, and then have one; else None."""
    if target.scheme.weights.scale != "e4m3":
        return None
    units = [
        choose_unit(linear_in(block, name).weight.float(), importance, target.scheme.weights, recipe.weights.clip)
        for name in target.linears
    ]
    return torch.stack([unit for unit in units if unit is not None]).amax(dim=0)


def _pooled(targets: list[Target], hessians: list[Hessian]) -> dict[str, Tensor]:
    """The mean Hessian over all experts of a site, for experts that saw too few tokens; {} for dense blocks."""
    sums: dict[str, Hessian] = {}
    for target, hessian in zip(targets, hessians, strict=True):
        if target.expert is not None:
            held = sums.get(target.site)
            if held is None:
                held = sums[target.site] = Hessian(target.layout.in_features, hessian.total.device)
            held.total += hessian.total
            held.tokens += hessian.tokens
    return {site: held.mean() for site, held in sums.items()}


def _enough(hessian: Hessian, pooled: Tensor | None) -> Tensor:
    """An expert's own Hessian, mixed with that of all experts where it saw fewer tokens than it has channels."""
    channels = hessian.total.shape[0]
    if pooled is None or hessian.tokens >= channels:
        return hessian.mean()
    own = hessian.tokens / channels
    return hessian.mean() * own + pooled * (1 - own)


def _spread_energy(target: Target) -> Tensor:
    """The energy of each channel of the layout (K,) fp32; a Hadamard spreads a block's energy evenly over it."""
    energy = target.energy.float()
    if target.layout.permutation is not None:
        energy = energy[target.layout.permutation]
    if target.layout.hadamard:
        parts = energy.split(target.layout.block_sizes)
        energy = torch.cat([part.mean().expand_as(part) for part in parts])
    return energy


def _seeing(hessian: Hessian, target: Target, residual: ResidualWeights | None) -> Callable[[Tensor], None]:
    last = target.site == "down" and target.expert is None

    def see(x: Tensor) -> None:
        hessian.add(x, None if residual is None else residual.of(target.site, target.expert))
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


def _is_identity(permutation: Tensor) -> bool:
    return bool((permutation == torch.arange(permutation.shape[0], device=permutation.device)).all())


def _check_finite(weight: QuantizedWeight, name: str) -> None:
    for suffix, tensor in weight.tensors().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise RunError(
                f"{name}.{suffix} holds NaN or Inf after quantization",
                "The weights are too large for the scale's dtype, or damaged; keep this linear by a rule.",
            )
