"""Budgets: what a plan costs in bytes, bits or microseconds, and the best plan that a budget allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atomcli.algorithms.allocation import OutOfReach, Table, allocate, cost_range, frontier
from atomcli.algorithms.sensitivity import Sensitivities
from atomcli.checkpoint.files import read_json
from atomcli.errors import InputError, UsageError
from atomcli.formats.scheme import KVFormat, Scheme
from atomcli.formats.weights import tensor_layout
from atomcli.models.block import head_dim
from atomcli.models.tensors import block_shapes, outer_shapes
from atomcli.pipeline.model import Walk, full_name
from atomcli.pipeline.select import Group, Plan, uniform
from atomcli.recipe import Recipe
from atomcli.runtime.linear import permutation_dtype

# Squared error of 256 levels over the same range, in that of 16.
_INT8_SHARE = (15 / 255) ** 2


@dataclass(frozen=True)
class Sizes:
    """Bytes of each candidate of each group, of everything else in the checkpoint, and the groups' parameters."""

    table: Table
    rest: int
    parameters: int

    def bits_per_weight(self, group_bytes: float) -> float:
        """Stored bits per weight of the blocks' linears, from the bytes of all groups."""
        return 8 * group_bytes / self.parameters


@dataclass(frozen=True)
class Point:
    """One plan of the frontier: bits per weight of the linears, bytes of the checkpoint, predicted KL divergence.

    microseconds of all products of the blocks, where the recipe names a table of costs.
    """

    bits_per_weight: float
    bytes: int
    kld: float
    microseconds: float | None = None


def sizes_of(walk: Walk, groups: Sequence[Group], signs: bool, cache: Sequence[KVFormat]) -> Sizes:
    """What the candidates weigh: all stored tensors of their linears, with the signs of Hadamards or without.

    `cache` is that of each block: a centered one has a tensor of its own.
    """
    config, item = walk.config, walk.source.dtype.itemsize
    shapes = [block_shapes(walk.family, config, index) for index in range(walk.blocks)]
    table = [
        [
            float(sum(_linear_bytes(shapes[group.index], linear, scheme, walk, signs) for linear in group.linears))
            for scheme in group.candidates.values()
        ]
        for group in groups
    ]
    grouped = [(group.index, linear) for group in groups for linear in group.linears]
    parameters = sum(math.prod(shapes[index][f"{linear}.weight"]) for index, linear in grouped)
    inside = {(index, f"{linear}.{kind}") for index, linear in grouped for kind in ("weight", "bias")}
    rest = sum(
        math.prod(shape)
        for index, block in enumerate(shapes)
        for name, shape in block.items()
        if (index, name) not in inside
    )
    rest += sum(math.prod(shape) for shape in outer_shapes(walk.family, config).values())
    centered = sum(kv.centered and kv.element != "float" for kv in cache)
    rest += centered * config.num_key_value_heads * head_dim(config)
    return Sizes(table, rest * item, parameters)


def plan_bytes(walk: Walk, groups: Sequence[Group], plan: Plan, signs: bool) -> tuple[int, float]:
    """Bytes of the checkpoint of a plan, and stored bits per weight of its linears; kept ones count with 16."""
    shown = [
        Group(g.index, g.name, g.sites, g.linears, {"": plan.schemes[full_name(g.index, g.linears[0])]}) for g in groups
    ]
    sizes = sizes_of(walk, shown, signs, plan.cache)
    linears = sum(row[0] for row in sizes.table)
    return int(linears) + sizes.rest, sizes.bits_per_weight(linears)


def refuse_out_of_reach(recipe: Recipe, walk: Walk, groups: Sequence[Group]) -> None:
    """UsageError when no sensitivities could make the recipe's budget possible: said before they are measured.

    So is what its table of costs lacks, by an InputError.
    """
    if recipe.select is None:
        return
    _times(recipe, walk, groups)
    if recipe.select.max_kld is not None:
        return
    costs, limit, rest = _costs(recipe, walk, groups)
    if cost_range(costs)[0] > limit * (1 + 1e-9):
        raise _refusal(recipe, walk, groups, cost_range(costs)[0] + rest)


def choose(recipe: Recipe, walk: Walk, groups: Sequence[Group], sensitivities: Sensitivities) -> Plan:
    """The best plan within the recipe's budget; UsageError naming the nearest budget when there is none."""
    assert recipe.select is not None
    losses = loss_table(groups, sensitivities)
    sizes = _sizes(recipe, walk, groups)
    cache = choose_cache(recipe, walk, sensitivities)
    name, budget = recipe.select.budget
    rest = 0.0
    try:
        if name == "max_kld":
            rest = cache.kld
            best = allocate(sizes.table, losses, budget - rest)
        else:
            costs, limit, rest = _costs(recipe, walk, groups)
            best = allocate(losses, costs, limit)
    except OutOfReach as refused:
        raise _refusal(recipe, walk, groups, refused.nearest + rest) from refused
    times = _times(recipe, walk, groups)
    return plan_of(walk, groups, best.choice, sizes, sensitivities, cache, {name: budget}, times)


