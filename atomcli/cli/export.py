"""`atom export`: a checkpoint in a format that other engines read."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from atomcli.cli import options
from atomcli.cli.command import command
from atomcli.cli.console import Table, console
from atomcli.cli.quantize import pushed
from atomcli.units import byte_count

_WINDOWS, _WINDOW_LENGTH = 4, 512


@command
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A directory that `atom quantize` wrote.")],
    to: Annotated[
        Literal["compressed-tensors", "gguf"],
        typer.Option("--to", help="compressed-tensors (transformers, vLLM, SGLang) or gguf (llama.cpp)."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="Where to write (default: CHECKPOINT-ct here).")
    ] = None,
    trade: Annotated[
        list[str] | None,
        typer.Option(
            "--trade",
            metavar="WHAT=FOR",
            help="Give up what the format can't hold (repeat it): outliers=requantize, activations=nearest, …",
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="PARENT", help="Measure the distance from this model, too.")
    ] = None,
    data: Annotated[
        str, typer.Option("--data", metavar="TEXT", help="What a trade is measured on: `demo`, a file, or a Hub id.")
    ] = "demo",
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows of 512 tokens of it.")] = _WINDOWS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written and traded, write nothing.")] = (
        False
    ),
    push: options.Push = None,
) -> None:
    """Write a checkpoint for other engines.

    Without loss where the format allows it; what it can't hold is refused, or traded by --trade and measured.
    """
    from atomcli.checkpoint.writer import refuse_occupied
    from atomcli.cli.progress import Progress
    from atomcli.integrations.portable import parse_trades
    from atomcli.integrations.reading import Reading

    trades = parse_trades(trade or ())
    out = output or _default_output(checkpoint, to)
    refuse_occupied(out)
    target: Any = import_module(f"atomcli.integrations.{to.replace('-', '_')}.export")
    if push is not None:
        from atomcli.checkpoint.upload import check_destination

        check_destination(push)
    reading = Reading(checkpoint)
    route = target.plan_route(reading, trades)
    counts = route.counts(target.name_of)
    table = Table([to, ">linears"])
    for name, count in counts.items():
        table.add(name, count)
    traded = {obstacle.what: trades[obstacle.what] for obstacle in route.obstacles}
    document = {
        "checkpoint": checkpoint,
        "to": to,
        "output": out,
        "linears": counts,
        "exact": route.exact,
        "traded": [{"what": each.what, "why": each.why, "for": traded[each.what]} for each in route.obstacles],
    }
    lines = (
        ["without loss"] if route.exact else [f"traded: {each.why} → {traded[each.what]}" for each in route.obstacles]
    )
    if dry_run:
        console.result(document | {"dry_run": True}, table, *lines, f"would be written to {out}")
        return
    measured = not route.exact or against is not None
    tokens = _windows(checkpoint, data, windows) if measured else None
    parent = _parent(against) if measured and against is not None else None
    with Progress() as progress:
        cost = target.export(reading, route, out, windows=tokens, parent=parent, progress=progress)
    size = sum(path.stat().st_size for path in out.iterdir()) if out.is_dir() else out.stat().st_size
    document |= {"bytes": size}
    if cost is not None:
        document["cost"] = vars(cost)
        lines.append(
            f"KLD to the checkpoint {cost.export_from_checkpoint:.4f} nats a token on {cost.tokens} tokens of {data}"
        )
    if cost is not None and cost.export_from_parent is not None:
        lines.append(
            f"KLD to {against} {cost.export_from_parent:.4f}, that of the checkpoint {cost.checkpoint_from_parent:.4f}"
        )
    console.result(document, table, *lines, f"{out}: {byte_count(size)}, read back and verified")
    if push is not None:
        pushed(out, push)
    console.note("next:")
    for line in target.next_commands(out, reading, route):
        console.note(f"  {line}")


def _default_output(checkpoint: Path, to: str) -> Path:
    name = checkpoint.resolve().name
    return Path(f"{name}.gguf") if to == "gguf" else Path(f"{name}-ct")


def _windows(checkpoint: Path, data: str, windows: int) -> Any:
    from atomcli.checkpoint.directory import load_tokenizer
    from atomcli.text import cut_windows, load_text, tokenize

    text = load_text(data, "held_out")
    return cut_windows(tokenize(text, load_tokenizer(checkpoint)), _WINDOW_LENGTH, windows, text.name)


def _parent(name: str) -> Any:
    from atomcli.checkpoint.source import open_source

    return open_source(name)
