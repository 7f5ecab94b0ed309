"""Several processes of one command: the first speaks, or the one that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from atomcli.cli.console import console

if TYPE_CHECKING:
    from atomcli.pipeline.ranks import Ranks


@contextmanager
def meeting(device: str | None) -> Iterator[Ranks]:
    """Meet the other processes that torchrun started with this command; alone where it started none."""
    from atomcli.pipeline.ranks import together

    met = False
    try:
        with together(device) as ranks:
            met = True
            yield ranks
    except BaseException:
        # Whoever fails because another failed doesn't come back from `together`.
        console.muted &= not met
        raise
