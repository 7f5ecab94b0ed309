"""A recipe: which numbers a model gets, and how they are chosen.

A recipe is a small YAML file (see `recipes/`); this module is its schema, its defaults and its error messages.
Everything a run depends on is in the resolved recipe, which is saved with the result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from atomcli.errors import UsageError
from atomcli.formats.scheme import (
    GROUPS,
    SCHEMES,
    ActivationFormat,
    Element,
    KVFormat,
    ScaleKind,
    Scheme,
    WeightFormat,
    scheme_named,
)
from atomcli.recipe_errors import did_you_mean, explain
from atomcli.resources import resource_directory

# format -> its own group and scale type (OCP MX, NVFP4)
MICROSCALED: dict[str, tuple[int, ScaleKind]] = {"mxfp4": (32, "e8m0"), "nvfp4": (16, "e4m3")}
_ELEMENTS: dict[str, Element] = {
    "int4": "int4",
    "int8": "int8",
    "e2m1": "e2m1",
    "mxfp4": "e2m1",
    "nvfp4": "e2m1",
    "none": "float",
}

NumberFormat = Literal["int4", "int8", "e2m1", "mxfp4", "nvfp4", "none"]
ScaleRule = Literal["absmax", "two_level"]
TokenWeights = Literal["none", "residual"]
Order = Literal["energy", "natural"]


class Section(BaseModel):
    """One mapping of the recipe: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(Section):
    """Which text the statistics come from."""

    dataset: str = "default"
    samples: int = Field(default=128, ge=1)
    sequence_length: int = Field(default=2048, ge=2)
    seed: int = Field(default=0, ge=0)


class Numbers(Section):
    """What weights and activations have in common: a number format, a group of channels, a rule for the scales."""

    format: NumberFormat = "int4"
    group: int | None = 128
    scale: ScaleRule = "absmax"

    @model_validator(mode="before")
    @classmethod
    def fill_group(cls, data: Any) -> Any:
        """Microscaled formats bring their own group; `none` has none."""
        if isinstance(data, dict) and "group" not in data:
            fixed = MICROSCALED.get(data.get("format", ""), (128, ""))[0]
            return {**data, "group": None if data.get("format") == "none" else fixed}
        return data

    @field_validator("group")
    @classmethod
    def known_group(cls, group: int | None) -> int | None:
        """A group is a power of two that the kernels and the Hadamard transform can use."""
        if group is not None and group not in GROUPS:
            raise ValueError(f"must be one of {', '.join(map(str, GROUPS))} or null (one scale for all channels)")
        return group

    @model_validator(mode="after")
    def fits_format(self) -> Numbers:
        """Refuse combinations that no kernel and no specification has."""
        if self.format in MICROSCALED and self.group != MICROSCALED[self.format][0]:
            raise ValueError(f"{self.format} has groups of {MICROSCALED[self.format][0]}, not {self.group}")
        if self.scale == "two_level" and (self.format != "int4" or self.group is None):
            raise ValueError(f"scale two_level needs format int4 with groups, not {self.format}, group {self.group}")
        return self

    @property
    def element(self) -> Element:
        """The element type of `formats`: what one stored number is."""
        return _ELEMENTS[self.format]

    @property
    def scale_type(self) -> ScaleKind:
        """The scale type of `formats`: how a scale is stored."""
        if self.format in MICROSCALED:
            return MICROSCALED[self.format][1]
        if self.group is None:
            return "row"
        return "two_level" if self.scale == "two_level" else "fp16"


