"""`atom bench`: speed beside what one would use instead, measured in one run."""

from typing import Annotated, Any, Literal

import typer

from atomcli.cli.command import command
from atomcli.cli.console import console

app = typer.Typer(help="Measure speed, beside the parent.", rich_markup_mode=None)


@app.callback()
def bench() -> None:
    """Measure speed, beside the parent."""


@app.command("model")
@command
def model(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of atom, or any MODEL.")],
    against: Annotated[
        str | None, typer.Option("--against", metavar="PARENT", help="The model to compare with.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="Sequences at a time; repeatable [1].")] = None,
    context: Annotated[list[int] | None, typer.Option("--context", help="Prompt tokens; repeatable [512].")] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens decoded after the prompt.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", help="Measured runs; the table shows their median.")] = 3,
    form: Annotated[Literal["md", "csv", "json"], typer.Option("--format", help="How the table is written.")] = "md",
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one).")
    ] = None,
) -> None:
    """Prefill and decode of a whole model.

    Tokens per second, time to first token, weight and KV bytes; the parent beside it with --against.
    """
    import json
    from functools import partial

    from atomcli.benchmarks.model import bench_model
    from atomcli.benchmarks.report import environment, render, to_json
    from atomcli.cli.progress import Progress

    names = [checkpoint] if against is None else [against, checkpoint]
    with Progress() as progress:
        rows = bench_model(
            {name: partial(_load, name, device) for name in names},
            batches=batch or [1],
            contexts=context or [512],
            new_tokens=new_tokens,
            repeats=repeats,
            progress=progress.counter("bench", "run"),
        )
    console.result(json.loads(to_json(rows, environment())), render(rows, form).rstrip())


def _load(name: str, device: str | None) -> Any:
    from atomcli.cli.models import open_model

    return open_model(name, device).model