@dataclass(frozen=True)
class Cache:
    """The cache of every block, stored bits per cached number over all of them, and the predicted divergence."""

    formats: tuple[KVFormat, ...]
    bits: float
    kld: float

    def report(self) -> dict[str, Any]:
        """What a plan says of it."""
        eight = [index for index, kv in enumerate(self.formats) if kv.element == "int8"]
        return {"bits": self.bits, "int8": eight, "kld": self.kld}


def choose_cache(recipe: Recipe, walk: Walk, sensitivities: Sensitivities) -> Cache:
    """The recipe's cache, or with `select.kv_bits` the best one: blocks in INT8 as far as that budget reaches.

    Raises UsageError when the recipe's own cache takes more.
    """
    own = uniform(recipe, walk).cache
    choices = [[kv, replace(kv, element="int8")] if kv.element == "int4" else [kv] for kv in own]
    # Same range, 17 times the steps: the error of INT8 follows from that of INT4.
    losses = [
        [sensitivities.cache_loss(index, share) for share in (1.0, _INT8_SHARE)[: len(row)]]
        for index, row in enumerate(choices)
    ]
    bits = [[kv.bits_per_value(head_dim(walk.config)) / len(own) for kv in row] for row in choices]
    budget = recipe.select.kv_bits if recipe.select is not None else None
    if budget is None:
        best = [0] * len(own)
    else:
        try:
            best = list(allocate(losses, bits, budget).choice)
        except OutOfReach as refused:
            raise UsageError(
                f"kv_bits {budget:g} can't be met: the recipe's cache takes {refused.nearest:.4g}",
                "Raise select.kv_bits, or choose another kv_cache.format",
            ) from refused
    return Cache(
        tuple(row[pick] for row, pick in zip(choices, best, strict=True)),
        sum(row[pick] for row, pick in zip(bits, best, strict=True)),
        sum(row[pick] for row, pick in zip(losses, best, strict=True)),
    )


def plan_of(
    walk: Walk,
    groups: Sequence[Group],
    choice: Sequence[int],
    sizes: Sizes,
    sensitivities: Sensitivities,
    cache: Cache,
    budget: dict[str, float] | None = None,
    times: Table | None = None,
) -> Plan:
    """The plan in which each group takes the candidate with the index in `choice`, and what is expected of it.

    times: microseconds of each candidate of each group, where they are known.
    """
    schemes: dict[str, Scheme | None] = {}
    chosen: dict[str, str] = {}
    for group, index in zip(groups, choice, strict=True):
        title, scheme = list(group.candidates.items())[index]
        schemes |= {full_name(group.index, linear): scheme for linear in group.linears}
        chosen[group.title] = title
    group_bytes, loss = _sum(sizes.table, choice), _sum(loss_table(groups, sensitivities), choice)
    prediction: dict[str, Any] = {
        "budget": budget,
        "kld": loss + cache.kld,
        "bytes": int(group_bytes) + sizes.rest,
        "bits_per_weight": sizes.bits_per_weight(group_bytes),
        "microseconds": None if times is None else _sum(times, choice),
        "groups": chosen,
        "cache": cache.report(),
    }
    # In the order of the model, so that equal plans are equal files.
    return Plan(_in_order(walk, schemes), cache.formats, prediction)


def frontier_of(
    recipe: Recipe, walk: Walk, groups: Sequence[Group], sensitivities: Sensitivities, points: int = 12
) -> list[Point]:
    """The best plans over the whole range of sizes; of times, where the budget is a latency."""
    sizes, times = _sizes(recipe, walk, groups), _times(recipe, walk, groups)
    by_time = recipe.select is not None and recipe.select.latency is not None
    costs = times if by_time and times is not None else sizes.table
    floor = choose_cache(recipe, walk, sensitivities).kld
    found: list[Point] = []
    for best in frontier(loss_table(groups, sensitivities), costs, points):
        size = _sum(sizes.table, best.choice)
        time = None if times is None else _sum(times, best.choice)
        found.append(Point(sizes.bits_per_weight(size), int(size) + sizes.rest, best.loss + floor, time))
    return found


def loss_table(groups: Sequence[Group], sensitivities: Sensitivities) -> Table:
    """Predicted KL divergence of each candidate of each group, in the model as a whole."""
    found = {each.group: each for each in sensitivities.groups}
    return [
        [
            0.0 if scheme is None else found[group.title].loss(name) * sensitivities.interaction
            for name, scheme in group.candidates.items()
        ]
        for group in groups
    ]