class Weights(Numbers):
    """How weights become numbers: format, group, rule of the scales, rounding, clip ratio, and GPTQ's Hessian.

    `damping` is added to the Hessian's diagonal, relative to its mean or to each entry by itself. `token_weights`
    residual counts a token in the Hessians of o and down by 1 / the mean square of its residual stream, to which their
    output is added: an error matters in proportion to what it is added to. After GPTQ, `sweeps` times over, every
    code moves to where it serves best beside all others.
    """

    rounding: Literal["gptq", "rtn"] = "gptq"
    clip: float | Literal["search"] = 1.0
    damping: float = Field(default=0.01, gt=0, le=1)
    damping_rule: Literal["mean", "relative"] = "mean"
    token_weights: TokenWeights = "none"
    sweeps: int = Field(default=0, ge=0, le=16)

    def method(self) -> dict[str, Any]:
        """What `algorithms.together.compensate` has to know besides formats."""
        return {key: getattr(self, key) for key in ("clip", "damping", "damping_rule", "sweeps")}

    @field_validator("clip", mode="before")
    @classmethod
    def sane_clip(cls, clip: Any) -> Any:
        """A ratio of the absolute maximum, or the word that has it searched."""
        if clip != "search" and not (isinstance(clip, float | int) and 0.1 <= clip <= 1.0):
            raise ValueError("must lie between 0.1 and 1, or be 'search'")
        return clip


class Activations(Numbers):
    """How activations become numbers at run time."""

    symmetric: bool = True
    clip: float = Field(default=1.0, ge=0.1, le=1.0)
    adaptive: bool = False


class Outliers(Section):
    """The channels with the most energy, kept in 8 bits."""

    channels: int = Field(default=0, ge=0)
    format: Literal["int8"] = "int8"


class KVCache(Section):
    """How the cache stores keys and values (see `formats.KVFormat`), in INT8 in the blocks that `int8` numbers."""

    format: Literal["int4", "int8", "none"] = "none"
    position: Literal["before_rope", "after_rope"] = "after_rope"
    hadamard: bool = False
    bias_free: bool = True
    centered: bool = False
    int8: tuple[int, ...] = ()

    @model_validator(mode="after")
    def says_something(self) -> KVCache:
        """Blocks can be excepted from four bits alone."""
        if self.int8 and self.format != "int4":
            raise ValueError(f"int8 excepts blocks from format int4, but format is {self.format}")
        if any(index < 0 for index in self.int8):
            raise ValueError("int8 lists blocks by their number, from 0")
        return self

    def to_format(self, index: int | None = None) -> KVFormat:
        """The same as a `formats.KVFormat`: that of block `index`, or of every block that is no exception."""
        element: Literal["int4", "int8", "float"] = "float" if self.format == "none" else self.format
        if index in self.int8:
            element = "int8"
        return KVFormat(element, self.position, self.hadamard, self.bias_free, self.centered)


class Rule(Section):
    """An exception for the linears whose name matches: kept in 16 bits, or another scheme; the first match wins."""

    match: str
    keep: bool = False
    scheme: str | None = None

    @field_validator("scheme")
    @classmethod
    def known_scheme(cls, scheme: str | None) -> str | None:
        """A scheme is one of the named ones, or a variant such as w4a8-o64."""
        return None if scheme is None else _known_scheme(scheme)

    @model_validator(mode="after")
    def says_one_thing(self) -> Rule:
        """A rule keeps, or it names a scheme."""
        if self.keep == (self.scheme is not None):
            raise ValueError("a rule says either keep: true or scheme: NAME")
        return self

    def matches(self, linear: str) -> bool:
        """Whether this rule is about `linear`: a glob over its full name, or its bare last part."""
        return fnmatchcase(linear, self.match) or linear.rsplit(".", 1)[-1] == self.match


