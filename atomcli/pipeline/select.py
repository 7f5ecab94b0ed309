"""Stage 2, precision selection: which scheme each linear gets.

Today every linear gets the recipe's scheme unless a rule says otherwise. `Plan` is all that later stages see, so a
search over candidates only has to make another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from atomcli.errors import UnsupportedError, UsageError
from atomcli.formats.scheme import Scheme
from atomcli.models.block import Site
from atomcli.pipeline.model import Walk, full_name
from atomcli.recipe import Recipe

# Linears outside the blocks, which stay in 16 bits; rules may say so, but nothing else.
OUTSIDE = ("lm_head", "model.embed_tokens")


@dataclass(frozen=True)
class Plan:
    """The scheme of each linear by its name in the model; None keeps it in 16 bits."""

    schemes: Mapping[str, Scheme | None]

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


def select(recipe: Recipe, walk: Walk) -> Plan:
    """The plan that a recipe makes for a model.

    Raises UsageError for a rule that matches nothing, a scheme that doesn't fit a linear, or a rule that gives
    different schemes to linears that share their input (q/k/v, gate/up, the experts of a layer).
    """
    if recipe.select is not None:
        raise UnsupportedError("select: searching a scheme for each layer is not available", "set select: null")
    schemes: dict[str, Scheme | None] = {}
    for index in range(walk.blocks):
        for linear in walk.family.linears(walk.config, index):
            name = full_name(index, linear)
            schemes[name] = recipe.scheme_for(name, walk.in_features(index, linear))
        for site in walk.family.sites(walk.config, index):
            _refuse_split(index, site, walk, schemes)
    _refuse_idle_rules(recipe, schemes)
    return Plan(schemes)


def _refuse_split(index: int, site: Site, walk: Walk, schemes: Mapping[str, Scheme | None]) -> None:
    experts = walk.family.expert_count(walk.config, index) if site.expert else 1
    names = [full_name(index, linear) for expert in range(experts) for linear in site.of_expert(expert)]
    first = names[0]
    for other in names[1:]:
        if schemes[other] != schemes[first]:
            raise UsageError(
                f"the rules give {first} {_called(schemes[first])} and {other} {_called(schemes[other])}, "
                "but they read the same input and must share one scheme",
                "let one rule match both",
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
                f"linears are called like {next(iter(schemes))}",
            )
