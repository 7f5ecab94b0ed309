"""The route of a whole checkpoint to a target: how every linear gets there, and what is traded on the way."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from atomcli.checkpoint.manifest import JOURNAL
from atomcli.errors import UsageError
from atomcli.formats.scheme import Scheme
from atomcli.integrations.portable import Obstacle, Passage, Target, What, passage, refuse_untraded, without_cache
from atomcli.integrations.reading import Linear, Reading


@dataclass(frozen=True)
class Route:
    """How every linear of a checkpoint gets to a target, and what it meets on the way."""

    passages: Mapping[Linear, Passage]
    obstacles: tuple[Obstacle, ...]

    @property
    def exact(self) -> bool:
        """Whether nothing is traded: the same numbers in other words."""
        return not self.obstacles

    def schemes(self) -> dict[str, Scheme]:
        """The plain scheme of every linear that is not in 16 bits, by its name on disk."""
        return {linear.disk: way.scheme for linear, way in self.passages.items() if way.scheme is not None}

    def dense(self) -> list[str]:
        """Names on disk of the linears that go to 16 bits."""
        return [linear.disk for linear, way in self.passages.items() if way.scheme is None]

    def counts(self, name: Callable[[Scheme], str]) -> dict[str, int]:
        """How many linears get which format, by what the target calls it; those in 16 bits are `16 bits`."""
        found: dict[str, int] = {}
        for way in self.passages.values():
            called = "16 bits" if way.scheme is None else name(way.scheme)
            found[called] = found.get(called, 0) + 1
        return found


def find_route(reading: Reading, target: Target, trades: Mapping[What, str]) -> Route:
    """The route of a checkpoint; UsageError naming what the target can't hold and no trade covers."""
    passages = {
        linear: passage(linear.scheme, linear.shape[1], linear.permuted, target, trades) for linear in reading.linears
    }
    met = dict.fromkeys(each for way in passages.values() for each in way.obstacles)
    caches = {reading.plan.cache_of(index).element for index in range(reading.blocks)}
    met |= dict.fromkeys(cache for element in sorted(caches) if (cache := without_cache(element)) is not None)
    refuse_untraded(target, met, trades)
    return Route(passages, tuple(met))


def fresh(directory: Path) -> Path:
    """An empty directory to export into; an export is quick and starts over, but a run of `atom quantize` is left."""
    if (directory / JOURNAL).exists():
        raise UsageError(f"{directory} holds an unfinished run of `atom quantize`", "Choose another output with -o")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory
