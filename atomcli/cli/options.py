"""The options by which `plan`, `calibrate` and `quantize` change a recipe, each for the key of the same meaning."""

from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local directory, a GGUF file, a Hub id, or `demo` (fetched once).")
]
RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", metavar="RECIPE", help="A recipe that ships, by name, or a YAML file.")
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
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one).")]


def default_output(model: str, suffix: str) -> Path:
    """A directory here named after the model: `demo-atom-w4a4`. Llama-3.1-8B keeps its dot, a file loses .gguf."""
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
