"""How a run resumes: a journal of finished steps, published by one atomic rename after each.

A run works in a directory of its own. Whatever a step makes (a shard, statistics, the hidden states after a block) is
written under its final name first; only then does the journal that mentions it replace the journal that doesn't. A
crash therefore loses the step it interrupts and nothing else, and files that the journal doesn't mention mean nothing.

Shards, statistics and the journal are synced. Hidden states are not: they are gigabytes a block, mostly deleted before
they would reach the disk, and can be computed again. A process that dies leaves them in the page cache, a machine that
loses its power doesn't; so the journal says since which start of the machine it was written.

The journal begins with the run's identity: everything its result depends on (model, recipe, tokens, versions). A run
continues only under the same identity; otherwise the difference is said. It also keeps the number of threads the run
was started with, which sums in floating point depend on, and continues with that.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from atomcli.checkpoint.files import TEMPORARY, read_json, write_error, write_json
from atomcli.checkpoint.manifest import JOURNAL
from atomcli.errors import InputError, UsageError
from atomcli.pipeline.ranks import Ranks

LOCK = "lock"
_VERSION = 1
_LOG = logging.getLogger("atomcli")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory`, which is created, for this process alone; UsageError when another process holds it.

    The lock dies with the process, also by kill -9.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise write_error(directory, error, 0, 0) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"Another atom is working in {directory}", "Wait until it is done, or choose another output with -o"
            ) from error
        yield
    finally:
        os.close(handle)


@contextmanager
def opened(directory: Path, identity: Mapping[str, Any], ranks: Ranks, restart: bool = False) -> Iterator[Journal]:
    """The journal of a run in `directory`, which the first of its processes holds and writes; the others have a copy.

    Raises what `locked` and `Journal.open` raise, and UsageError when the processes don't see the same files.
    """
    if not ranks.first:
        journal: Journal | None = ranks.tell(None)
        assert journal is not None
        if not (directory / JOURNAL).is_file():
            raise UsageError(
                f"Process {ranks.rank} of this run doesn't see {directory}, which the first one made",
                "Give an output on a file system that all hosts share",
            )
        if found := differences(journal.identity, json.loads(json.dumps(identity))):
            raise UsageError(
                f"Process {ranks.rank} of this run was started differently from the first: {'; '.join(found)}",
                "Start all of them with the same command, on the same model",
            )
        yield journal
        return
    with locked(directory):
        yield ranks.tell(Journal.open(directory, identity, restart))


class Journal:
    """The finished steps of one run, in order, each with the plain data that a later step or the report needs."""

    def __init__(
        self,
        directory: Path,
        identity: dict[str, Any],
        threads: int,
        steps: list[dict[str, Any]],
        restarted: bool = False,
    ) -> None:
        self.directory, self.identity, self.threads, self.steps = directory, identity, threads, steps
        # The machine was started anew since the last step: what wasn't synced may be lost.
        self.restarted = restarted

    @classmethod
    def open(cls, directory: Path, identity: Mapping[str, Any], restart: bool = False) -> Journal:
        """The journal in `directory`, or a new one; call it inside `locked`.

        Raises UsageError, saying what changed, when the directory holds a run of another identity; with `restart` such
        a run is thrown away instead.
        """
        wanted = json.loads(json.dumps(identity))
        path = directory / JOURNAL
        _bring_back(directory)
        if path.exists():
            data = read_json(path)
            if data.get("version") == _VERSION and data.get("identity") == wanted:
                steps, threads = data.get("steps"), data.get("threads")
                if not isinstance(steps, list) or not isinstance(threads, int):
                    raise InputError(f"{path} is damaged: it has no list of steps", f"Delete {directory} and run again")
                return cls(directory, wanted, threads, steps, restarted=data.get("machine") != machine())
            changed = "; ".join(differences(data.get("identity", {}), wanted)) or "the journal's version changed"
            if not restart:
                raise UsageError(
                    f"{directory} holds an unfinished run that was started differently: {changed}",
                    "Repeat the command it was started with to continue it, or delete the directory to start over",
                )
            _LOG.warning("starting over in %s: %s", directory, changed)
        else:
            _refuse_foreign(directory)
        clear(directory)
        journal = cls(directory, wanted, torch.get_num_threads(), [])
        journal._write()
        return journal

    def publish(self, step: Mapping[str, Any]) -> None:
        """Record a finished step, whose files are on disk by now."""
        self.steps.append(dict(step))
        self._write()

    @contextmanager
    def same_threads(self) -> Iterator[None]:
        """Work with as many CPU threads as the run was started with, so that every sum is rounded as it was then."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keep the journal beside its directory while that gets its final name; afterwards nobody needs it.

        A run that ends in between finds it there, and has nothing to do but to publish.
        """
        kept = beside(self.directory)
        (self.directory / JOURNAL).replace(kept)
        yield
        kept.unlink(missing_ok=True)

    def _write(self) -> None:
        write_json(
            self.directory / JOURNAL,
            {
                "version": _VERSION,
                "identity": self.identity,
                "threads": self.threads,
                "machine": machine(),
                "steps": self.steps,
            },
        )


def machine() -> str:
    """What stays the same until the machine is started anew, and differs from that of any other machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux
        return f"{platform.node()} since {psutil.boot_time():.0f}"


def beside(directory: Path) -> Path:
    """Where the journal of a directory lies while that is renamed."""
    return directory.with_name(f"{directory.name}.{JOURNAL}")


def _bring_back(directory: Path) -> None:
    """Put a journal that was set aside back into its directory; one whose directory was published is dropped."""
    kept = beside(directory)
    if not kept.exists():
        return
    if (directory / JOURNAL).exists() or all(path.name == LOCK for path in directory.iterdir()):
        kept.unlink()
    else:
        kept.replace(directory / JOURNAL)


def _refuse_foreign(directory: Path) -> None:
    """A directory without a journal is no run's: what somebody keeps there must not be emptied."""
    foreign = sorted(path.name for path in directory.iterdir() if path.name != LOCK and path.suffix != TEMPORARY)
    if foreign:
        raise UsageError(
            f"{directory} holds {foreign[0]}, but no journal of an unfinished run",
            "Move the directory away, or choose another output with -o",
        )


def clear(directory: Path) -> None:
    """Empty a run's directory, but for the lock that this process holds; the journal goes last.

    A directory that was being emptied when its process died is thereby still known as a run's.
    """
    for path in sorted(directory.iterdir(), key=lambda path: path.name == JOURNAL):
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """What changed between two pieces of plain data, a phrase for each value: `weights.clip was 0.85, now 0.9`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for name in sorted(old.keys() | new.keys()):
            found += differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        return found
    return [] if old == new else [f"{key} was {_short(old)}, now {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}…"
    return text if len(text) <= 60 else f"{text[:57]}…"
