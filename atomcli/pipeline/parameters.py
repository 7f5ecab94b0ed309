"""Stage 3, quantization parameters: from one block's weights and inputs to its quantized linears.

The order of the channels comes from the calibration artifact, the Hessians from the quantized stream (see `hessians`).
GPTQ (or rounding) then makes each linear's codes.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atomcli.algorithms.clipping import choose_unit
from atomcli.algorithms.gptq import relative_error
from atomcli.algorithms.outliers import energy_permutation, fold_into_heads, input_layout, needs_order
from atomcli.algorithms.rotation import random_signs
from atomcli.algorithms.rounding import round_to_nearest, unrounded
from atomcli.algorithms.together import compensate
from atomcli.errors import RunError
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import KVFormat, Scheme
from atomcli.formats.weights import QuantizedWeight
from atomcli.pipeline.calibrate import Calibration, Statistics
from atomcli.pipeline.hessians import Hessian, Target, linear_in
from atomcli.pipeline.model import Walk, full_name
from atomcli.pipeline.select import Plan
from atomcli.recipe import Order, Recipe
from atomcli.runtime.attention import head_hadamard
from atomcli.runtime.decoder import quantize_linear
from atomcli.runtime.linear import QuantLinear


@dataclass(frozen=True)
class Outcome:
    """What became of one linear: its name in the block, its relative output error and the tokens it was judged on.

    Of an expert's tokens `forced` were shown to it although the router sent them elsewhere.
    """

    linear: str
    error: float
    tokens: int
    forced: int | None = None


class Unwritten(QuantLinear):
    """A linear of a block that isn't written yet: its tensors stay where they were made, beside the repacked weight.

    They leave a GPU together when the block is done, through pinned memory and beside the next block's work.
    """

    def keep_on_host(self) -> None:
        """Not yet."""


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


def cache_tensors(kv: KVFormat, artifact: Calibration, index: int, walk: Walk) -> dict[str, Tensor]:
    """The tensors that block `index` needs for its cache's format, by their names in the block.

    Raises InputError when the artifact lacks the statistics.
    """
    if not kv.centered or kv.element == "float":
        return {}
    center = artifact.key_mean(index)
    if kv.hadamard:
        center = head_hadamard(center)
    return {"self_attn.key_center": center.to(walk.device, walk.source.dtype)}


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


def quantize_block(
    block: nn.Module,
    index: int,
    targets: list[Target],
    hessians: Sequence[Hessian | None] | None,
    recipe: Recipe,
    pooled: Mapping[str, Tensor] | None = None,
    mine: Container[int] | None = None,
) -> list[Outcome]:
    """Replace the linears of all targets by quantized ones; `hessians` belong to the targets, and None means RTN.

    `pooled` Hessians help experts that saw too little. With `mine` only the targets at these positions are done.
    Without Hessians the channels' energies take their place: the diagonal of a Hessian whose channels are unrelated.
    Raises RunError naming the linear whose numbers are not finite.
    """
    outcomes: list[Outcome] = []
    for position, target in enumerate(targets):
        if mine is not None and position not in mine:
            continue
        seen = hessians[position] if hessians is not None else None
        tokens, forced = (seen.tokens, seen.forced) if seen is not None else (0, 0)
        hessian = None
        if seen is not None:
            hessian = _enough(seen, (pooled or {}).get(target.site) if target.expert is not None else None)
            # Nobody needs this sum again, and a block's Hessians weigh more than its weights.
            seen.total = torch.empty(0)
            importance = hessian.diagonal().clone()
        else:
            importance = _spread_energy(target)
        natural = recipe.order == "natural" and target.scheme.weights.group is not None
        linears = [linear_in(block, name) for name in target.linears]
        weights = [target.layout.apply(linear.weight) for linear in linears]
        if target.scheme.weights.element == "float":
            chosen = [unrounded(weight, target.scheme, linears[0].weight.dtype) for weight in weights]
        elif hessian is not None:
            try:
                chosen = compensate(weights, hessian, target.scheme, natural=natural, **recipe.weights.method())
            except RunError as failed:
                raise RunError(f"{full_name(index, target.linears[0])}: {failed.what}", failed.hint) from failed
        else:
            unit = _shared_unit(weights, target, importance, recipe) if natural else None
            clip = recipe.weights.clip
            chosen = [round_to_nearest(weight, importance, target.scheme, clip, unit) for weight in weights]
        for name, linear, weight, quantized in zip(target.linears, linears, weights, chosen, strict=True):
            _check_finite(quantized, full_name(index, name))
            error = relative_error(weight, quantized.dequantize(), importance if hessian is None else hessian)
            outcomes.append(Outcome(name, error, tokens, forced if target.expert is not None else None))
            quantize_linear(block, name, Unwritten.from_weight(quantized, target.layout, linear.bias))
    return outcomes


def _shared_unit(weights: Sequence[Tensor], target: Target, importance: Tensor, recipe: Recipe) -> Tensor | None:
    """The largest tensor scale (1,) of a target's linears: engines fuse them, and then have one; else None."""
    if target.scheme.weights.scale != "e4m3":
        return None
    return choose_unit(torch.cat(list(weights)), importance, target.scheme.weights, recipe.weights.clip)


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


def _is_identity(permutation: Tensor) -> bool:
    return bool((permutation == torch.arange(permutation.shape[0], device=permutation.device)).all())


def _check_finite(weight: QuantizedWeight, name: str) -> None:
    for suffix, tensor in weight.tensors().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise RunError(
                f"{name}.{suffix} holds NaN or Inf after quantization",
                "The weights are too large for the scale's dtype, or damaged; keep this linear by a rule.",
            )
