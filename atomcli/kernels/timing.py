"""Times of kernels without the cost of launching them: replays of CUDA graphs, between two events."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Name = TypeVar("Name")


@dataclass(frozen=True)
class Replay:
    """A captured graph of some number of calls, and what was called, which holds the memory that the graph works on."""

    graph: torch.cuda.CUDAGraph
    calls: int
    products: Sequence[Callable[[], object]]

    def microseconds(self) -> float:
        """The time of one call in one replay."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / self.calls


def capture(products: Sequence[Callable[[], object]]) -> Replay:
    """A graph of all the products one after the other; a short round is captured several times."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for product in products:
            product()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    rounds = max(1, 24 // len(products))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for product in products:
                product()
    graph.replay()
    torch.cuda.synchronize()
    return Replay(graph, rounds * len(products), products)


def in_turn(replays: Mapping[Name, Replay], repeats: int = 7) -> dict[Name, list[float]]:
    """Microseconds of one call of each, a sample per replay.

    They are replayed in turn: what the card's clock and power limit do in the meantime happens to all of them.
    """
    samples: dict[Name, list[float]] = {name: [] for name in replays}
    for _ in range(repeats):
        for name, replay in replays.items():
            samples[name].append(replay.microseconds())
    return samples
