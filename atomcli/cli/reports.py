"""`--report FILE.html` and `--figures DIR`: what a command measured as a page, and its plots as files."""

import functools
import inspect
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from atomcli.cli.console import console
from atomcli.errors import RunError, ThresholdError, UsageError

Report = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.html", help="Also write a self-contained page of the result.")
]
Figures = Annotated[
    Path | None, typer.Option("--figures", metavar="DIR", help="Also write the plots as SVG and PNG files.")
]


def reportable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --report and --figures to a command. A gate that was not met has its page too: CI wants to look at it."""
    signature = inspect.signature(function, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in (("report", Report), ("figures", Figures))
    ]

    @functools.wraps(function)
    def run(*, report: Path | None, figures: Path | None, **arguments: Any) -> None:
        if report is None and figures is None:
            function(**arguments)
            return
        _refuse(report, figures)
        try:
            function(**arguments)
        except ThresholdError as error:
            _write(report, figures, console.document | {"error": {"what": error.what}})
            raise
        _write(report, figures, console.document)

    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[attr-defined]
    return run


def _refuse(report: Path | None, figures: Path | None) -> None:
    """UsageError, before anything is spent, where a page or its plots couldn't be written at the end."""
    from importlib.util import find_spec

    for library in ("jinja2", "matplotlib"):
        if find_spec(library) is None:
            raise UsageError(f"A report needs {library}", "Install it with `pip install 'atomcli[report]'`.")
    if report is not None:
        if report.suffix.lower() not in (".html", ".htm"):
            raise UsageError(
                f"--report writes HTML, and {report} is named otherwise", f"Try {report.with_suffix('.html')}"
            )
        if report.is_dir() or not report.resolve().parent.is_dir():
            raise UsageError(f"--report can't be written to {report}", "Name a file in a directory that exists")
    if figures is not None and figures.exists() and not figures.is_dir():
        raise UsageError(f"--figures {figures} is a file", "Name a directory")


def _write(report: Path | None, figures: Path | None, document: dict[str, Any]) -> None:
    from atomcli.reporting.document import sections_of
    from atomcli.reporting.page import page, save_figures
    from atomcli.version import __version__

    sections = sections_of(document)
    try:
        if report is not None:
            report.write_text(page(_title(), f"atom {__version__}", sections), encoding="utf-8")
            console.note(f"report: {report}")
        if figures is not None:
            count = len(save_figures(sections, figures))
            console.note(f"figures: {count} files in {figures}")
    except OSError as error:
        raise RunError(f"The report can't be written: {error.filename}: {error.strerror}") from error


def _title() -> str:
    """The command line without the options that only say where the page goes."""
    words = shlex.split(console.command_line)
    for option in ("--report", "--figures"):
        while option in words:
            del words[words.index(option) : words.index(option) + 2]
    return shlex.join(word for word in words if not word.startswith(("--report=", "--figures=")))
