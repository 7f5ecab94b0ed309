"""`atom quantize`: the whole compress road, from a model to a verified checkpoint."""

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from atomcli.cli import log, options
from atomcli.cli.command import command
from atomcli.cli.console import console
from atomcli.cli.reports import reportable
from atomcli.cli.together import meeting
from atomcli.errors import UsageError
from atomcli.units import byte_count, duration


@command
@reportable
def quantize(
    model: options.Model,
    *,
    recipe: options.RecipeOption = "atom-w4a4",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="Where to write (default: MODEL-RECIPE here).")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="DIR", help="What `atom calibrate` wrote.")
    ] = None,
    numbers: options.Numbers,
    text: options.Text,
    goal: options.Budget,
    plan: Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="What `atom plan -o` wrote.")] = None,
    device: options.Device = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace a finished checkpoint in OUT, drop an unfinished one of another recipe."),
    ] = False,
) -> None:
    """Compress a model into a checkpoint.

    Calibrates first when no --calibration is given. Interrupted, the same command continues where it stopped.
    """
    from atomcli.recipe import BUDGETS

    if plan is not None and (given := options.flags(**{name: goal[name] for name in BUDGETS})):
        raise UsageError(f"{given[0]} is a budget, and --plan has a scheme for every layer", "Leave one away")
    resolved = options.resolve(recipe, **numbers, **text, **goal)
    from atomcli.checkpoint.contents import is_checkpoint
    from atomcli.checkpoint.writer import refuse_occupied

    out = output or options.default_output(model, resolved.name)
    if not force:
        if is_checkpoint(out):
            raise UsageError(f"{out} holds a finished checkpoint", "Give another -o, or replace it with --force")
        refuse_occupied(out)
    log_file = log.to_file("quantize")
    from atomcli.checkpoint.source import open_source
    from atomcli.cli.progress import Progress
    from atomcli.pipeline.compress import compress

    started = time.monotonic()
    console.after_interruption = "Finished blocks are kept: the same command continues after them"
    with meeting(device) as ranks, Progress() as progress:
        report = compress(
            open_source(model),
            resolved,
            out,
            calibration=calibration,
            device=ranks.device or device,
            progress=progress,
            overwrite=force,
            plan_file=plan,
            ranks=ranks,
        )
    took = time.monotonic() - started
    _say_result(model, out, report, took)
    if log_file:
        console.note(f"log: {log_file}")


def _say_result(model: str, out: Path, report: dict[str, Any], took: float) -> None:
    """The sizes, and the three commands one wants next."""
    from atomcli.checkpoint.contents import read_contents

    contents = read_contents(out)
    next_commands = [
        shlex.join(["atom", "eval", "kld", str(out), "--against", model]),
        shlex.join(["atom", "inspect", str(out)]),
        shlex.join(["atom", "bench", "model", str(out), "--against", model]),
    ]
    document = {
        "checkpoint": out,
        "bytes": contents.bytes,
        "bits_per_weight": contents.bits_per_weight,
        "layers": len(contents.layers),
        "seconds": took,
        "report": report,
        "next": next_commands,
    }
    console.result(
        document,
        f"{out}: {len(contents.layers)} layers at {contents.bits_per_weight:.2f} bits per weight, "
        f"{byte_count(contents.bytes)} in all, verified",
    )
    if report.get("plan"):
        expected, measured = report["plan"]["kld"], report["proof"]["kld"]
        console.note(f"KLD {measured:.4f} on {report['proof']['tokens']} tokens; the plan predicted {expected:.4f}")
    console.note(f"took {duration(took)}; next:")
    for line in next_commands:
        console.note(f"  {line}")
