"""The one sink: results go to stdout, everything else to stderr, and nothing else in atom prints."""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from atomcli.errors import RunError

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


@dataclass
class Table:
    """Rows under a header; a column is right-aligned where its header starts with `>`."""

    header: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        self.rows.append([str(cell) for cell in cells])

    def lines(self, style: "Console | None" = None) -> list[str]:
        """The table as text, each column as wide as its widest cell; a table is never cut to the terminal's width."""
        right = [title.startswith(">") for title in self.header]
        titles = [title.removeprefix(">") for title in self.header]
        widths = [max(len(row[column]) for row in [titles, *self.rows]) for column in range(len(titles))]

        def line(cells: Sequence[str]) -> str:
            aligned = (
                cell.rjust(width) if is_right else cell.ljust(width)
                for cell, width, is_right in zip(cells, widths, right, strict=True)
            )
            return "  ".join(aligned).rstrip()

        head = line(titles)
        return [style.styled(head, "bold") if style else head, *(line(row) for row in self.rows)]


@dataclass
class Console:
    """How this run speaks; the options that every command has set it."""

    json: bool = False
    quiet: bool = False
    color: bool = True
    debug: bool = False
    after_interruption: str | None = None  # what to tell someone who presses Ctrl-C now
    screen: Any = None  # while a bar moves on stderr, the rich console that it moves on
    command_line: str = "atom"
    muted: bool = int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0  # by torchrun
    _document: dict[str, Any] | None = None

    def result(self, document: Mapping[str, Any], *human: "str | Table") -> None:
        """The outcome of a command: printed for people; under --json `finish` prints it as one document."""
        self._document = (self._document or {}) | _plain(document)
        if self.json:
            return
        for part in human:
            for line in part.lines(self) if isinstance(part, Table) else [part]:
                self._write(sys.stdout, line)

    @property
    def document(self) -> dict[str, Any]:
        """What `result` was given so far."""
        return dict(self._document or {})

    def note(self, text: str) -> None:
        """Says on stderr what is going on; --quiet silences it."""
        if not self.quiet:
            self._write(sys.stderr, text)

    def warn(self, text: str) -> None:
        """Says on stderr what a person ought to know even when they asked for quiet."""
        self._write(sys.stderr, f"{self.styled('warning:', 'yellow', sys.stderr)} {text}")

    def error(self, what: str, hint: str | None = None, kind: str = "Error") -> None:
        """Says on stderr what is wrong and what to do next; under --json the document says it too."""
        self._write(sys.stderr, f"{self.styled('error:', 'red', sys.stderr)} {_sentence(what)}")
        if hint:
            self._write(sys.stderr, f"{self.styled('hint:', 'cyan', sys.stderr)} {_sentence(hint)}")
        if self.json:
            self.result({"error": {"kind": kind, "what": what, "hint": hint}})

    def finish(self) -> None:
        """Prints the one document of --json, whatever the command came to."""
        document, self._document = self._document, None
        if self.json and document is not None:
            self._write(sys.stdout, json.dumps(document, indent=2, ensure_ascii=False))

    def let_go(self) -> None:
        """Who read stdout has gone (`atom inspect … | head`): nothing is left to say, and nobody to say it to."""
        self._document = None
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def styled(self, text: str, style: str, stream: TextIO | None = None) -> str:
        if not self.color or not is_terminal(stream or sys.stdout):
            return text
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"

    @property
    def live(self) -> bool:
        """Whether a moving progress display can be shown on stderr."""
        return not self.quiet and not self.muted and is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"

    def _write(self, stream: TextIO, line: str) -> None:
        if self.muted:
            return
        if self.screen is not None and stream is sys.stderr:
            from rich.text import Text

            self.screen.print(Text.from_ansi(line), soft_wrap=True)
            return
        try:
            stream.write(line + "\n")
            stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            name = "stdout" if stream is sys.stdout else "stderr"
            raise RunError(f"{name} can't be written: {error.strerror}") from error


def _sentence(text: str) -> str:
    """The text with the period that errors are raised without, so that one can be quoted inside another."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


def is_terminal(stream: TextIO) -> bool:
    return hasattr(stream, "isatty") and stream.isatty()


def _plain(value: Any) -> Any:
    """The value as JSON knows it: a number that is not finite becomes null, a path its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} has no place in a result: {value!r}")


console = Console()
