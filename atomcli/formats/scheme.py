"""Schemes: named choices of weight, activation and outlier format, as data."""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from atomcli.errors import InputError, UsageError
from atomcli.formats import grids
from atomcli.formats.groups import group_count

Element = Literal["int4", "int8", "e2m1", "float"]
ScaleKind = Literal["fp16", "two_level", "e8m0", "e4m3", "row"]

GROUPS = (16, 32, 64, 128, 256)
TRANSFORMS = ("none", "hadamard")
OUTLIER_BITS = 8
HADAMARD_BLOCK = 128

# Which scale a low-bit element can carry, and the groups it is defined for (None: one scale per row or token).
_COMBINATIONS: dict[tuple[str, str], tuple[int | None, ...]] = {
    ("int4", "fp16"): GROUPS,
    ("int4", "two_level"): GROUPS,
    ("int4", "row"): (None,),
    ("int8", "fp16"): GROUPS,
    ("int8", "row"): (None,),
    ("e2m1", "fp16"): GROUPS,
    ("e2m1", "e8m0"): (32,),
    ("e2m1", "e4m3"): (16,),
    ("float", "row"): (None,),
}
_SCALE_BITS = {"fp16": 16, "two_level": 8, "e8m0": 8, "e4m3": 8}
_KV_ELEMENTS = ("int4", "int8", "float")
_KV_POSITIONS = ("before_rope", "after_rope")
_NAMES = {("e2m1", "fp16"): "fp4", ("e2m1", "e8m0"): "mxfp4", ("e2m1", "e4m3"): "nvfp4"}


def _check(element: str, scale: str, group: int | None) -> None:
    allowed = _COMBINATIONS.get((element, scale))
    if allowed is None:
        pairs = ", ".join(f"{e} with {s}" for e, s in _COMBINATIONS)
        raise UsageError(f"No format stores {element} elements with {scale} scales; there is {pairs}.")
    if group not in allowed:
        names = ", ".join("none" if g is None else str(g) for g in allowed)
        raise UsageError(f"Group {group} is not defined for {element} with {scale} scales; allowed: {names}.")


@dataclass(frozen=True)
class WeightFormat:
    """How the body of a weight is stored: element type, channels per scale (None: a scale per row), kind of scale."""

    element: Element
    group: int | None = None
    scale: ScaleKind = "row"

    def __post_init__(self) -> None:
        _check(self.element, self.scale, self.group)

    @property
    def grid(self) -> grids.Grid:
        """The grid of the codes; two-level scales are signed, which frees the code -8."""
        if self.element == "int4":
            return grids.INT4_FULL if self.scale == "two_level" else grids.INT4
        return grids.INT8 if self.element == "int8" else grids.E2M1


@dataclass(frozen=True)
class ActivationFormat:
    """How the body of an activation is quantized at run time; `clip` scales the range before the scale is taken.

    adaptive: the largest value of an NVFP4 group becomes 6 or 4, whichever leaves the smaller error ("four over six",
    Cook et al., 2025): E2M1 has nothing between 4 and 6.
    """

    element: Element
    group: int | None = None
    scale: ScaleKind = "row"
    symmetric: bool = True
    clip: float = 1.0
    adaptive: bool = False

    def __post_init__(self) -> None:
        _check(self.element, self.scale, self.group)
        if self.adaptive and self.scale != "e4m3":
            raise UsageError(f"Adaptive activations need the e4m3 scales of nvfp4, not {self.scale}.")
        if not self.symmetric and self.scale != "two_level":
            raise UsageError(f"Asymmetric activations need two_level scales, not {self.scale}.")
        if not 0 < self.clip <= 1:
            raise UsageError(f"An activation clip ratio lies in (0, 1], not {self.clip}.")

    @property
    def grid(self) -> grids.Grid:
        """The grid of the codes."""
        if self.element == "int4":
            return grids.INT4_FULL if self.symmetric else grids.UINT4
        return grids.INT8 if self.element == "int8" else grids.E2M1


