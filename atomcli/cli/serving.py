"""`atom bench serve`: what a checkpoint serves through vLLM, beside its peers."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from atomcli.cli import options
from atomcli.cli.command import command
from atomcli.cli.reports import reportable

if TYPE_CHECKING:
    from atomcli.benchmarks.engine import Served

Form = Annotated[Literal["md", "csv", "json"], typer.Option("--format", help="How the table is written.")]


@command
@reportable
def serve(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of atom, or any MODEL.")],
    against: Annotated[
        list[str] | None, typer.Option("--against", metavar="PARENT", help="A model to compare with; repeatable.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", metavar="'NAME=MODEL OPTIONS'", help="One with vLLM's options for it; repeatable."),
    ] = None,
    memory: Annotated[
        list[float] | None, typer.Option("--memory", metavar="GB", help="For weights and cache; repeatable.")
    ] = None,
    workload: Annotated[
        Literal["paper", "chat"], typer.Option("--workload", help="Mean prompt and output: 23 and 995, or 160 and 340.")
    ] = "paper",
    requests: Annotated[int, typer.Option("--requests", help="How many requests are drawn.")] = 640,
    scale: Annotated[float, typer.Option("--scale", help="Every length times this, for small machines.")] = 1.0,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", help="Requests in flight (default: all at once).")
    ] = None,
    rate: Annotated[float | None, typer.Option("--rate", help="Requests sent per second (default: at once).")] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="End a run after them (default: when all are answered).")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Measured runs; the table shows their median.")] = 1,
    seed: options.Seed = None,
    engine_options: Annotated[str, typer.Option("--engine-options", help="Options of vLLM for every model.")] = "",
    python: Annotated[str | None, typer.Option("--python", help="The Python that has vLLM [this one].")] = None,
    form: Form = "md",
) -> None:
    """Serve through vLLM under a memory budget, beside its peers.

    Each model is started in turn on loopback and given the same requests: tokens and requests per second, time to the
    first token and per token, the batch it reached, and the tokens that its cache holds.
    """
    import shlex
    import sys

    from atomcli.benchmarks import engine, workloads
    from atomcli.cli.bench import show
    from atomcli.cli.progress import Progress

    systems = [engine.Served(name, name) for name in against or []]
    systems += [_peer(text) for text in peer or []] + [engine.Served(checkpoint, checkpoint)]
    setting = engine.Setting(
        workloads.draw(workload, requests, scale=scale, seed=seed or 0),
        workload,
        concurrency,
        rate,
        repeats,
        seed or 0,
        tuple(shlex.split(engine_options)),
        python or sys.executable,
        seconds=seconds,
    )
    with Progress() as progress:
        budgets: list[float | None] = [*memory] if memory else [None]
        rows = engine.bench_engine(systems, budgets, setting, progress.counter("bench", "model"))
    show(rows, form)


def _peer(text: str) -> "Served":
    """NAME=MODEL and options of vLLM."""
    import shlex

    from atomcli.benchmarks.engine import Served
    from atomcli.errors import UsageError

    name, _, rest = text.partition("=")
    words = shlex.split(rest)
    if not name or not words:
        raise UsageError(f"--peer is {text!r}; write 'NAME=MODEL OPTIONS', such as 'fp8=./parent --kv-cache-dtype fp8'")
    return Served(name, words[0], tuple(words[1:]))
