"""Panels: runs of columns that are worked through one after the other, as one launch on a GPU.

A column's turn is a handful of tiny operations, and a panel of 128 columns takes a thousand of them: on a GPU their
launches cost far more than their work. There a panel is recorded once for its shapes as a CUDA graph and replayed.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from atomcli.formats.grids import Grid

# Columns whose updates stay inside a cache-sized panel before they reach the rest of the matrix in one product.
PANEL = 128

Work = Callable[..., None]
"""A function of a grid and tensors that writes into its tensors, and whose operations depend on their shapes alone."""


def run_panel(work: Work, grid: Grid, *tensors: Tensor) -> None:
    """work(grid, *tensors), by replaying its recording where the tensors lie on a GPU."""
    if not tensors[0].is_cuda:
        work(grid, *tensors)
        return
    shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
    graph, held = _recorded(work, grid, shapes, tensors[0].device)
    for own, given in zip(held, tensors, strict=True):
        own.copy_(given)
    graph.replay()
    for own, given in zip(held, tensors, strict=True):
        given.copy_(own)


@lru_cache(maxsize=32)
def _recorded(
    work: Work, grid: Grid, shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...], device: torch.device
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """The recording of `work` and the tensors it works on."""
    # A recording outlives the mode it was made in, and tensors of inference mode can't be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        held = tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            work(grid, *held)  # libraries set themselves up at their first call, which can't be recorded
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work(grid, *held)
    return graph, held
