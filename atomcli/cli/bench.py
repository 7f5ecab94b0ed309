"""`atom bench`: speed and accuracy beside what one would use instead, measured in one run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from atomcli.cli import evaluate, options, serving
from atomcli.cli.command import command
from atomcli.cli.console import console
from atomcli.cli.reports import reportable

app = typer.Typer(help="Measure speed and accuracy, beside their peers.", rich_markup_mode=None)

Form = Annotated[Literal["md", "csv", "json"], typer.Option("--format", help="How the table is written.")]


Checkpoint = Annotated[
    str | None, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of atom, or any MODEL.", show_default=False)
]
Against = Annotated[str | None, typer.Option("--against", metavar="PARENT", help="The model to compare with.")]
ModelShape = Annotated[
    str | None,
    typer.Option("--shape", metavar="NAME", help="Instead of files: made-up weights of a published shape, llama-2-7b."),
]
Blocks = Annotated[int | None, typer.Option("--blocks", min=1, help="With --shape: so many blocks instead of its own.")]
W8A8 = Annotated[bool, typer.Option("--w8a8", help="Also the same shape in W8A8, with made-up weights.")]


@app.command("model")
@command
@reportable
def model(
    checkpoint: Checkpoint = None,
    against: Against = None,
    shape: ModelShape = None,
    blocks: Blocks = None,
    w8a8: W8A8 = False,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="Sequences at a time; repeatable [1].")] = None,
    context: Annotated[list[int] | None, typer.Option("--context", help="Prompt tokens; repeatable [512].")] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens decoded after the prompt.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", help="Measured prefills; the table shows their median.")] = 3,
    form: Form = "md",
    device: options.Device = None,
) -> None:
    """Prefill and decode of a whole model.

    Tokens per second, time to first token, weight and KV bytes, and how near that is to what the card can do; the
    parent beside it with --against. With --shape all of them, without any files.
    """
    from atomcli.benchmarks.model import bench_model
    from atomcli.cli.progress import Progress
    from atomcli.cli.systems import systems

    named = systems(checkpoint, against, shape, blocks, w8a8, device)
    with Progress() as progress:
        rows = bench_model(
            named,
            batches=batch or [1],
            contexts=context or [512],
            new_tokens=new_tokens,
            repeats=repeats,
            progress=progress.counter("bench", "setting"),
        )
    show(rows, form)


@app.command("capacity")
@command
@reportable
def capacity(
    checkpoint: Checkpoint = None,
    against: Against = None,
    shape: ModelShape = None,
    blocks: Blocks = None,
    w8a8: W8A8 = False,
    memory: Annotated[
        list[float] | None, typer.Option("--memory", metavar="GB", help="For weights and cache; repeatable [24].")
    ] = None,
    reserve: Annotated[
        int, typer.Option("--reserve", metavar="TOKENS", help="Kept for each sequence; 0: pages as it grows.")
    ] = 2048,
    seconds: Annotated[float, typer.Option("--seconds", help="How long each system is measured.")] = 4.0,
    form: Form = "md",
    device: options.Device = None,
) -> None:
    """Tokens per second of a server, the same memory for all.

    Requests as long as the Atom paper's (23 tokens of prompt and 995 of output on average), as many at a time as fit:
    the paper's protocol with a fixed reserve for each sequence, or pages.
    """
    from atomcli.benchmarks.capacity import bench_capacity
    from atomcli.cli.progress import Progress
    from atomcli.cli.systems import systems

    named = systems(checkpoint, against, shape, blocks, w8a8, device)
    with Progress() as progress:
        seen = progress.counter("bench", "setting")
        rows = bench_capacity(named, memory or [24.0], reserve or None, seconds=seconds, progress=seen)
    show(rows, form)


@app.command("parent")
@command
def parent(
    shape: Annotated[str, typer.Argument(metavar="SHAPE", help="Such as llama-2-7b, llama-2-70b or mixtral-8x7b.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to write [SHAPE].")
    ] = None,
    blocks: Annotated[int | None, typer.Option("--blocks", help="Fewer, or more, than the model has.")] = None,
    divide: Annotated[int, typer.Option("--divide", help="Divide hidden sizes and heads by this.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Which weights are made up.")] = 0,
) -> None:
    """A model directory of a published shape with made-up weights.

    To try a size without its download: outlier channels and massive first tokens are as trained models have them.
    """
    from atomcli.benchmarks.parents import parent_config, write_parent
    from atomcli.cli.progress import Progress

    out = output or Path(shape)
    with Progress() as progress:
        config = parent_config(shape, blocks, divide)
        write_parent(config, out, seed, progress.counter("parent", "shard"))
    console.result({"model": out, "config": config}, f"{out}: the shape of {shape}, weights made up")


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
    tune: Annotated[bool, typer.Option("--tune", help="First measure which tile is fastest, and keep it.")] = False,
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
    from atomcli.recipe_errors import did_you_mean

    schemes = scheme or ["w4a8"]
    for name in schemes:
        if name not in SCHEMES:
            raise UsageError(f"--scheme is {name!r}; allowed are {', '.join(SCHEMES)}{did_you_mean(name, SCHEMES)}")
    shapes = [_shape(text) for text in shape] if shape else default_shapes()
    with Progress() as progress:
        seen = progress.counter("bench", "case")
        rows = bench.run(
            shapes, tokens or BATCH_SIZES, schemes, peers=peers, repeats=repeats, tune_first=tune, progress=seen
        )
    show(rows, form)


@app.command("attention")
@command
@reportable
def attention(
    step: Annotated[Literal["decode", "prefill"], typer.Option("--step", help="What attends.")] = "decode",
    heads: Annotated[
        str | None,
        typer.Option("--heads", metavar="QUERY/KVxDIM", help="Like 32/8x128 [cases of Llama-2-7B and Llama-3-8B]."),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="Sequences at a time; repeatable [16].")] = None,
    context: Annotated[list[int] | None, typer.Option("--context", help="Keys of each; repeatable [1024].")] = None,
    element: Annotated[
        list[str] | None, typer.Option("--element", help="What the cache holds; repeatable [int4 int8 fp8 bf16].")
    ] = None,
    page: Annotated[int, typer.Option("--page", help="Tokens of a page: 16, 32 or 64.")] = 64,
    peers: Annotated[bool, typer.Option(help="Also time what one would use instead.")] = True,
    repeats: Annotated[int, typer.Option("--repeats", help="Measured runs; the table shows their median.")] = 7,
    form: Form = "md",
) -> None:
    """Attention on a paged cache alone, on a GPU.

    4-bit and 8-bit caches beside bf16, torch's attention and FlashAttention-3: time and bytes per second.
    """
    from atomcli.benchmarks import attention as bench
    from atomcli.cli.progress import Progress
    from atomcli.errors import UsageError

    elements = [name for name in bench.ELEMENTS if name in (element or bench.ELEMENTS)]
    for name in element or []:
        if name not in bench.ELEMENTS:
            raise UsageError(f"--element is {name!r}; allowed are {', '.join(bench.ELEMENTS)}")
    cases = None
    if heads or batch or context:
        shape = bench.parse_heads(heads) if heads else bench.LLAMA_2_7B
        cases = [(shape, b, c) for b in batch or [16] for c in context or [1024]]
    with Progress() as progress:
        seen = progress.counter("bench", "case")
        rows = bench.run(step, cases, elements, page, peers=peers, repeats=repeats, progress=seen)
    show(rows, form)


@app.command("accuracy")
@command
@reportable
def accuracy(
    model: options.Model,
    *,
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", "-r", help="Ours: a recipe by name or file, or none; repeatable [of each class]."),
    ] = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option("--checkpoint", metavar="DIR", help="Ours: a checkpoint that is there; repeatable."),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", metavar="NAME", help="One of the peers' methods, or none; repeatable [all]."),
    ] = None,
    peer_python: Annotated[
        list[str] | None,
        typer.Option("--peer-python", metavar="NAME=PATH", help="A peer's environment, or its Python; repeatable."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Where results are kept (default: MODEL-accuracy)."),
    ] = None,
    data: evaluate.Data = "demo",
    windows: Annotated[int, typer.Option("--windows", min=1, help="How many windows of the text are measured.")] = 20,
    every: Annotated[int, typer.Option("--every", min=1, help="Take every n-th window only, from the first on.")] = 1,
    window_length: evaluate.WindowLength = 2048,
    group: Annotated[int, typer.Option("--group", help="Channels that share a scale, ours and theirs.")] = 128,
    kv_cache: options.KVCache = None,
    text: options.Text,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", help="Zero-shot: a JSON lines file or a task of lm-eval; repeatable."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first so many questions of each task.")
    ] = None,
    form: Form = "md",
    device: options.Device = None,
) -> None:
    """The leaderboard: our recipes beside peers on one model.

    Every row is calibrated on the same tokens and measured on the same windows: token perplexity, KL divergence, bits.
    Results are kept row by row in DIR, and the same command continues. Peers run in environments of their own.
    """
    from atomcli.benchmarks import accuracy as bench
    from atomcli.benchmarks.peers import choose_peers, parse_pythons
    from atomcli.benchmarks.trial import Trial
    from atomcli.checkpoint.source import open_source
    from atomcli.cli.models import check_models
    from atomcli.cli.progress import Progress
    from atomcli.runtime.device import choose_device
    from atomcli.text import evaluation_windows

    calibration = bench.adapt("w4a16", group, kv_cache, text)
    recipes = {name: bench.adapt(name, group, kv_cache, text) for name in bench.choose_recipes(recipe)}
    chosen, pythons = choose_peers(peer), parse_pythons(peer_python or [])
    check_models([str(path) for path in checkpoint or []], device)
    source = open_source(model)
    console.after_interruption = "Rows that are done are kept: the same command continues"
    with Progress() as progress:
        trial = Trial(
            source=source,
            calibration=calibration,
            windows=evaluation_windows(data, source.tokenizer(), window_length, windows, every),
            out=output or options.default_output(model, "accuracy"),
            tasks=tuple(task or ()),
            limit=limit,
            group=group,
            device=str(choose_device(device)),
        )
        rows = bench.leaderboard(trial, recipes, checkpoint or [], chosen, pythons, progress)
    show(rows, form)


def _shape(text: str) -> tuple[int, int]:
    """OUTxIN as two numbers."""
    from atomcli.errors import UsageError

    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--shape is {text!r}; write OUTxIN, such as 4096x11008")
    return int(parts[0]), int(parts[1])


app.command("serve")(serving.serve)


def show(rows: Sequence[Any], form: Literal["md", "csv", "json"]) -> None:
    """The rows as the command's result."""
    import json

    from atomcli.benchmarks.report import environment, render, to_json

    console.result(json.loads(to_json(rows, environment())), render(rows, form).rstrip())