class Select(Section):
    """The search of a scheme for each group of linears: one budget, and what may be chosen.

    bits_per_weight: stored bits per weight of all linears in the blocks. memory: bytes of the whole checkpoint, a
    number or a size such as 10GiB. max_kld: predicted KL divergence in nats; the fewest bytes are sought. latency:
    microseconds of all products together at `tokens` tokens, by the table `costs` that `atom bench gemm --json` wrote.
    candidates: schemes by name (w4a4, w4a8-o64, w16a16, ...); none: the recipe's own with fewer outliers, W8A8, 16 bit.
    kv_bits: beside that budget, stored bits per cached number (scale and minimum counted) that the cache of all blocks
    may take on average; the blocks that gain most get INT8. None: the recipe's cache in every block.
    """

    bits_per_weight: float | None = Field(default=None, gt=0)
    memory: int | str | None = None
    max_kld: float | None = Field(default=None, gt=0)
    latency: float | None = Field(default=None, gt=0)
    costs: str | None = None
    tokens: int = Field(default=16, ge=1)
    candidates: tuple[str, ...] = ()
    kv_bits: float | None = Field(default=None, gt=0)

    @field_validator("memory")
    @classmethod
    def readable_size(cls, memory: int | str | None) -> int | str | None:
        """A size is a positive number of bytes, or a number with a unit."""
        if memory is not None and not size_in_bytes(memory):
            raise ValueError("must be a number of bytes or a size such as 10GiB, 800MB")
        return memory

    @field_validator("candidates")
    @classmethod
    def known_candidates(cls, candidates: tuple[str, ...]) -> tuple[str, ...]:
        """Candidates are named schemes or variants of them."""
        return tuple(_known_scheme(name) for name in candidates)

    @model_validator(mode="after")
    def one_budget(self) -> Select:
        """A selection has exactly one budget for the weights; a latency needs its table."""
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(BUDGETS)}; it has {' and '.join(given) or 'none'}")
        if self.latency is not None and self.costs is None:
            raise ValueError("latency needs costs, the file that `atom bench gemm --json` wrote")
        return self

    @property
    def budget(self) -> tuple[str, float]:
        """The name of the budget and its value; memory in bytes."""
        name = next(name for name in BUDGETS if getattr(self, name) is not None)
        value = getattr(self, name)
        return name, float(size_in_bytes(value) if name == "memory" else value)


BUDGETS = ("bits_per_weight", "memory", "max_kld", "latency")
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("kMGT", start=1)
}


def size_in_bytes(size: int | str) -> int:
    """A number of bytes from a number or a text such as 10GiB or 800 MB; 0 when it is none."""
    matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?i?B?)\s*", str(size))
    unit = "" if matched is None else matched[2].replace("K", "k")
    return 0 if matched is None or unit not in _UNITS else int(float(matched[1]) * _UNITS[unit])