def _sum(table: Table, choice: Sequence[int]) -> float:
    """What the candidate of each group with the index in `choice` adds up to."""
    return sum(row[index] for row, index in zip(table, choice, strict=True))


def _in_order(walk: Walk, schemes: dict[str, Scheme | None]) -> dict[str, Scheme | None]:
    names = (full_name(i, linear) for i in range(walk.blocks) for linear in walk.family.linears(walk.config, i))
    return {name: schemes[name] for name in names}


def _costs(recipe: Recipe, walk: Walk, groups: Sequence[Group]) -> tuple[Table, float, float]:
    """Costs of the candidates in the unit of the budget, the limit on their sum, and what the budget holds besides."""
    assert recipe.select is not None
    name, budget = recipe.select.budget
    if name == "latency":
        times = _times(recipe, walk, groups)
        assert times is not None, "a latency names its table of costs"
        return times, budget, 0.0
    sizes = _sizes(recipe, walk, groups)
    if name == "bits_per_weight":
        bits = [[8 * size / sizes.parameters for size in row] for row in sizes.table]
        return bits, budget, 0.0
    return sizes.table, budget - sizes.rest, float(sizes.rest)


def _refusal(recipe: Recipe, walk: Walk, groups: Sequence[Group], nearest: float) -> UsageError:
    assert recipe.select is not None
    name, budget = recipe.select.budget
    unit = {"memory": " bytes", "latency": " µs"}.get(name, "")
    # Rounded up, so that what is named can be met.
    step = 1.0 if name == "memory" else 10.0 ** (math.floor(math.log10(nearest)) - 4) if nearest > 0 else 1e-6
    shown = math.ceil(nearest / step) * step
    digits = max(0, -math.floor(math.log10(step)))
    names = ", ".join(dict.fromkeys(name for group in groups for name in group.candidates))
    return UsageError(
        f"{name} {budget:.10g}{unit} can't be met with the candidates {names}: "
        f"the nearest budget that can is {shown:.{digits}f}{unit}",
        "Raise the budget, or add a smaller candidate" if name != "max_kld" else "Raise it, or add a better candidate",
    )


def _sizes(recipe: Recipe, walk: Walk, groups: Sequence[Group]) -> Sizes:
    return sizes_of(walk, groups, recipe.transform_seed is not None, uniform(recipe, walk).cache)


def _linear_bytes(
    shapes: dict[str, tuple[int, ...]], linear: str, scheme: Scheme | None, walk: Walk, signs: bool
) -> int:
    rows, columns = shapes[f"{linear}.weight"]
    item = walk.source.dtype.itemsize
    bias = item * math.prod(shapes.get(f"{linear}.bias", (0,)))
    if scheme is None:
        return rows * columns * item + bias
    stored = sum(
        math.prod(spec.shape) * spec.dtype.itemsize for spec in tensor_layout(scheme, rows, columns, walk.source.dtype)
    )
    ordered = scheme.weights.group is not None or scheme.activations.group is not None or scheme.outliers > 0
    # down's order is that of the rows before it; whether o's is, too, its heads decide, which only its statistics tell.
    if (ordered or scheme.transform != "none") and not linear.endswith("down_proj"):
        stored += columns * permutation_dtype(columns).itemsize
    if signs and scheme.transform == "hadamard":
        stored += columns
    return stored + bias


def _times(recipe: Recipe, walk: Walk, groups: Sequence[Group]) -> Table | None:
    """Microseconds of each candidate of each group at `select.tokens` tokens, if the recipe names a measured table."""
    if recipe.select is None or recipe.select.costs is None:
        return None
    path, tokens = Path(recipe.select.costs), recipe.select.tokens
    times: dict[tuple[Any, ...], float] = {}
    for row in read_json(path).get("rows", ()):
        labels, time = row.get("labels", {}), (row.get("measures") or {}).get("time")
        if time is not None:
            times[labels.get("N"), labels.get("K"), labels.get("M"), labels.get("kernel")] = float(time["median"])

    def of_linear(index: int, linear: str, scheme: Scheme | None) -> float:
        rows, columns = block_shapes(walk.family, walk.config, index)[f"{linear}.weight"]
        kernels = ["cuBLAS bf16"] if scheme is None else [f"atom {scheme.name} + quantize", f"atom {scheme.name}"]
        for kernel in kernels:
            if (rows, columns, tokens, kernel) in times:
                return times[rows, columns, tokens, kernel]
        raise InputError(
            f"{path} has no time of {kernels[0]} for a linear of {rows} x {columns} at {tokens} tokens, which "
            f"{full_name(index, linear)} needs",
            "Measure it with `atom bench gemm --json`, or leave the candidate out",
        )

    return [
        [
            sum(of_linear(group.index, linear, scheme) for linear in group.linears)
            for scheme in group.candidates.values()
        ]
        for group in groups
    ]
