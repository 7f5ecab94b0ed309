"""Where atom's log records go: to the screen as notes and warnings, and for long commands to a file as well."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from atomcli.cli.console import console
from atomcli.resources import cache_directory

_FILES_KEPT = 100
_logger = logging.getLogger("atomcli")


class _Notes(logging.Handler):
    """Warnings are always said, information unless --quiet, debugging with --debug."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            console.warn(record.getMessage())
        elif record.levelno >= logging.INFO or console.debug:
            console.note(record.getMessage())


@contextmanager
def on_screen() -> Iterator[None]:
    """While this lasts, log records of atom are notes on the screen; at its end every handler is taken off again."""
    before, level, propagates = list(_logger.handlers), _logger.level, _logger.propagate
    _logger.setLevel(logging.DEBUG)
    _logger.propagate = False
    _logger.addHandler(_Notes())
    try:
        yield
    finally:
        for handler in [handler for handler in _logger.handlers if handler not in before]:
            _logger.removeHandler(handler)
            handler.close()
        _logger.setLevel(level)
        _logger.propagate = propagates


def to_file(name: str) -> Path | None:
    """From here on the records of this command, debugging included, also go to a file of their own in the cache."""
    path = new_file(name)
    if path is None:
        return None
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(module)s: %(message)s"))
    _logger.addHandler(handler)
    _logger.debug("command line: %s", " ".join(sys.argv))
    return path


def new_file(name: str, text: str = "") -> Path | None:
    """A new file among the logs; None where none can be written: a log never fails a run."""
    try:
        directory = cache_directory() / "logs"
        directory.mkdir(parents=True, exist_ok=True)
        for old in sorted(directory.glob("*.log"))[: 1 - _FILES_KEPT]:
            old.unlink(missing_ok=True)
        path = directory / f"{datetime.now():%Y-%m-%dT%H-%M-%S}-{name}-{os.getpid()}.log"
        path.write_text(text, encoding="utf-8")
    except OSError:
        return None
    return path
