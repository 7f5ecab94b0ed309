"""`atom eval`: how good a checkpoint is, alone or beside its parent, and gates on it for CI."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from atomcli.cli.command import command
from atomcli.cli.console import Table, console
from atomcli.cli.reports import reportable
from atomcli.units import byte_count

app = typer.Typer(
    help="Measure accuracy, beside the parent.",
    rich_markup_mode=None,
)

Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of atom, or any MODEL.")]
Against = Annotated[str | None, typer.Option("--against", metavar="PARENT", help="The model to compare with.")]
Data = Annotated[
    str,
    typer.Option("--data", metavar="TEXT", help="`demo`, a text file, `wikitext2`, `c4`, or a Hub data set id."),
]
Windows = Annotated[
    int | None,
    typer.Option("--windows", min=0, help="Only the first so many windows; 0: all (default: 20, if there are)."),
]
WindowLength = Annotated[int, typer.Option("--window-length", min=2, help="Tokens in a window.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one).")]
MaxRatio = Annotated[
    float | None, typer.Option("--max-ratio", help="Exit 1 when perplexity / parent's perplexity is above this.")
]
MaxKLD = Annotated[float | None, typer.Option("--max-kld", help="Exit 1 when the mean KL divergence is above this.")]


@app.command("ppl")
@command
@reportable
def ppl(
    checkpoint: Checkpoint,
    against: Against = None,
    data: Data = "demo",
    windows: Windows = None,
    window_length: WindowLength = 2048,
    convention: Annotated[
        str, typer.Option("--convention", help="token (GPTQ, Atom), word (lm-eval) or both.")
    ] = "both",
    max_ratio: MaxRatio = None,
    device: Device = None,
) -> None:
    """Perplexity on a text.

    Per token (the GPTQ and Atom convention) and per word (lm-eval's); each has its name in the table.
    """
    from atomcli.cli.models import check_models, open_model
    from atomcli.cli.progress import Progress
    from atomcli.errors import UsageError
    from atomcli.evaluation import gates, perplexity
    from atomcli.text import cut_windows, load_text, tokenize

    if convention not in ("token", "word", "both"):
        raise UsageError(f"--convention is {convention!r}; allowed are token, word and both")
    if max_ratio is not None and against is None:
        raise UsageError("--max-ratio compares token perplexities of two models", "Add --against PARENT")
    if max_ratio is not None and convention == "word":
        raise UsageError("--max-ratio compares token perplexities, which --convention word leaves out", "Leave it away")
    gates.check_gates(ratio=0.0, max_ratio=max_ratio)  # a limit that is no number is refused now, not at the end
    check_models(_names(checkpoint, against), device)
    text = load_text(data, "held_out")
    rows: dict[str, dict[str, Any]] = {}
    for name in _names(checkpoint, against):
        with Progress() as progress:
            opened = open_model(name, device)
            row: dict[str, Any] = {"name": name}
            tokens = tokenize(text, opened.tokenizer)
            limit = _limit(windows, len(tokens), window_length)
            row |= {"windows": limit or math.ceil(len(tokens) / window_length), "window_length": window_length}
            if convention != "word":
                cut = cut_windows(tokens, window_length, limit, text.name)
                seen = progress.counter(f"{name}, token perplexity", "window")
                row |= perplexity.token_perplexity(opened.model, cut, name, seen).row()
            if convention != "token":
                seen = progress.counter(f"{name}, word perplexity", "window")
                word = perplexity.word_perplexity(
                    opened.model, opened.tokenizer, text, window_length, limit, name, seen
                )
                row |= {key: value for key, value in word.row().items() if key in ("word_perplexity", "words")}
            rows[name] = row | opened.sizes()
            del opened
    ratio = _ratio(rows, checkpoint, against)
    table = _side_by_side(rows, _PPL_LINES)
    console.result(
        {"text": text.name, "models": list(rows.values()), "token_perplexity_ratio": ratio},
        f"{text.name}{_windows_text(rows[checkpoint])}",
        "",
        table,
        *([] if ratio is None else [f"token perplexity ratio {ratio:.4f}"]),
    )
    gates.check_gates(ratio=ratio, max_ratio=max_ratio)


@app.command("kld")
@command
@reportable
def kld(
    checkpoint: Checkpoint,
    against: Against = None,
    data: Data = "demo",
    windows: Windows = None,
    window_length: WindowLength = 2048,
    max_ratio: MaxRatio = None,
    max_kld: MaxKLD = None,
    card: Annotated[bool, typer.Option("--card", help="Write the result into the checkpoint's model card.")] = False,
    device: Device = None,
) -> None:
    """KL divergence from the parent.

    With its standard error, how often both would say the same token, and both token perplexities.
    """
    from atomcli.cli.models import check_models, open_model, parent_of, warn_of_another_parent
    from atomcli.cli.progress import Progress
    from atomcli.evaluation import gates
    from atomcli.evaluation.divergence import divergence, record
    from atomcli.text import cut_windows, load_text, tokenize

    gates.check_gates(0.0, max_ratio, 0.0, max_kld)  # a limit that is no number is refused now, not at the end
    parent_name = against or parent_of(checkpoint)
    check_models([parent_name, checkpoint], device)
    warn_of_another_parent(checkpoint, parent_name)
    text = load_text(data, "held_out")
    with Progress() as progress:
        parent = open_model(parent_name, device)
        tokens = tokenize(text, parent.tokenizer)
        cut = cut_windows(tokens, window_length, _limit(windows, len(tokens), window_length), text.name)
        recording = record(parent.model, cut, progress.counter(f"parent {parent_name}", "window"))
        parent_sizes = parent.sizes()
        del parent
        opened = open_model(checkpoint, device)
        seen = progress.counter(f"checkpoint {checkpoint}", "window")
        result = divergence(recording, opened.model, cut, parent_name, checkpoint, seen)
    row = result.row()
    columns = {
        "parent": {"token_perplexity": result.parent.value, "standard_error": result.parent.standard_error}
        | parent_sizes,
        "checkpoint": row | {"standard_error": result.checkpoint.standard_error} | opened.sizes(),
    }
    console.result(
        {
            "text": text.name,
            "parent": parent_name,
            "parent_sizes": parent_sizes,
            "parent_standard_error": result.parent.standard_error,
            "checkpoint": checkpoint,
            "standard_error": result.checkpoint.standard_error,
            **row,
            **opened.sizes(),
        },
        f"{text.name}{_windows_text(row)}; parent {parent_name}, checkpoint {checkpoint}",
        "",
        _side_by_side(columns, _KLD_LINES),
    )
    if card:
        from atomcli.checkpoint.record import record_divergence

        record_divergence(Path(checkpoint).expanduser(), text.name, row)
        console.note(f"written into {Path(checkpoint) / 'README.md'}")
    gates.check_gates(result.perplexity_ratio, max_ratio, result.mean_kld, max_kld)


@app.command("tasks")
@command
@reportable
def tasks(
    checkpoint: Checkpoint,
    task: Annotated[
        list[str],
        typer.Option("--task", "-t", help="A JSON lines file, a YAML file, or a name of lm-eval; repeatable."),
    ],
    against: Against = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first so many questions of each task.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions at a time.")] = 1,
    device: Device = None,
) -> None:
    """Zero-shot accuracy through lm-eval.

    Its own tasks by name, or local question files (JSON lines or a task's YAML).
    """
    from atomcli.cli.models import check_models, open_model
    from atomcli.cli.progress import Progress
    from atomcli.evaluation.tasks import run_tasks, task_spec

    for each in task:
        task_spec(each)  # a file that can't be asked is refused now, not after a model is loaded
    check_models(_names(checkpoint, against), device)
    rows: list[dict[str, Any]] = []
    for name in _names(checkpoint, against):
        opened = open_model(name, device)
        with Progress() as progress:
            seen = progress.counter(f"{name}, {', '.join(task)}", "answer")
            results = run_tasks(opened.model, opened.tokenizer, task, limit, batch_size, progress=seen)
        rows += [{"name": name, **result.row()} for result in results]
        del opened
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = Table([">" + key if key not in ("name", "task", "metric") else key for key in keys])
    for row in rows:
        table.add(*(_cell(row.get(key)) for key in keys))
    console.result({"results": rows}, table)


_DEFAULT_WINDOWS = 20  # as many as the figures in docs/ are measured on

# What a table shows: title, key of the row, key of its standard error, and how the number is written.
_SIZES = [
    ("weight bytes", "weight_bytes", None, byte_count),
    ("bits per weight", "bits_per_weight", None, lambda bits: f"{bits:.2f}"),
]
_PPL_LINES = [
    ("token perplexity", "token_perplexity", "standard_error", lambda value: f"{value:.3f}"),
    ("word perplexity", "word_perplexity", None, lambda value: f"{value:.3f}"),
    *_SIZES,
]
_KLD_LINES = [
    ("token perplexity", "token_perplexity", "standard_error", lambda value: f"{value:.3f}"),
    ("perplexity ratio", "perplexity_ratio", "perplexity_ratio_standard_error", lambda value: f"{value:.4f}"),
    ("mean KLD (nats)", "mean_kld", "mean_kld_standard_error", lambda value: f"{value:.4f}"),
    ("95 % KLD", "kld_95", None, lambda value: f"{value:.4f}"),
    ("99 % KLD", "kld_99", None, lambda value: f"{value:.4f}"),
    ("same top token", "top1_agreement", "top1_agreement_standard_error", lambda value: f"{value:.2%}"),
    *_SIZES,
]


def _side_by_side(columns: dict[str, dict[str, Any]], lines: list[tuple[str, str, str | None, Any]]) -> Table:
    """Models as columns, measures as rows; a measure that no model has is left out."""
    table = Table(["", *(f">{name}" for name in columns)])
    for title, key, error_key, write in lines:
        if all(column.get(key) is None for column in columns.values()):
            continue
        cells = []
        for column in columns.values():
            value, error = column.get(key), column.get(error_key) if error_key else None
            if value is None:
                cells.append("–")
            else:
                cells.append(write(value) + ("" if error is None else f" ± {write(error)}"))
        table.add(title, *cells)
    return table


def _names(checkpoint: str, against: str | None) -> list[str]:
    return [checkpoint] if against is None else [against, checkpoint]


def _ratio(rows: dict[str, dict[str, Any]], checkpoint: str, against: str | None) -> float | None:
    if against is None or "token_perplexity" not in rows[checkpoint]:
        return None
    return float(rows[checkpoint]["token_perplexity"] / rows[against]["token_perplexity"])


def _limit(asked: int | None, tokens: int, length: int) -> int | None:
    """How many windows are measured: what was asked for, all (None) for 0, else the default where the text has them."""
    if asked is None:
        return min(_DEFAULT_WINDOWS, tokens // max(1, length)) or None
    return asked or None


def _windows_text(row: dict[str, Any]) -> str:
    if "windows" not in row:
        return ""
    return f", {row['windows']} window{'s' * (row['windows'] != 1)} of {row['window_length']} tokens"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
