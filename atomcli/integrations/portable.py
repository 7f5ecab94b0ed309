"""What other engines can hold of a quantized linear, and what must be traded where they can't.

An engine that doesn't know atom reads channels in the model's own order, one format for all channels of a linear, and
its own rule for activations. A scheme that is all of this is *plain*. Whatever separates another scheme from a plain
one is an `Obstacle`; the ones that mathematics removes (a permutation under one scale per row, a scale of two levels, a
ragged last group) are removed without a word, the others only by a trade that the user names.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from atomcli.algorithms.rounding import round_to_nearest
from atomcli.errors import UsageError
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import GROUPS, ActivationFormat, Scheme, WeightFormat
from atomcli.formats.weights import QuantizedWeight

What = Literal["outliers", "transform", "order", "format", "activations", "cache"]

REQUANTIZE, SIXTEEN, NEAREST, EIGHT = "requantize", "16bit", "nearest", "8bit"
# What can be traded, and for what; the first is what an error suggests.
REMEDIES: dict[What, tuple[str, ...]] = {
    "outliers": (REQUANTIZE, SIXTEEN),
    "transform": (REQUANTIZE, SIXTEEN),
    "order": (REQUANTIZE, SIXTEEN),
    "format": (REQUANTIZE, SIXTEEN),
    "activations": (NEAREST, EIGHT, SIXTEEN),
    "cache": (SIXTEEN,),
}
_FLOAT = ActivationFormat("float")
_PER_TOKEN = ActivationFormat("int8")

WeightRule = Callable[[WeightFormat, int], WeightFormat | None]
"""The nearest weight format that a target holds for so many input channels; None where it holds none."""
ActivationRule = Callable[[ActivationFormat, int], ActivationFormat | None]
"""The nearest rule of activations that a target has for so many input channels; None where there is none."""


@dataclass(frozen=True)
class Target:
    """An engine's file format: its name, the formats it holds, and the rules of activations it knows."""

    name: str
    weights: WeightRule
    activations: ActivationRule


@dataclass(frozen=True)
class Obstacle:
    """What of a scheme a target can't hold, why, and what it may be traded for."""

    what: What
    why: str
    remedies: tuple[str, ...]


@dataclass(frozen=True)
class Passage:
    """How one linear gets to a target: its plain scheme (None: 16 bits), and what was in the way.

    `rounded_again` says that its weight has to be requantized; otherwise it is the same weight in other words.
    """

    scheme: Scheme | None
    obstacles: tuple[Obstacle, ...]
    rounded_again: bool

    @property
    def exact(self) -> bool:
        """Whether nothing is lost but the rounding of scales to the target's dtype."""
        return not self.obstacles


def parse_trades(texts: Iterable[str]) -> dict[What, str]:
    """Trades as they are typed, `outliers=requantize`; UsageError for one that there isn't."""
    trades: dict[What, str] = {}
    for text in texts:
        what, _, remedy = text.partition("=")
        allowed = REMEDIES.get(what)  # type: ignore[call-overload]
        if allowed is None or remedy not in allowed:
            every = ", ".join(f"{key}={'|'.join(values)}" for key, values in REMEDIES.items())
            raise UsageError(f"--trade is {text!r}; there is {every}")
        trades[what] = remedy  # type: ignore[index]
    return trades


def passage(scheme: Scheme, in_features: int, permuted: bool, target: Target, trades: Mapping[What, str]) -> Passage:
    """How a linear of `scheme` gets to `target` under these trades, whether or not they cover all its obstacles."""
    if scheme.weights.element == "float":
        # What order and basis the weight stands in is undone; only quantized activations are left to lose.
        inputs = scheme.activations
        lost = Obstacle("activations", f"activations in {_named(inputs)} before 16-bit weights", (SIXTEEN,))
        return Passage(None, () if inputs.element == "float" else (lost,), False)
    found: list[Obstacle] = []

    def meet(what: What, why: str, remedies: tuple[str, ...] | None = None) -> None:
        found.append(Obstacle(what, why, remedies or REMEDIES[what]))

    if scheme.outliers:
        meet("outliers", f"{scheme.outliers} outlier channels in 8 bits beside the others")
    if scheme.transform != "none":
        meet("transform", f"a {scheme.transform} transform of the input at run time")
    # One scale for all channels of a row and of a token doesn't mind their order: the columns are put back.
    spanning = all(each.group is None for each in (scheme.weights, scheme.activations))
    if permuted and not spanning:
        meet("order", "groups of channels in another order than the model's")
    weights = target.weights(scheme.weights, in_features)
    if weights is None:
        meet("format", f"weights in {_named(scheme.weights)} over {in_features} channels", (SIXTEEN,))
    elif not _same_numbers(weights, scheme.weights):
        meet("format", f"weights in {_named(scheme.weights)} (the nearest: {_named(weights)})")
    activations = target.activations(scheme.activations, in_features)
    if activations is not None and weights is not None and not _multiply(weights, activations):
        activations = None
    if activations is None:
        meet("activations", f"activations in {_named(scheme.activations)}", (SIXTEEN,))
    elif activations != scheme.activations:
        allowed = REMEDIES["activations"] if weights is None or weights.element != "e2m1" else (NEAREST, SIXTEEN)
        meet(
            "activations", f"activations in {_named(scheme.activations)} (the nearest: {_named(activations)})", allowed
        )
    remedies = {trades.get(obstacle.what) for obstacle in found if obstacle.what != "activations"}
    if weights is None or SIXTEEN in remedies:
        return Passage(None, tuple(found), False)
    if activations is None or trades.get("activations") == SIXTEEN:
        activations = _FLOAT
    elif activations != scheme.activations and trades.get("activations") == EIGHT:
        activations = _PER_TOKEN
    return Passage(Scheme(weights, activations), tuple(found), bool(remedies))


