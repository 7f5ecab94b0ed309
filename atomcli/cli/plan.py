"""`atom plan`: which scheme each layer would get, what the model would weigh and lose, before it is made."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atomcli.cli import log, options
from atomcli.cli.command import command
from atomcli.cli.console import Table, console
from atomcli.errors import UsageError
from atomcli.units import byte_count, duration

if TYPE_CHECKING:
    from atomcli.pipeline.budget import Point
    from atomcli.pipeline.select import Group, Plan


@command
def plan(
    model: options.Model,
    *,
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Save the plan for `atom quantize --plan`.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="DIR", help="What `atom calibrate` wrote; sensitivities are kept there."),
    ] = None,
    goal: options.Budget,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="PNG", help="Draw the frontier (needs matplotlib).")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Try a few blocks: memory and time of the whole run.")
    ] = False,
    numbers: options.Numbers,
    text: options.Text,
    device: options.Device = None,
) -> None:
    """Show what a recipe or a budget would make of a model.

    With a budget, sensitivities are measured on calibration text and kept, so that the next plan is free. Without a
    budget and without --calibration only sizes are shown.
    """
    resolved = options.resolve(recipe, **numbers, **text, **goal)
    if plot is not None:
        if resolved.select is None and calibration is None:
            raise UsageError(
                "--plot draws the frontier, which needs sensitivities", "Give a budget or --calibration DIR"
            )
        _refuse_without_matplotlib()
    log.to_file("plan")
    from atomcli.checkpoint.source import open_source
    from atomcli.pipeline import budget
    from atomcli.pipeline.calibrate import open_calibration
    from atomcli.pipeline.model import start_walk
    from atomcli.pipeline.select import groups_of, save_plan, select, uniform

    source = open_source(model)
    walk = start_walk(source, device)
    if calibration is not None:
        open_calibration(calibration, source)  # a mistyped name is no reason to calibrate
    elif resolved.select is not None:
        calibration = options.default_output(model, "calibration")
    groups = groups_of(resolved, walk)
    budget.refuse_out_of_reach(resolved, walk, groups)
    points: list[Point] = []
    if calibration is None:
        made = uniform(resolved, walk)
        size, bits_now = budget.plan_bytes(walk, groups, made, resolved.transform_seed is not None)
        prediction: dict[str, Any] = {"bytes": size, "bits_per_weight": bits_now, "kld": None}
    else:
        found = _sensitivities(walk, resolved, calibration, groups)
        if resolved.select is not None:
            made = select(resolved, walk, found)
        else:
            cache = budget.choose_cache(resolved, walk, found)
            sizes = budget.sizes_of(walk, groups, resolved.transform_seed is not None, cache.formats)
            made = budget.plan_of(walk, groups, [0] * len(groups), sizes, found, cache)
        prediction = dict(made.prediction or {})
        points = budget.frontier_of(resolved, walk, groups, found)
    if output is not None:
        save_plan(made, resolved, walk, output)
    if plot is not None:
        _draw(points, prediction, plot)
    tokens = resolved.select.tokens if resolved.select is not None else 0
    _say(model, made, groups, prediction, points, tokens)
    if measure:
        _say_forecast(source, resolved, walk.device)
    if output is not None:
        same = options.flags(
            recipe=recipe,
            **numbers,
            calibration=calibration,
            plan=output,
        )
        console.note(f"next: {shlex.join(['atom', 'quantize', model, *same])}")


def _sensitivities(walk: Any, recipe: Any, directory: Path, groups: Sequence["Group"]) -> Any:
    """From the artifact in `directory`, which is made when it isn't there."""
    from atomcli.cli.progress import Progress
    from atomcli.pipeline.calibrate import SETTINGS, calibrate, open_calibration
    from atomcli.pipeline.sensitivities import sensitivities_of

    console.after_interruption = "The same command resumes the calibration"
    with Progress() as progress:
        if (directory / SETTINGS).is_file():
            artifact = open_calibration(directory, walk.source)
            if artifact.identity["calibration"] != recipe.calibration.model_dump(mode="json"):
                console.warn(f"the text that {directory} was made with counts, not the recipe's")
        else:
            artifact = calibrate(walk.source, recipe, directory, device=walk.device, progress=progress)
            console.note(f"calibration in {directory}: --calibration {directory} uses it again")
        return sensitivities_of(walk, recipe, artifact, groups, progress)


