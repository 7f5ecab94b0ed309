"""`atom bench`: speed beside what one would use instead, measured in one run."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer

from atomcli.cli.command import command
from atomcli.cli.console import console
from atomcli.cli.reports import reportable

app = typer.Typer(help="Measure speed, beside its peers.", rich_markup_mode=None)

Form = Annotated[Literal["md", "csv", "json"], typer.Option("--format", help="How the table is written.")]


@app.command("model")
@command
@reportable
def model(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of atom, or any MODEL.")],
    against: Annotated[
        str | None, typer.Option("--against", metavar="PARENT", help="The model to compare with.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="Sequences at a time; repeatable [1].")] = None,
    context: Annotated[list[int] | None, typer.Option("--context", help="Prompt tokens; repeatable [512].")] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens decoded after the prompt.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", help="Measured runs; the table shows their median.")] = 3,
    form: Form = "md",
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one).")
    ] = None,
) -> None:
    """Prefill and decode of a whole model.

    Tokens per second, time to first token, weight and KV bytes; the parent beside it with --against.
    """
    from functools import partial

    from atomcli.benchmarks.model import bench_model
    from atomcli.cli.models import check_models
    from atomcli.cli.progress import Progress

    names = [checkpoint] if against is None else [against, checkpoint]
    check_models(names, device)
    with Progress() as progress:
        rows = bench_model(
            {name: partial(_load, name, device) for name in names},
            batches=batch or [1],
            contexts=context or [512],
            new_tokens=new_tokens,
            repeats=repeats,
            progress=progress.counter("bench", "run"),
        )
    _show(rows, form)


@app.command("gemm")
@command
@reportable
def gemm(
    scheme: Annotated[
        list[str] | None, typer.Option("--scheme", help="A named scheme, such as w4a8; repeatable [w4a8].")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="OUTxIN", help="Like 4096x11008; repeatable [those of Llama 7B and 70B]."),
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", help="Rows of the input; repeatable.")] = None,
    peers: Annotated[bool, typer.Option(help="Also time what one would use instead.")] = True,
    repeats: Annotated[int, typer.Option("--repeats", help="Measured runs; the table shows their median.")] = 7,
    form: Form = "md",
) -> None:
    """The matrix product alone, on a GPU.

    Our kernels beside cuBLAS and what else is installed: time, operations and bytes per second.
    """
    from atomcli.benchmarks import gemm as bench
    from atomcli.benchmarks.shapes import BATCH_SIZES, default_shapes
    from atomcli.cli.progress import Progress
    from atomcli.errors import UsageError
    from atomcli.formats.scheme import SCHEMES

    schemes = scheme or ["w4a8"]
    for name in schemes:
        if name not in SCHEMES:
            raise UsageError(f"--scheme is {name!r}; allowed are {', '.join(SCHEMES)}")
    shapes = [_shape(text) for text in shape] if shape else default_shapes()
    with Progress() as progress:
        seen = progress.counter("bench", "case")
        rows = bench.run(shapes, tokens or BATCH_SIZES, schemes, peers=peers, repeats=repeats, progress=seen)
    _show(rows, form)


def _shape(text: str) -> tuple[int, int]:
    """OUTxIN as two numbers."""
    from atomcli.errors import UsageError

    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--shape is {text!r}; write OUTxIN, such as 4096x11008")
    return int(parts[0]), int(parts[1])


def _show(rows: Sequence[Any], form: Literal["md", "csv", "json"]) -> None:
    import json

    from atomcli.benchmarks.report import environment, render, to_json

    console.result(json.loads(to_json(rows, environment())), render(rows, form).rstrip())


def _load(name: str, device: str | None) -> Any:
    from atomcli.cli.models import open_model

    return open_model(name, device).model
