"""CUDA graphs of steps on static buffers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def capture(run: Callable[[], Tensor], device: torch.device, memory: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of run() and the tensor that a replay leaves its answer in.

    It runs once before, to load kernels, so its buffers must then ask for nothing that may not happen. `memory` is a
    pool that graphs share which never run at the same time.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory):
        answer = run()
    return graph, answer
