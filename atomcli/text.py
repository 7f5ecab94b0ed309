"""From a name of a text to windows of tokens, the same way for calibration and for measuring.

A text is named by
  `default` or `demo`             the text that comes with the demo model (calibration and held-out part never overlap),
  `wikitext2` or `c4`             the sets that papers measure on, from the Hub, joined as papers join them,
  a local file                    UTF-8, taken as it is,
  `owner/name[:config[:split]]`   any Hub data set with a `text` column, rows joined by blank lines.
A text is joined first and tokenised once, so a model that wants a first token (BOS) sees it once: the convention of
GPTQ, QuaRot and Atom.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from atomcli.errors import InputError

if TYPE_CHECKING:
    import torch

Part = Literal["calibration", "held_out"]

# Between 3 and 5 characters make a token in every tokenizer we know; 8 leaves room and spares a whole C4 download.
CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True)
class Text:
    """A text and the name a report gives it."""

    name: str
    content: str


@dataclass(frozen=True)
class HubText:
    """Where a text lies on the Hub: data set id, config, split, files of it, and what joins its rows."""

    dataset: str
    config: str | None = None
    split: str | None = None
    files: str | None = None
    separator: str = "\n\n"
    rows: int | None = None


# The sets that papers name. C4 is measured on the first 1100 documents of one validation file (GPTQ).
NAMED: dict[tuple[str, Part], HubText] = {
    ("wikitext2", "held_out"): HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    ("wikitext2", "calibration"): HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    ("c4", "held_out"): HubText(
        "allenai/c4", None, "train", "en/c4-validation.00000-of-00008.json.gz", separator=" ", rows=1100
    ),
    ("c4", "calibration"): HubText("allenai/c4", None, "train", "en/c4-train.00000-of-01024.json.gz"),
}


def load_text(data: str, part: Part, max_characters: int | None = None) -> Text:
    """The text that `data` names, for calibrating or for measuring; a Hub set is read up to `max_characters`.

    Raises InputError, in one sentence, for a file that is missing, empty or not UTF-8 and for a set the Hub lacks.
    """
    if data in ("default", "demo"):
        from atomcli.checkpoint.assets import demo_text

        name = f"demo text, {part.replace('_', '-')} part"
        return Text(name, _read_file(Path(demo_text(part))))
    named = NAMED.get((data, part))
    if named is not None:
        return Text(f"{data} ({named.split if named.files is None else named.files})", _read_hub(named, max_characters))
    path = Path(data).expanduser()
    if path.exists():
        return Text(str(path), _read_file(path))
    if path.suffix in (".txt", ".md", ".utf8", ".text") or data.startswith(("/", "./", "../", "~")):
        raise InputError(f"The text file {data} does not exist", "Name a local file, `demo`, or a Hub data set id")
    dataset, _, rest = data.partition(":")
    config, _, split = rest.partition(":")
    default_split = "train" if part == "calibration" else "test"
    return Text(data, _read_hub(HubText(dataset, config or None, split or default_split), max_characters))


def tokenize(text: Text, tokenizer: Any) -> "torch.Tensor":
    """The whole text as one row of token ids, int64 (tokens,); BOS once at the front where the tokenizer adds one."""
    import torch

    if not text.content.strip():
        raise InputError(f"{text.name} is empty")
    # verbose=False: the tokenizer would warn that a book is longer than the model's context; windows are cut later.
    ids = tokenizer(text.content, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def cut_windows(
    tokens: "torch.Tensor", length: int, limit: int | None = None, name: str = "the text"
) -> "torch.Tensor":
    """tokens (n,) cut from the front into (windows, length) that do not overlap; the tail is dropped."""
    if length < 2:
        raise InputError(f"A window of {length} tokens predicts nothing; it needs at least 2")
    if limit is not None and limit < 1:
        raise InputError(f"{limit} windows were asked for; at least 1 is needed")
    count = len(tokens) // length
    if count == 0:
        raise InputError(
            f"{name} has {len(tokens)} tokens, fewer than one window of {length}",
            "Use a longer text or a shorter window",
        )
    if limit is not None and count < limit:
        raise InputError(
            f"{name} has {count} full windows of {length} tokens, {limit} were asked for",
            f"Ask for at most {count} windows",
        )
    count = limit or count
    return tokens[: count * length].reshape(count, length)


def evaluation_windows(
    data: str, tokenizer: Any, window: int = 2048, limit: int | None = None, every: int = 1
) -> "torch.Tensor":
    """The windows to measure on, int64 (windows, window): held-out part, no overlap, tail dropped, first `limit`.

    With `every` n only each n-th window counts, from the first on: a sample of the whole text.
    """
    text = load_text(data, "held_out")
    last = None if limit is None else (limit - 1) * every + 1
    return cut_windows(tokenize(text, tokenizer), window, last, text.name)[::every].contiguous()


def calibration_windows(data: str, tokenizer: Any, samples: int, sequence_length: int, seed: int) -> "torch.Tensor":
    """The windows to calibrate on, int64 (samples, sequence_length), spread evenly over the text, in seeded order.

    A text that holds fewer windows lets neighbours overlap, by half at most; a shorter one is refused.
    """
    text = load_text(data, "calibration", max_characters=samples * sequence_length * CHARACTERS_PER_TOKEN)
    return spread_windows(tokenize(text, tokenizer), samples, sequence_length, seed, text.name)


def spread_windows(
    tokens: "torch.Tensor", samples: int, length: int, seed: int, name: str = "the text"
) -> "torch.Tensor":
    """`samples` windows (samples, length) at equal strides over tokens (n,), shifted and shuffled by `seed`."""
    import torch

    if samples < 1 or length < 1:
        raise InputError(f"{samples} calibration samples of {length} tokens: both must be at least 1")
    half = (length + 1) // 2
    needed = length + (samples - 1) * half
    if len(tokens) < needed:
        possible = 1 + (len(tokens) - length) // half if len(tokens) >= length else 0
        raise InputError(
            f"{name} has {len(tokens)} tokens; {samples} samples of {length} need at least {needed}",
            f"Ask for at most {possible} samples" if possible else "Use a longer text or shorter sequences",
        )
    generator = torch.Generator().manual_seed(seed)
    spare = len(tokens) - length
    stride = spare // (samples - 1) if samples > 1 else 0
    first = int(torch.randint(spare - stride * (samples - 1) + 1, (), generator=generator))
    starts = first + stride * torch.randperm(samples, generator=generator)
    return tokens[starts[:, None] + torch.arange(length)]


def _read_file(path: Path) -> str:
    if path.is_dir():
        raise InputError(f"{path} is a directory, not a text file")
    try:
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}"
        ) from error
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    if not content.strip():
        raise InputError(f"{path} is empty")
    return content


def _read_hub(source: HubText, max_characters: int | None) -> str:
    """Rows of a Hub set, streamed and joined; stops at `max_characters` or after the rows the convention names."""
    from datasets import load_dataset

    try:
        rows = load_dataset(source.dataset, source.config, split=source.split, data_files=source.files, streaming=True)
        return _join_rows(rows, source, max_characters)
    except InputError:
        raise
    # Whatever the client raises here (no network, no such set, no such split) is about what was asked for.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{source.dataset} is no local file, and the Hub gave no data set of that name: {reason}",
            "Name a local text file or `demo`, which need no Hub",
        ) from error


def _join_rows(rows: Iterable[dict[str, Any]], source: HubText, max_characters: int | None) -> str:
    parts: list[str] = []
    characters = 0
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise InputError(f"{source.dataset} has no text column; its columns are {', '.join(row)}")
        parts.append(row["text"])
        characters += len(row["text"])
        if len(parts) == source.rows or (max_characters is not None and characters >= max_characters):
            break
    return source.separator.join(parts)
