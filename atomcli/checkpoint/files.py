"""Small files, read and written so that what goes wrong is a sentence and what is half-written is never seen."""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atomcli.errors import InputError, RunError

TEMPORARY = ".tmp"


def unreadable(path: Path, error: OSError) -> InputError:
    """The InputError for a file or directory that the operating system won't let us read."""
    return InputError(
        f"{path} can't be read: {error.strerror or error}", "Check that the path exists and that you may read it."
    )


def is_file_name(name: object) -> bool:
    """Whether text from a file can name a file beside it: no path that leads elsewhere, nothing a disk can't have."""
    return isinstance(name, str) and Path(name).name == name and len(name) <= 255 and name.isprintable()


def read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    """A JSON object from a file; InputError naming the file otherwise. `missing_ok` gives {} for an absent file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        if missing_ok and isinstance(error, FileNotFoundError):
            return {}
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {one_line(error)}", "Copy the file again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {type(value).__name__}, not a JSON object", "Copy the file again.")
    return value


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it appears whole or not at all; RunError when the disk is full."""
    data = text.encode("utf-8")
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise write_error(path, error, len(data), len(data)) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """JSON with sorted keys through `write_text`, so that equal content is equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def copy_file(source: Path, destination: Path) -> None:
    """Copy a small file byte for byte, atomically; RunError when the disk is full."""
    temporary = destination.with_name(destination.name + TEMPORARY)
    size = source.stat().st_size
    try:
        with source.open("rb") as data, temporary.open("wb") as out:
            shutil.copyfileobj(data, out)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(destination)
        sync_directory(destination.parent)
    except OSError as error:
        raise write_error(destination, error, size, size) from error


def sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_error(path: Path, error: OSError, total: int, missing: int) -> RunError:
    """The RunError for a file of `total` bytes that couldn't be written; `missing` bytes of it didn't fit."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(path, total, missing)
    return RunError(f"{path} can't be written: {error.strerror or error}", "Check the disk and the directory's rights.")


def disk_full(path: Path, total: int, missing: int) -> RunError:
    """The error for a file that doesn't fit on its disk."""
    return RunError(
        f"The disk of {path} is full: {missing} bytes are missing for this file of {total} bytes",
        "Free some space and type the same command again; it continues where it stopped.",
    )


def one_line(error: BaseException) -> str:
    """An error's message on one line, to be quoted inside a sentence."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
