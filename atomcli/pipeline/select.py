"""Stage 2, precision selection: which scheme each linear gets.

Without a budget every linear gets the recipe's scheme unless a rule says otherwise. With one, each group of linears
that engines fuse (q/k/v, o, gate/up, down; all experts of a block) takes one of the candidates, chosen by an integer
program over measured sensitivities. `Plan` is all that later stages see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomcli.algorithms.sensitivity import Sensitivities
from atomcli.checkpoint.files import read_json, write_json
from atomcli.errors import InputError, UnsupportedError, UsageError
from atomcli.formats.scheme import KVFormat, Scheme
from atomcli.models.block import Site
from atomcli.pipeline.model import Walk, full_name
from atomcli.recipe import KEPT, Recipe, refuse_narrow

# Linears outside the blocks, which stay in 16 bits; rules may say so, but nothing else.
OUTSIDE = ("lm_head", "model.embed_tokens")
# What a plan depends on; its selection and its calibration text may differ.
_SECTIONS = ("weights", "activations", "outliers", "transform", "transform_seed", "order", "kv_cache", "rules")
_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """The scheme of each linear by its name in the model (None keeps it in 16 bits), and the cache of each block.

    `prediction` is what a selection expects of it, for the report; None where nothing was selected.
    """

    schemes: Mapping[str, Scheme | None]
    cache: tuple[KVFormat, ...]
    prediction: Mapping[str, Any] | None = None

    def kept(self) -> list[str]:
        """Names of the linears that stay in 16 bits, the head among them."""
        return [*(name for name, scheme in self.schemes.items() if scheme is None), "lm_head"]

    def names(self) -> dict[Scheme, str]:
        """A name for each scheme of the plan; schemes that differ only in what names don't tell get a number."""
        names: dict[Scheme, str] = {}
        for scheme in self.schemes.values():
            if scheme is not None and scheme not in names:
                alike = sum(other.name == scheme.name for other in names)
                names[scheme] = scheme.name if not alike else f"{scheme.name}-{alike + 1}"
        return names

    def of_site(self, index: int, site: Site) -> Scheme | None:
        """The scheme that the linears of a site share."""
        return self.schemes[full_name(index, site.of_expert(0)[0])]


@dataclass(frozen=True)
class Group:
    """Linears of block `index` that must share one scheme, and the candidates for it by name; None keeps 16 bits."""

    index: int
    name: str
    sites: tuple[Site, ...]
    linears: tuple[str, ...]
    candidates: Mapping[str, Scheme | None]

    @property
    def title(self) -> str:
        """The group in reports: `12.gate_up`."""
        return f"{self.index}.{self.name}"

    @property
    def reference(self) -> str | None:
        """The candidate whose divergence is measured: the first that quantizes anything."""
        return next((name for name, scheme in self.candidates.items() if scheme is not None), None)


def uniform(recipe: Recipe, walk: Walk) -> Plan:
    """The plan of a recipe's own scheme and its rules.

    Raises UsageError for a rule that matches nothing, a scheme that doesn't fit a linear, or a rule that gives
    different schemes to linears that share their input (q/k/v, gate/up, the experts of a layer).
    """
    schemes: dict[str, Scheme | None] = {}
    for index in range(walk.blocks):
        for linear in walk.family.linears(walk.config, index):
            name = full_name(index, linear)
            schemes[name] = recipe.scheme_for(name, walk.in_features(index, linear))
        for site in walk.family.sites(walk.config, index):
            _refuse_split(index, site, walk, schemes)
    _refuse_idle_rules(recipe, schemes)
    if beyond := [index for index in recipe.kv_cache.int8 if index >= walk.blocks]:
        raise UsageError(f"kv_cache.int8 names block {beyond[0]}, but the model's blocks are 0 to {walk.blocks - 1}")
    return Plan(schemes, tuple(recipe.kv_cache.to_format(index) for index in range(walk.blocks)))


def groups_of(recipe: Recipe, walk: Walk) -> list[Group]:
    """The groups of a model with the recipe's candidates; what a rule is about has only the rule's.

    Raises UsageError as `uniform` does, and for a candidate that doesn't fit a linear.
    """
    fixed, candidates = uniform(recipe, walk), recipe.candidates()
    groups: list[Group] = []
    for index in range(walk.blocks):
        together: dict[str, list[Site]] = {}
        for site in walk.family.sites(walk.config, index):
            ruled = recipe.rule_for(full_name(index, site.of_expert(0)[0])) is not None
            together.setdefault("experts" if site.expert and not ruled else site.name, []).append(site)
        for name, sites in together.items():
            experts = range(walk.family.expert_count(walk.config, index) if sites[0].expert else 1)
            linears = tuple(linear for site in sites for expert in experts for linear in site.of_expert(expert))
            first = full_name(index, linears[0])
            choices: Mapping[str, Scheme | None] = candidates
            if recipe.rule_for(first) is not None:
                scheme = fixed.schemes[first]
                choices = {KEPT if scheme is None else scheme.name: scheme}
            for linear in linears:
                for choice in choices.values():
                    if choice is not None:
                        refuse_narrow(choice, full_name(index, linear), walk.in_features(index, linear))
            groups.append(Group(index, name, tuple(sites), linears, choices))
    return groups


