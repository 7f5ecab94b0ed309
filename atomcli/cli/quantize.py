"""`atom quantize`: the whole compress road, from a model to a verified checkpoint."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atomcli.cli import log, options
from atomcli.cli.command import command
from atomcli.cli.console import console
from atomcli.cli.reports import reportable
from atomcli.cli.together import meeting
from atomcli.errors import UsageError
from atomcli.units import byte_count, duration

if TYPE_CHECKING:
    from atomcli.recipe import Recipe


@command
@reportable
def quantize(
    model: options.Model,
    *,
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
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
    push: options.Push = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what would be made, write nothing.")
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
    if push is not None:
        from atomcli.checkpoint.upload import check_destination

        check_destination(push)
    if dry_run:
        _say_intent(model, resolved, out, calibration, plan, device, push)
        return
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
    if push is not None:
        pushed(out, push)
    if log_file:
        console.note(f"log: {log_file}")


def pushed(path: Path, repository: str) -> None:
    """Uploads what was made, and says where it is now."""
    from atomcli.checkpoint.upload import push

    console.after_interruption = f"{path} is finished; `hf upload {repository} {path}` uploads what is missing"
    page = push(path, repository, bars=console.live)
    console.result({"pushed": page}, f"pushed to {page} (private)")


def _say_intent(
    model: str,
    recipe: "Recipe",
    out: Path,
    calibration: Path | None,
    plan_file: Path | None,
    device: str | None,
    push: str | None,
) -> None:
    """What a run would make, after every check that needs no weights."""
    from collections import Counter

    from atomcli.checkpoint.source import open_source
    from atomcli.pipeline import budget
    from atomcli.pipeline.calibrate import open_calibration
    from atomcli.pipeline.model import start_walk
    from atomcli.pipeline.select import groups_of, load_plan, uniform

    source = open_source(model)
    walk = start_walk(source, device)
    if calibration is not None:
        open_calibration(calibration, source)
    groups = groups_of(recipe, walk)
    budget.refuse_out_of_reach(recipe, walk, groups)
    document: dict[str, Any] = {"dry_run": True, "model": model, "checkpoint": out, "blocks": walk.blocks, "push": push}
    lines = [f"{model}: {walk.config.architectures[0]}, {walk.blocks} blocks, on {walk.device}"]
    if recipe.select is not None and plan_file is None:
        name, value = recipe.select.budget
        lines.append(f"a scheme for each layer within {name} {value:g}; `atom plan` measures and shows which")
    else:
        made = uniform(recipe, walk) if plan_file is None else load_plan(plan_file, recipe, walk)
        size, bits = budget.plan_bytes(walk, groups, made, recipe.transform_seed is not None)
        names = made.names()
        counts = Counter("16 bits" if scheme is None else names[scheme] for scheme in made.schemes.values())
        document |= {"schemes": counts, "bytes": size, "bits_per_weight": bits}
        lines += [f"{count} linears in {name}" for name, count in counts.items()]
        lines.append(f"{byte_count(size)} in all, {bits:.2f} bits per weight in the quantized layers")
    cache = recipe.kv_cache.format
    text = recipe.calibration
    lines.append(f"KV cache {'in 16 bits' if cache == 'none' else f'in {cache}'}")
    if calibration is None:
        lines.append(f"calibrated on {text.samples} sequences of {text.sequence_length} tokens of {text.dataset}")
    else:
        lines.append(f"calibrated by {calibration}")
    console.result(document, *lines, f"would be written to {out}" + (f" and pushed to {push}" if push else ""))


def _say_result(model: str, out: Path, report: dict[str, Any], took: float) -> None:
    """The sizes, and the three commands one wants next."""
    from atomcli.checkpoint.contents import read_contents

    contents = read_contents(out)
    plain = report["recipe"].get("order") == "natural"
    next_commands = [
        shlex.join(["atom", "eval", "kld", str(out), "--against", model]),
        shlex.join(["atom", "bench", "model", str(out), "--against", model]),
        shlex.join(
            ["atom", "export", str(out), "--to", "compressed-tensors"] if plain else ["vllm", "serve", str(out)]
        ),
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
