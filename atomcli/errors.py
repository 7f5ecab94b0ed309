"""What can go wrong, as sentences a person can act on.

Every error that atom raises on purpose says what is wrong, where, and what was allowed; `hint` says what to do
next. Both begin with a capital, or with the name that they are about. The command line ends them with a period and
prints the two and nothing else; each class fixes the exit code.
"""

_LONGEST = 900


class AtomError(Exception):
    """Base of all errors atom raises on purpose; `exit_code` is what the shell sees."""

    exit_code = 1

    def __init__(self, what: str, hint: str | None = None) -> None:
        # A damaged file may have a name of thousands of letters, or one that doesn't stay on its line.
        what = " ".join(what.split()) if "\n" in what or "\r" in what else what
        if len(what) > _LONGEST:
            what = f"{what[: _LONGEST * 2 // 3]} […] {what[-_LONGEST // 4 :]}"
        super().__init__(what)
        self.what = what
        self.hint = hint


class UsageError(AtomError):
    """The command line or the recipe is wrong."""

    exit_code = 2


class InputError(AtomError):
    """A model, checkpoint, text or artifact that was handed in is missing, damaged or contradicts itself."""


class UnsupportedError(AtomError):
    """An architecture, card or combination that atom can't serve; never a silent substitute."""


class RunError(AtomError):
    """The run itself failed: a full disk, a verification mismatch, numbers that are not finite."""


class ThresholdError(AtomError):
    """A quality gate that the user asked for was not met."""
