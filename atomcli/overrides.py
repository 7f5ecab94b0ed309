"""The command line's values in a recipe: what a flag changes, and where it would change nothing."""

from typing import Any

from atomcli.errors import UsageError
from atomcli.formats.scheme import GROUPS
from atomcli.recipe import Recipe, parse_recipe


def override(
    recipe: Recipe,
    *,
    bits: int | None = None,
    group: int | None = None,
    outliers: int | None = None,
    kv_cache: str | None = None,
    rounding: str | None = None,
    clip: float | str | None = None,
    transform: str | None = None,
    dataset: str | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int | None = None,
    bits_per_weight: float | None = None,
    memory: str | None = None,
    max_kld: float | None = None,
    latency: float | None = None,
    costs: str | None = None,
    candidates: list[str] | None = None,
) -> Recipe:
    """The recipe with the given command-line values in place of its own; None leaves a key alone.

    `bits` sets the formats of weights and activations to int4 or int8, unclipped, except where a format is `none` or
    already has that many bits. Raises UsageError as `load_recipe` does.
    """
    data = recipe.model_dump(mode="json")
    if bits is not None:
        if bits not in (4, 8):
            raise UsageError(f"--bits is {bits}; allowed are 4 and 8", "See `atom recipes list` for other formats")
        for section in ("weights", "activations"):
            current = data[section]["format"]
            if current != "none" and (8 if current == "int8" else 4) != bits:
                # A clip ratio that pays with 16 values costs accuracy with 256, and the other way round.
                data[section] |= {"format": f"int{bits}", "scale": "absmax", "clip": 1.0}
                data[section]["group"] = data[section]["group"] or 128
                if section == "activations" and bits == 8:
                    data[section]["symmetric"] = True
    if group is not None:
        if group not in GROUPS:
            raise UsageError(f"--group is {group}; allowed are {', '.join(map(str, GROUPS))}")
        grouped = [section for section in ("weights", "activations") if data[section]["group"] is not None]
        if not grouped:
            raise UsageError(
                f"--group is {group}, but the recipe {recipe.name} has one scale for all channels",
                "Leave it away, or choose another of `atom recipes list`",
            )
        for section in grouped:
            data[section]["group"] = group
    changes: dict[str, dict[str, Any]] = {
        "outliers": {"channels": outliers},
        "kv_cache": {"format": kv_cache},
        "weights": {"rounding": rounding, "clip": clip},
        "calibration": {"dataset": dataset, "samples": samples, "sequence_length": sequence_length, "seed": seed},
    }
    for section, values in changes.items():
        data[section] |= {key: value for key, value in values.items() if value is not None}
    if transform is not None:
        data["transform"] = transform
    budget = {"bits_per_weight": bits_per_weight, "memory": memory, "max_kld": max_kld, "latency": latency}
    if any(value is not None for value in budget.values()):
        data["select"] = (data["select"] or {}) | budget  # one budget takes the place of the recipe's
    more = {key: value for key, value in (("costs", costs), ("candidates", candidates)) if value}
    if more:
        if data["select"] is None:
            raise UsageError(
                f"--{'costs' if costs else 'candidate'} needs a budget",
                "Give one of --bits-per-weight, --memory, --max-kld and --latency",
            )
        data["select"] |= more
    return parse_recipe(data, "The recipe with the command-line options")
