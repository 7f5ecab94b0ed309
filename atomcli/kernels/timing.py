"""Times of kernels without the cost of launching them: replays of a CUDA graph, between two events."""

from collections.abc import Callable, Sequence

import torch


def graph_times(products: Sequence[Callable[[], object]], repeats: int = 7) -> list[float]:
    """Microseconds of one call, a sample per replay of a graph of them all; a short round is captured several times."""
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
    samples = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / (rounds * len(products)))
    return samples
