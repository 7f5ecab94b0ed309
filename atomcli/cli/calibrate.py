"""`atom calibrate`: what a model's inputs look like, once, for many recipes."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from atomcli.cli import log, options
from atomcli.cli.command import command
from atomcli.cli.console import console
from atomcli.cli.together import meeting


@command
def calibrate(
    model: options.Model,
    *,
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to write (default: MODEL-calibration).")
    ] = None,
    text: options.Text,
    device: options.Device = None,
) -> None:
    """Save a model's statistics for later runs.

    Text is streamed through MODEL once; `atom quantize --calibration DIR` then starts from the result.
    """
    resolved = options.resolve(recipe, **text)
    out = output or options.default_output(model, "calibration")
    log.to_file("calibrate")
    from atomcli.checkpoint.source import open_source
    from atomcli.checkpoint.writer import refuse_occupied
    from atomcli.cli.progress import Progress
    from atomcli.pipeline.calibrate import SETTINGS
    from atomcli.pipeline.calibrate import calibrate as run

    if not (out / SETTINGS).is_file():  # a finished artifact is compared with what is asked for
        refuse_occupied(out)
    console.after_interruption = "The same command resumes"
    with meeting(device) as ranks, Progress() as progress:
        run(open_source(model), resolved, out, device=ranks.device or device, progress=progress, ranks=ranks)
    console.result({"model": model, "calibration": out}, f"calibration of {model} in {out}")
    same = options.flags(recipe=recipe, **text, calibration=out)
    console.note(f"next: {shlex.join(['atom', 'quantize', model, *same])}")
