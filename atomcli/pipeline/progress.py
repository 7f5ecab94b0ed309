"""What the pipeline tells whoever is watching; the command line shows it, tests and libraries stay silent."""

from typing import Protocol


class Progress(Protocol):
    """Stages that follow one another, each with a number of steps."""

    def begin(self, stage: str, total: int, unit: str = "block") -> None:
        """A new stage of `total` steps of one `unit` each; ends the one before."""

    def advance(self, done: int, detail: str = "") -> None:
        """`done` steps of the stage are finished; `detail` says what is going on now."""

    def end(self) -> None:
        """The last stage is over."""


class Silent:
    """Progress that nobody watches."""

    def begin(self, stage: str, total: int, unit: str = "block") -> None:
        """Nothing to show."""

    def advance(self, done: int, detail: str = "") -> None:
        """Nothing to show."""

    def end(self) -> None:
        """Nothing to show."""
