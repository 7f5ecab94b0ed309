"""Progress on stderr: a moving bar on a terminal, a plain line now and then anywhere else."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from atomcli.cli.console import console
from atomcli.units import byte_count, duration

_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_TO_RESUME = 0.5  # steps reported this early were not done in this run


def memory_text() -> str:
    """The memory this process holds, and on a GPU what torch holds there."""
    import sys

    import psutil

    text = byte_count(psutil.Process().memory_info().rss)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        text += f" + {byte_count(torch.cuda.memory_allocated())} GPU"
    return text


class Progress:
    """Stages that follow one another, each with a number of steps; use it as a context manager."""

    def __init__(self) -> None:
        self._stage = ""
        self._unit = ""
        self._total = 0
        self._started = 0.0
        self._spoken = 0.0
        self._resumed: int | None = None  # steps that were finished before: they say nothing about the time left
        self._live: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hide()

    def begin(self, stage: str, total: int, unit: str = "block") -> None:
        """A new stage of `total` steps of one `unit` each; ends the one before."""
        self.end()
        self._stage, self._total, self._unit = stage, total, unit
        self._started = self._spoken = time.monotonic()
        self._resumed = None
        if console.live:
            self._live = _bar()
            self._live.start()
            console.screen = self._live.console
            self._task = self._live.add_task(stage, total=total, state="")

    def advance(self, done: int, detail: str = "") -> None:
        """`done` steps of the stage are finished; `detail` says what is going on now."""
        if self._resumed is None:
            self._resumed = done if time.monotonic() - self._started < _SECONDS_TO_RESUME else 0
        if self._live is not None:
            self._live.update(self._task, completed=done, state=self._state(done, detail))
            return
        now = time.monotonic()
        if done < self._total and now - self._spoken >= _SECONDS_BETWEEN_LINES:
            self._spoken = now
            console.note(f"{self._stage}: {self._unit} {done}/{self._total}, {self._state(done, detail)}")

    def end(self) -> None:
        """The stage is over."""
        if not self._stage:
            return
        took = f"{self._stage}: {self._total} {self._unit}{'s' * (self._total != 1)} in {self._elapsed()}"
        self._stage = ""
        self._hide()
        console.note(took)

    def counter(self, stage: str, unit: str) -> Callable[[int, int], None]:
        """A callback (done, total) for work that counts its own steps, such as the windows of a text."""
        self.end()
        self._stage, self._unit, self._total = "", unit, 0

        def report(done: int, total: int) -> None:
            if self._stage != stage:
                self.begin(stage, total, unit)
            self.advance(done)
            if done == total:
                self.end()

        return report

    def _hide(self) -> None:
        if self._live is not None:
            self._live.remove_task(self._task)
            self._live.stop()
            self._live = console.screen = None

    def _elapsed(self) -> str:
        return duration(time.monotonic() - self._started)

    def _state(self, done: int, detail: str) -> str:
        elapsed = time.monotonic() - self._started
        parts = [detail] if detail else []
        if self._live is None:
            parts.append(duration(elapsed))
        here = done - (self._resumed or 0)
        if here > 0 and done < self._total:
            parts.append(f"{duration(elapsed / here * (self._total - done))} left")
        parts.append(memory_text())
        return ", ".join(parts)


def _bar() -> Any:
    """Rich's bar on stderr; it follows the color setting and leaves nothing behind."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    screen = Console(stderr=True, no_color=not console.color, highlight=False)
    return RichProgress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
        console=screen,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