class Recipe(Section):
    """A whole recipe, resolved: defaults are filled in and every value is checked.

    `order` says in which order channels are cut into groups: by energy, outliers last, or natural, the model's own.
    Other engines read natural order only; GPTQ then takes the columns by energy without moving them.
    """

    name: str
    description: str = ""
    calibration: Calibration = Calibration()
    weights: Weights = Weights()
    activations: Activations = Activations()
    outliers: Outliers = Outliers()
    transform: Literal["none", "hadamard"] = "none"
    transform_seed: int | None = Field(default=None, ge=0)
    order: Order = "energy"
    kv_cache: KVCache = KVCache()
    rules: tuple[Rule, ...] = (Rule(match="lm_head", keep=True),)
    select: Select | None = None

    @model_validator(mode="after")
    def sections_agree(self) -> Recipe:
        """Weights and activations share channels, so their groups are equal; `formats` checks the combinations."""
        groups = {numbers.group for numbers in (self.weights, self.activations) if numbers.group is not None}
        if len(groups) > 1:
            raise ValueError(
                f"weights.group is {self.weights.group} and activations.group is {self.activations.group}: "
                "they are multiplied group by group and must be equal"
            )
        self.scheme()
        self.kv_cache.to_format()
        if self.transform_seed is not None and self.transform == "none" and self.select is None:
            raise ValueError("transform_seed draws the signs of a Hadamard, but transform is none")
        if self.order == "natural":
            self._refuse_outliers()
        return self

    def _refuse_outliers(self) -> None:
        """Outlier channels stand last, so the order can't be natural."""
        ruled = [scheme_named(rule.scheme) for rule in self.rules if rule.scheme is not None]
        for scheme in (self.scheme(), *ruled, *self.candidates().values()):
            if scheme is not None and scheme.outliers:
                raise ValueError(f"order natural leaves no channels to stand last, but {scheme.name} has outliers")

    def scheme(self) -> Scheme:
        """The scheme of every linear that no rule excepts."""
        activations = ActivationFormat(
            element=self.activations.element,
            group=self.activations.group,
            scale=self.activations.scale_type,
            symmetric=self.activations.symmetric,
            clip=self.activations.clip,
            adaptive=self.activations.adaptive,
        )
        weights = WeightFormat(self.weights.element, self.weights.group, self.weights.scale_type)
        return Scheme(weights, activations, self.outliers.channels, self.transform)

    def rule_for(self, linear: str) -> Rule | None:
        """The first rule that matches a linear's full name."""
        return next((rule for rule in self.rules if rule.matches(linear)), None)

    def scheme_for(self, linear: str, in_features: int) -> Scheme | None:
        """The scheme of one linear, or None when a rule keeps it in 16 bits.

        Raises UsageError when the scheme does not fit the linear's input channels.
        """
        rule = self.rule_for(linear)
        if rule is not None and rule.keep:
            return None
        scheme = scheme_named(rule.scheme) if rule is not None and rule.scheme is not None else self.scheme()
        refuse_narrow(scheme, linear, in_features)
        return scheme

    def candidates(self) -> dict[str, Scheme | None]:
        """What a selection may choose from, by name, the recipe's own scheme first; None keeps 16 bits."""
        named = self.select.candidates if self.select is not None else ()
        if named:
            return {name: None if name == KEPT else scheme_named(name) for name in named}
        own = self.scheme()
        fewer = [replace(own, outliers=each) for each in (own.outliers // 2, 0) if each < own.outliers]
        return {scheme.name: scheme for scheme in (own, *fewer)} | {"w8a8": SCHEMES["w8a8"], KEPT: None}

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain JSON: what is saved with a result and compared when a run resumes."""
        return self.model_dump(mode="json")


# The candidate that leaves a linear as it is.
KEPT = "w16a16"


def refuse_narrow(scheme: Scheme, linear: str, in_features: int) -> None:
    """UsageError when a linear has too few input channels for a scheme's outliers."""
    if scheme.outliers >= in_features:
        raise UsageError(
            f"{scheme.name} has {scheme.outliers} outliers, but {linear} has only {in_features} input channels",
            f"Use at most {in_features - 1} (--outliers, or such as w4a8-o16 for a named scheme), "
            "or a rule that keeps this linear",
        )


def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship, name -> file."""
    return {path.stem: path for path in sorted(resource_directory("recipes").glob("*.yaml"))}


# PyYAML takes minutes over a few thousand nested brackets.
_LARGEST, _DEEPEST = 1 << 16, 32


def _refuse_monster(content: str, path: Path) -> None:
    """UsageError for a file that is too large or too deeply nested to be a recipe, before it is parsed."""
    depth = accumulate((char in "[{") - (char in "]}") for char in content if char in "[]{}")
    if len(content) > _LARGEST or max(depth, default=0) > _DEEPEST:
        raise UsageError(
            f"{path} is no recipe: it has {len(content)} characters, nested too deeply or too many",
            "See `atom recipes show atom-w4a4`",
        )


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A recipe by the name of one that ships, or from a YAML file; UsageError says what is wrong with it."""
    text = str(name_or_path)
    shipped = shipped_recipes()
    path = shipped.get(text, Path(text))
    if not path.is_file():
        raise UsageError(
            f"No recipe {text!r}: it is neither a file nor one of {', '.join(shipped)}{did_you_mean(text, shipped)}",
            "See `atom recipes list`",
        )
    try:
        content = path.read_text(encoding="utf-8")
        _refuse_monster(content, path)
        data = yaml.safe_load(content)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"The recipe {path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UsageError(f"The recipe {path} is no mapping of keys to values", "See `atom recipes show atom-w4a4`")
    return parse_recipe({"name": path.stem, **data}, str(path))


def parse_recipe(data: Mapping[str, Any], where: str = "The recipe") -> Recipe:
    """A Recipe from plain data; UsageError names the first wrong key and the nearest valid one."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{where}: {explain(error, Recipe)}", "`atom recipes show atom-w4a4` has every key") from error
    except UsageError as error:  # a combination that no format has
        raise UsageError(f"{where}: {error.what}", error.hint) from error


def _known_scheme(name: str) -> str:
    try:
        scheme_named(name)
    except UsageError as error:
        raise ValueError(
            f"must be one of {', '.join(sorted(SCHEMES))} or a variant such as w4a8-o64{did_you_mean(name, SCHEMES)}"
        ) from error
    return name
