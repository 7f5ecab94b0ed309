"""The options by which commands change a recipe, each for the key of the same meaning, and the sets they come in.

A command that takes a set has one parameter for it: `numbers: options.Numbers` becomes --bits, --group, … in the help,
and the function gets what was given as one dictionary.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local directory, a GGUF file, a Hub id, or `demo` (fetched once).")
]


def _recipe_names(incomplete: str) -> list[str]:
    """What the shell completes a recipe's name to."""
    from atomcli.resources import resource_directory

    names = sorted(path.stem for path in resource_directory("recipes").glob("*.yaml"))
    return [name for name in names if name.startswith(incomplete)]


# The most accurate of the 4-bit schemes that were measured, and on Hopper as fast as any (docs/accuracy.md).
DEFAULT_RECIPE = "atom-w4a8"

RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        metavar="RECIPE",
        help="A recipe that ships, by name, or a YAML file.",
        autocompletion=_recipe_names,
    ),
]
Bits = Annotated[int | None, typer.Option("--bits", help="Bits of weights and activations: 4 or 8.")]
Group = Annotated[int | None, typer.Option("--group", help="Channels that share a scale: 16, 32, 64, 128 or 256.")]
Outliers = Annotated[int | None, typer.Option("--outliers", help="Input channels kept in 8 bits.")]
KVCache = Annotated[str | None, typer.Option("--kv-cache", help="Keys and values in int4, int8 or none (16 bits).")]
Rounding = Annotated[str | None, typer.Option("--rounding", help="gptq, or rtn (round to nearest).")]
Clip = Annotated[str | None, typer.Option("--clip", help="Weight clip ratio between 0.1 and 1, or search.")]
Transform = Annotated[
    str | None, typer.Option("--transform", help="none, or hadamard (each group of channels is rotated).")
]
Dataset = Annotated[
    str | None, typer.Option("--dataset", metavar="TEXT", help="Text to calibrate on: `demo`, a file, or a Hub id.")
]
Samples = Annotated[int | None, typer.Option("--samples", help="Calibration sequences (the recipes say 128).")]
SequenceLength = Annotated[int | None, typer.Option("--sequence-length", help="Tokens in each of them.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Which sequences are drawn.")]
BitsPerWeight = Annotated[
    float | None,
    typer.Option("--bits-per-weight", metavar="BITS", help="Budget: stored bits per weight of the blocks."),
]
Memory = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="Budget: size of the checkpoint, such as 10GiB.")
]
MaxKLD = Annotated[
    float | None, typer.Option("--max-kld", metavar="NATS", help="Budget: predicted KL divergence; fewest bytes.")
]
Latency = Annotated[
    float | None, typer.Option("--latency", metavar="MICROSECONDS", help="Budget: all products together, by --costs.")
]
Costs = Annotated[
    str | None, typer.Option("--costs", metavar="FILE", help="Times of products, by `atom bench gemm --json`.")
]
Candidates = Annotated[
    list[str] | None,
    typer.Option("--candidate", metavar="SCHEME", help="What a budget may choose (repeat it): w4a8, w4a8-o64, w16a16."),
]
Push = Annotated[
    str | None,
    typer.Option("--push", metavar="OWNER/NAME", help="Upload the result to the Hugging Face Hub (private at first)."),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one).")]


@dataclass(frozen=True)
class Several:
    """In the annotation of a parameter: the options, by the names of their values, that stand in its place."""

    options: dict[str, Any]


Numbers = Annotated[
    dict[str, Any],
    Several(
        {
            "bits": Bits,
            "group": Group,
            "outliers": Outliers,
            "kv_cache": KVCache,
            "rounding": Rounding,
            "clip": Clip,
            "transform": Transform,
        }
    ),
]
Text = Annotated[
    dict[str, Any],
    Several({"dataset": Dataset, "samples": Samples, "sequence_length": SequenceLength, "seed": Seed}),
]
Budget = Annotated[
    dict[str, Any],
    Several(
        {
            "bits_per_weight": BitsPerWeight,
            "memory": Memory,
            "max_kld": MaxKLD,
            "latency": Latency,
            "costs": Costs,
            "candidates": Candidates,
        }
    ),
]


def expand(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with every parameter that stands for several options replaced by them, each None by default."""
    signature = inspect.signature(function, eval_str=True)
    sets: dict[str, dict[str, Any]] = {}
    parameters = []
    for parameter in signature.parameters.values():
        given = [each for each in get_args(parameter.annotation)[1:] if isinstance(each, Several)]
        if given:
            sets[parameter.name] = given[0].options
        for name, annotation in given[0].options.items() if given else ():
            parameters.append(parameter.replace(name=name, annotation=annotation, default=None))
        if not given:
            parameters.append(parameter)

    @functools.wraps(function)
    def run(**arguments: Any) -> Any:
        collected = {key: {name: arguments.pop(name) for name in options} for key, options in sets.items()}
        return function(**arguments, **collected)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def default_output(model: str, suffix: str) -> Path:
    """A directory here named after the model: `demo-atom-w4a8`. Llama-3.1-8B keeps its dot, a file loses .gguf."""
    path = Path(model).expanduser()
    name = path.resolve().name if path.is_dir() else path.name.removesuffix(".gguf")
    return Path(f"{name or 'model'}-{suffix}")


def resolve(recipe: str, **changes: Any) -> Any:
    """The recipe with the command line's values in place of its own, and a note for what was changed."""
    from atomcli.cli.console import console
    from atomcli.overrides import override
    from atomcli.recipe import load_recipe

    loaded = load_recipe(recipe)
    if isinstance(clip := changes.get("clip"), str):
        changes["clip"] = _number(clip)
    resolved = override(loaded, **changes)
    before, after = _flat(loaded.resolved()), _flat(resolved.resolved())
    same = before.keys() & after.keys() - {"select"}
    changed = [
        f"{key} {after[key]} (recipe: {before[key]})" for key in after if key in same and before[key] != after[key]
    ]
    if resolved.select is not None and resolved.select != loaded.select:
        name, budget = resolved.select.budget
        changed.append(f"select.{name} {budget:g}")
    console.note(f"recipe {loaded.name}" + (f" with {', '.join(changed)}" if changed else ""))
    return resolved


def flags(**values: Any) -> list[str]:
    """The words of a command line that give these values to the options of the same names; None is left out."""
    given = {f"--{name.replace('_', '-')}": str(value) for name, value in values.items() if value is not None}
    return [word for option in given.items() for word in option]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
