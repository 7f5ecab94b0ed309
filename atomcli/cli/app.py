"""`atom`: the commands, and how a command line that can't be read is answered."""

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from atomcli.cli import bench, calibrate, doctor, evaluate, export, inspect, plan, quantize, recipes
from atomcli.cli.command import AsJson, Debug, NoColor, Quiet, configure
from atomcli.cli.console import console
from atomcli.errors import RunError
from atomcli.version import __version__


class Journey(TyperGroup):
    """Lists the commands in the order in which one needs them."""

    def list_commands(self, context: Any) -> list[str]:
        order = ["plan", "quantize", "calibrate", "eval", "bench", "inspect", "export", "recipes", "doctor"]
        return sorted(super().list_commands(context), key=order.index)


app = typer.Typer(
    name="atom",
    cls=Journey,
    help="Compress a large language model to 4-bit weights, activations and KV cache, and prove that it did.",
    epilog="MODEL is a local directory, a GGUF file, a Hub id, or `demo`. Exit codes: 0 done, 1 failed or a threshold "
    "not met, 2 wrong command or recipe, 130 interrupted (the same command resumes).",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
)
app.command("calibrate")(calibrate.calibrate)
app.command("plan")(plan.plan)
app.command("quantize")(quantize.quantize)
app.add_typer(evaluate.app, name="eval")
app.add_typer(bench.app, name="bench")
app.command("inspect")(inspect.inspect)
app.command("export")(export.export)
app.add_typer(recipes.app, name="recipes")
app.command("doctor")(doctor.doctor)


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
    debug: Debug = False,
) -> None:
    configure(as_json=as_json, quiet=quiet, no_color=no_color, debug=debug)
    if version:
        console.result({"version": __version__}, f"atom {__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        console.result({"help": context.get_help()}, context.get_help())
        raise typer.Exit(0)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: runs the command line and ends the process with its exit code."""
    # Of several processes the one that fails says why; torch's own words about lost connections would drown it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # What a scheduler sends before it kills is an interruption like Ctrl-C: said, and resumable.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line, prints the document of --json, and answers the exit code."""
    console.command_line = shlex.join(["atom", *arguments])
    code = _run(arguments)
    try:
        console.finish()
    except BrokenPipeError:
        console.let_go()
    except RunError as error:
        console.error(error.what, error.hint, type(error).__name__)
        return error.exit_code
    return code


def _run(arguments: Sequence[str]) -> int:
    command = typer.main.get_command(app)
    try:
        return command.main(list(arguments), prog_name="atom", standalone_mode=False) or 0
    except TyperException as error:
        console.json |= "--json" in arguments
        message = error.format_message().replace("Value error, ", "")
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "atom"
        console.error(message[:1].upper() + message[1:], f"`{path} --help` lists what it takes", kind="UsageError")
        return error.exit_code
    except typer.Abort:
        console.error("Interrupted", kind="Interrupted")
        return 130