@dataclass(frozen=True)
class Scheme:
    """One linear layer's format: weights, activations, INT8 outlier channels and the transform of its input."""

    weights: WeightFormat
    activations: ActivationFormat
    outliers: int = 0
    transform: Literal["none", "hadamard"] = "none"

    def __post_init__(self) -> None:
        if self.transform not in TRANSFORMS:
            raise UsageError(f"No transform is called {self.transform!r}; there is {' and '.join(TRANSFORMS)}.")
        if self.outliers < 0:
            raise UsageError(f"The number of outlier channels can't be negative, got {self.outliers}.")
        if self.outliers and self.weights.element == "float" and self.activations.element == "float":
            raise UsageError("Outlier channels need a quantized weight or activation to stand out from.")

    @property
    def name(self) -> str:
        """The scheme in short, such as w4a4-g128-o128, w4a8-2l-g128-o128-had or nvfp4-w4a4."""
        weights, activations = self.weights, self.activations
        bits = {"int4": "4", "e2m1": "4", "int8": "8", "float": "16"}
        parts = [f"w{bits[weights.element]}a{bits[activations.element]}"]
        if (weights.element, weights.scale) in _NAMES:
            parts.insert(0, _NAMES[weights.element, weights.scale])
        if weights.scale == "two_level":
            parts.append("2l")
        if not activations.symmetric:
            parts.append("asym")
        if activations.adaptive:
            parts.append("46")
        if weights.group:
            parts.append(f"g{weights.group}")
        if self.outliers:
            parts.append(f"o{self.outliers}")
        if self.transform == "hadamard":
            parts.append("had")
        return "-".join(parts)

    @property
    def hadamard_block(self) -> int:
        """Channels per Hadamard block; narrower scale groups still share one rotation of 128 channels."""
        return max(HADAMARD_BLOCK, self.weights.group or 0)

    def body(self, in_features: int) -> int:
        """Number of body channels of a layer with `in_features` inputs."""
        if self.outliers >= in_features:
            raise UsageError(
                f"{self.outliers} outlier channels leave no body in a layer of {in_features} input channels.",
                "Ask for fewer outlier channels (outliers.channels in the recipe).",
            )
        return in_features - self.outliers

    def bits_per_weight(self, in_features: int, out_features: int, float_bits: int = 16) -> float:
        """Stored bits per weight of a layer: codes, scales and outliers; permutation and bias are not counted."""
        weights, body = self.weights, self.body(in_features)
        if weights.element == "float":
            return float(float_bits)
        bits = weights.grid.bits * (body + body % (8 // weights.grid.bits))
        if weights.scale == "row":
            bits += 32
        else:
            bits += _SCALE_BITS[weights.scale] * group_count(body, weights.group)
            bits += 32 if weights.scale == "two_level" else 0
        if self.outliers:
            bits += OUTLIER_BITS * self.outliers + 32
        per_tensor = 32 if weights.scale == "e4m3" else 0
        return (bits + per_tensor / out_features) / in_features

    def bits_per_activation(self, in_features: int, float_bits: int = 16) -> float:
        """Bits per input channel that a token's quantized input takes: codes, scales, offsets and outliers."""
        activations, body = self.activations, self.body(in_features)
        if activations.element == "float":
            return float(float_bits)
        bits = activations.grid.bits * body
        if activations.scale != "row":
            offset = 0 if activations.symmetric else 8
            bits += (_SCALE_BITS[activations.scale] + offset) * group_count(body, activations.group)
        bits += 32 if activations.scale in ("row", "two_level", "e4m3") else 0
        bits += OUTLIER_BITS * self.outliers + 32 if self.outliers else 0
        return bits / in_features

    def to_dict(self) -> dict[str, Any]:
        """The scheme as plain data, for config.json and reports."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Scheme":
        """The scheme that `to_dict` wrote; InputError for anything else."""
        try:
            data = dict(data)
            weights = WeightFormat(**data.pop("weights"))
            activations = ActivationFormat(**data.pop("activations"))
            return cls(weights, activations, **data)
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise InputError(f"A saved scheme is not one: {str(error).rstrip('.')}") from error


@dataclass(frozen=True)
class KVFormat:
    """How keys and values are cached: asymmetric per token and head for int4 and int8, or as computed ("float").

    centered: keys are stored without a vector of their head that calibration chose. What all keys of a head have in
    common moves every logit of a query alike, and softmax does not see it: nothing has to be added back.
    """

    element: Literal["int4", "int8", "float"] = "float"
    position: Literal["before_rope", "after_rope"] = "after_rope"
    hadamard: bool = False
    bias_free: bool = True
    centered: bool = False

    def __post_init__(self) -> None:
        if self.element not in _KV_ELEMENTS or self.position not in _KV_POSITIONS:
            raise UsageError(
                f"A cache holds {', '.join(_KV_ELEMENTS)} elements {' or '.join(_KV_POSITIONS)}, "
                f"not {self.element} {self.position}."
            )
        if self.hadamard and self.position == "before_rope":
            raise UsageError("A Hadamard on keys is applied after RoPE; kv_cache.position must be after_rope.")
        if self.centered and self.position == "before_rope":
            raise UsageError("Keys are centered after RoPE; kv_cache.position must be after_rope.")

    def vector_bytes(self, head_dim: int, float_bytes: int = 2) -> int:
        """Bytes of one cached key or value, of one token and head, with its fp16 scale and minimum."""
        if self.element == "float":
            return head_dim * float_bytes
        return (head_dim // 2 if self.element == "int4" else head_dim) + 4

    def bits_per_value(self, head_dim: int, float_bits: int = 16) -> float:
        """Bits per cached number: codes, and an fp16 scale and minimum per token and head."""
        return float(float_bits) if self.element == "float" else int(self.element[3:]) + 32 / head_dim

    def to_dict(self) -> dict[str, Any]:
        """The format as plain data."""
        return asdict(self)


_A16 = ActivationFormat("float")
_A8 = ActivationFormat("int8")
_W4 = WeightFormat("int4", 128, "fp16")
_W4_TWO_LEVEL = WeightFormat("int4", 128, "two_level")

SCHEMES: dict[str, Scheme] = {
    "w4a4": Scheme(_W4_TWO_LEVEL, ActivationFormat("int4", 128, "two_level", False, 0.95), 128, "hadamard"),
    "w4a8": Scheme(_W4_TWO_LEVEL, _A8, 128, "hadamard"),
    "w4a16": Scheme(_W4, _A16),
    "w8a8": Scheme(WeightFormat("int8"), _A8),
    "w16a16": Scheme(WeightFormat("float"), _A16),
    "atom-paper": Scheme(_W4, ActivationFormat("int4", 128, "fp16", True, 0.9), 128),
    "fp4": Scheme(WeightFormat("e2m1", 128, "fp16"), ActivationFormat("e2m1", 128, "fp16"), 128, "hadamard"),
    "mxfp4": Scheme(WeightFormat("e2m1", 32, "e8m0"), ActivationFormat("e2m1", 32, "e8m0")),
    "nvfp4": Scheme(WeightFormat("e2m1", 16, "e4m3"), ActivationFormat("e2m1", 16, "e4m3")),
}


def scheme_named(name: str) -> Scheme:
    """A scheme by its name in SCHEMES, or a variant of one: w4a8-o64 has 64 outliers, w4a4-g64-o32 groups of 64 too.

    Raises UsageError for any other name, and for a group that the formats don't have.
    """
    matched = re.fullmatch(r"(.+?)(?:-g(\d+))?(?:-o(\d+))?", name)
    if matched is None or matched[1] not in SCHEMES:
        raise UsageError(f"No scheme is called {name!r}; there are {', '.join(sorted(SCHEMES))}, and such with -gN -oN")
    scheme = SCHEMES[matched[1]]
    if matched[2] is not None:
        group, weights, activations = int(matched[2]), scheme.weights, scheme.activations
        if weights.group is None:
            raise UsageError(f"{matched[1]} has no groups, so {name!r} is no scheme")
        if activations.group is not None:
            activations = replace(activations, group=group)
        scheme = replace(scheme, weights=replace(weights, group=group), activations=activations)
    return scheme if matched[3] is None else replace(scheme, outliers=int(matched[3]))
