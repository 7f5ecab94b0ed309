"""What every command shares: the options --json, --quiet, --no-color and --debug, and how it ends."""

import functools
import inspect
import logging
import os
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from atomcli.cli import log, options
from atomcli.cli.console import console
from atomcli.errors import AtomError

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes, only the result.")]
NoColor = Annotated[bool, typer.Option("--no-color", help="No colors (so does the variable NO_COLOR).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show all log lines, and the traceback of an error.")]
_COMMON = {"as_json": AsJson, "quiet": Quiet, "no_color": NoColor, "debug": Debug}


def configure(*, as_json: bool, quiet: bool, no_color: bool, debug: bool) -> None:
    """Turns the common options into the console's manner; before or after the command's name they count alike."""
    console.json |= as_json
    console.quiet |= quiet
    console.debug |= debug
    console.color &= not (no_color or os.environ.get("NO_COLOR"))


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a typer command of `function`: adds the common options and turns every failure into its exit code."""
    function = options.expand(function)
    signature = inspect.signature(function)
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in _COMMON.items()
    ]
    parameters = [*signature.parameters.values(), *common]

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        configure(**{name: arguments.pop(name) for name in _COMMON})
        with log.on_screen():
            _with_exit_code(lambda: function(**arguments))

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _with_exit_code(work: Callable[[], Any]) -> None:
    """Runs `work`; an error becomes one sentence and its exit code: 1 failed, 2 wrong command, 130 interrupted."""
    try:
        work()
    except typer.Exit:
        raise
    except AtomError as error:
        _keep_traceback()
        console.error(error.what, error.hint, type(error).__name__)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        console.error("Interrupted", console.after_interruption, "Interrupted")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        console.let_go()
        raise typer.Exit(0) from None
    except Exception as error:
        _keep_traceback()
        path = None if console.debug else log.new_file("crash", traceback.format_exc())
        where = f"the traceback is in {path}" if path else "--debug shows the traceback"
        what = (str(error).strip().splitlines() or ["no message"])[0]
        console.error(f"{type(error).__name__}: {what}", f"atom did not expect this; {where}", "Unexpected")
        raise typer.Exit(1) from None


def _keep_traceback() -> None:
    """The traceback goes to the log, and to the screen with --debug."""
    logging.getLogger("atomcli").debug("failed", exc_info=True)
    if console.debug:
        console.note(traceback.format_exc().rstrip())