def select(recipe: Recipe, walk: Walk, sensitivities: Sensitivities | None = None) -> Plan:
    """The plan that a recipe makes for a model; with a budget it needs the model's sensitivities.

    Raises UsageError as `uniform` does, and for a budget that can't be met, saying the nearest that can.
    """
    if recipe.select is None:
        return uniform(recipe, walk)
    from atomcli.pipeline.budget import choose

    assert sensitivities is not None, "a selection needs sensitivities"
    return choose(recipe, walk, groups_of(recipe, walk), sensitivities)


def save_plan(plan: Plan, recipe: Recipe, walk: Walk, path: Path) -> None:
    """Write a plan to a JSON file, with the fingerprints of the model and the recipe that it was made for."""
    names = plan.names()
    document = {
        "version": _VERSION,
        "model": {"name": walk.source.name, "fingerprint": walk.source.fingerprint()},
        "recipe": {"name": recipe.name, "fingerprint": recipe_fingerprint(recipe)},
        "schemes": {name: scheme.to_dict() for scheme, name in names.items()},
        "linears": {name: None if scheme is None else names[scheme] for name, scheme in plan.schemes.items()},
        "cache": [kv.to_dict() for kv in plan.cache],
        "prediction": plan.prediction,
    }
    write_json(path, document)


def load_plan(path: Path, recipe: Recipe, walk: Walk) -> Plan:
    """A plan that `save_plan` wrote; InputError when it is none, or was made for another model or recipe."""
    data = read_json(path)
    hint = "make one with `atom plan MODEL -o FILE`"
    if data.get("version") != _VERSION or not {"model", "recipe", "schemes", "linears", "cache"} <= data.keys():
        raise InputError(f"{path} is no plan of this version of atom", hint)
    for what, found, name in (
        ("model", walk.source.fingerprint(), walk.source.name),
        ("recipe", recipe_fingerprint(recipe), recipe.name),
    ):
        made_for = data[what]
        if not isinstance(made_for, dict):
            raise InputError(f"{path} is damaged: its {what} is {made_for!r}", hint)
        if made_for.get("fingerprint") != found:
            raise InputError(
                f"The plan {path} was made for another {what} ({made_for.get('name')}, fingerprint "
                f"{str(made_for.get('fingerprint'))[:12]}), not for {name} ({found[:12]})",
                hint,
            )
    try:
        schemes = {name: Scheme.from_dict(scheme) for name, scheme in data["schemes"].items()}
        linears = {linear: None if name is None else schemes[name] for linear, name in data["linears"].items()}
        cache = tuple(KVFormat(**kv) for kv in data["cache"])
    except KeyError as error:
        raise InputError(f"{path} gives a linear the scheme {error}, which it does not describe", hint) from error
    except (AttributeError, TypeError, InputError, UsageError) as error:
        raise InputError(f"{path} is damaged: {error}", hint) from error
    if linears.keys() != uniform(recipe, walk).schemes.keys() or len(cache) != walk.blocks:
        raise InputError(f"{path} names other linears than {walk.source.name} has", hint)
    for index in range(walk.blocks):
        for site in walk.family.sites(walk.config, index):
            _refuse_split(index, site, walk, linears)
    return Plan(linears, cache, data.get("prediction"))


def recipe_fingerprint(recipe: Recipe) -> str:
    """SHA-256 (hex) of what a plan depends on in a recipe: everything but its name, calibration and selection."""
    resolved = recipe.resolved()
    return hashlib.sha256(json.dumps({key: resolved[key] for key in _SECTIONS}, sort_keys=True).encode()).hexdigest()


def _refuse_split(index: int, site: Site, walk: Walk, schemes: Mapping[str, Scheme | None]) -> None:
    experts = walk.family.expert_count(walk.config, index) if site.expert else 1
    names = [full_name(index, linear) for expert in range(experts) for linear in site.of_expert(expert)]
    first = names[0]
    for other in names[1:]:
        if schemes[other] != schemes[first]:
            raise UsageError(
                f"The rules give {first} {_called(schemes[first])} and {other} {_called(schemes[other])}, "
                "but they read the same input and must share one scheme",
                "Let one rule match both",
            )


def _called(scheme: Scheme | None) -> str:
    return "16 bits" if scheme is None else f"the scheme {scheme.name}"


def _refuse_idle_rules(recipe: Recipe, schemes: Mapping[str, Scheme | None]) -> None:
    for number, rule in enumerate(recipe.rules):
        outside = [name for name in OUTSIDE if rule.matches(name)]
        if outside and not rule.keep and not any(rule.matches(name) for name in schemes):
            raise UnsupportedError(f"{outside[0]} stays in 16 bits; rules.{number} gives it scheme {rule.scheme}")
        if not outside and not any(rule.matches(name) for name in schemes):
            raise UsageError(
                f"rules.{number} matches {rule.match!r}, which is no linear of this model",
                f"Linears are called like {next(iter(schemes))}",
            )