def _say_forecast(source: Any, recipe: Any, device: Any) -> None:
    """What the run takes, tried on a few blocks in the current directory, where it would write."""
    from atomcli.pipeline.forecast import forecast

    console.note("trying a few blocks")
    found = forecast(source, recipe, Path(), device)
    table = Table(["what the run takes", ">"])
    table.add("time", f"{duration(found.seconds)} ({found.seconds_per_block:.1f} s a block)")
    table.add("host memory", byte_count(found.host_bytes))
    if found.gpu_bytes is not None:
        table.add("GPU memory", byte_count(found.gpu_bytes))
    table.add("disk", byte_count(found.disk_bytes))
    console.result({"run": vars(found)}, "", table)


def _say(
    model: str,
    made: "Plan",
    groups: Sequence["Group"],
    prediction: dict[str, Any],
    points: Sequence["Point"],
    tokens: int,
) -> None:
    """Print a plan; `tokens` is how many the times of its products are for."""
    from atomcli.pipeline.model import full_name

    names = made.names()

    def called(group: "Group") -> str:
        scheme = made.schemes[full_name(group.index, group.linears[0])]
        return "16 bits" if scheme is None else names[scheme]

    blocks: dict[tuple[str, str], list[int]] = {}
    for group in groups:
        blocks.setdefault((group.name, called(group)), []).append(group.index)
    table = Table(["linears", "scheme", ">count", "blocks"])
    for (linears, scheme), indices in sorted(blocks.items(), key=lambda item: (_ORDER.index(item[0][0]), item[0][1])):
        table.add(linears, scheme, len(indices), _ranges(indices))
    parts: list[str | Table] = [
        table,
        "",
        f"bits per weight  {prediction['bits_per_weight']:.3f}",
        f"bytes            {byte_count(prediction['bytes'])}",
    ]
    if prediction["kld"] is not None:
        parts.append(f"predicted KLD    {prediction['kld']:.4f} nats")
    timed = prediction.get("microseconds") is not None
    if timed:
        parts.append(f"time             {prediction['microseconds']:.1f} µs of products at {tokens} tokens")
    if points:
        curve = Table([">bits/weight", ">bytes", ">predicted KLD", *([">µs"] if timed else [])])
        for point in points:
            time = [] if point.microseconds is None else [f"{point.microseconds:.1f}"]
            curve.add(f"{point.bits_per_weight:.3f}", byte_count(point.bytes), f"{point.kld:.4f}", *time)
        parts += ["", "the best that each size allows:", curve]
    document = {
        "model": model,
        **prediction,
        "linears": {name: None if scheme is None else names[scheme] for name, scheme in made.schemes.items()},
        "frontier": [vars(point) for point in points],
    }
    console.result(document, *parts)


_ORDER = ("qkv", "o", "gate_up", "down", "experts")


def _ranges(indices: Sequence[int]) -> str:
    """Blocks in short: `0–3, 7, 9–11`."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _refuse_without_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UsageError(
            "--plot needs matplotlib, which is not installed", "Install it with `pip install 'atomcli[report]'`"
        )


def _draw(points: Sequence["Point"], prediction: dict[str, Any], path: Path) -> None:
    """The frontier and the plan on it, KLD over bits per weight."""
    from matplotlib.figure import Figure

    from atomcli.errors import RunError

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([p.bits_per_weight for p in points], [p.kld for p in points], marker=".", label="the best at each size")
    axes.plot(prediction["bits_per_weight"], prediction["kld"], marker="o", linestyle="none", label="this plan")
    axes.set(xlabel="stored bits per weight", ylabel="predicted KL divergence (nats)")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be written: {error}") from error
    console.note(f"plot: {path}")