def restate(weight: QuantizedWeight, layout: InputLayout, way: Passage) -> QuantizedWeight:
    """The weight (N, K) in the plain scheme of its passage, channels in the model's own order.

    The same numbers in other words where the passage allows it (group scales then stay fp32, to be rounded once, to the
    target's dtype), else the nearest ones with searched clip ratios.
    """
    scheme = way.scheme
    assert scheme is not None, "a linear that goes to 16 bits has no scheme to be restated in"
    if way.rounded_again:
        natural = layout.invert(weight.dequantize())
        return round_to_nearest(natural, torch.ones(weight.shape[1]), scheme, "search")
    order = None if layout.permutation is None else torch.argsort(layout.permutation)
    codes = weight.body_codes() if order is None else weight.body_codes()[:, order]
    old, new = weight.scheme.weights, scheme.weights
    if new.scale != "fp16":
        return QuantizedWeight.from_codes(scheme, codes, weight.group_scales, weight.unit)
    assert new.group is not None
    group_scales = weight.scales()
    if old.group != new.group:
        group_scales = group_scales.repeat_interleave((old.group or weight.body) // new.group, dim=1)
    return QuantizedWeight.from_codes(scheme, codes, group_scales[:, : weight.body // new.group].contiguous())


def natural_weight(weight: QuantizedWeight, layout: InputLayout) -> Tensor:
    """The weight (N, K) fp32 that the product sees, channels in the model's own order."""
    return layout.invert(weight.dequantize())


def fitting_group(group: int, in_features: int) -> int | None:
    """The largest group that cuts `in_features` evenly and repeats a scale of `group`; None where none is defined."""
    common = math.gcd(group, in_features)
    return common if common in GROUPS else None


def _same_numbers(new: WeightFormat, old: WeightFormat) -> bool:
    """Whether a weight in `old` is one in `new` without rounding it again: finer groups, one level of scales."""
    return new == old or (
        new.element == old.element and new.scale == "fp16" and old.scale in ("fp16", "two_level", "row")
    )


def _multiply(weights: WeightFormat, activations: ActivationFormat) -> bool:
    """Whether engines multiply these: integers by integers, E2M1 by E2M1 with the same scales, anything by 16 bits."""
    if activations.element == "float" or "e2m1" not in (weights.element, activations.element):
        return True
    return (weights.element, weights.scale) == (activations.element, activations.scale)


def _named(format: WeightFormat | ActivationFormat) -> str:
    """A format in words: `int4 in groups of 128 with two_level scales, clip 0.95`."""
    if format.element == "float":
        return "16 bits"
    name = format.element if format.group is None else f"{format.element} in groups of {format.group}"
    details = [f"{format.scale} scales"] if format.scale not in ("row", "fp16") else []
    if isinstance(format, ActivationFormat):
        details += ["asymmetric"] if not format.symmetric else []
        details += [f"clip {format.clip:.3g}"] if format.clip != 1 else []
        details += ["adaptive"] if format.adaptive else []
    return f"{name} with {', '.join(details)}" if details else name


def without_cache(kv_element: str) -> Obstacle | None:
    """The obstacle of a quantized cache, which no file format here holds; None for a 16-bit one."""
    if kv_element == "float":
        return None
    return Obstacle("cache", f"an {kv_element} KV cache", REMEDIES["cache"])


def refuse_untraded(target: Target, obstacles: Iterable[Obstacle], trades: Mapping[What, str]) -> None:
    """UsageError naming every obstacle without a trade, with the options that would let it pass."""
    open_ones: dict[What, Obstacle] = {}
    for obstacle in obstacles:
        if trades.get(obstacle.what) not in obstacle.remedies:
            open_ones.setdefault(obstacle.what, obstacle)
    if open_ones:
        reasons = "; ".join(obstacle.why for obstacle in open_ones.values())
        options = " ".join(f"--trade {what}={each.remedies[0]}" for what, each in open_ones.items())
        raise UsageError(
            f"{target.name} can't hold {reasons}",
            f"Add {options} (what it costs is measured), or quantize by a recipe that ends in -plain",
        )
