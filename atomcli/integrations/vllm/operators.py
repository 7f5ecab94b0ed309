"""What torch.compile sees of our layers: operators that find the layer by the address of a tensor.

A layer's name would be a constant in the graph, and every layer would be compiled anew; a tensor is an argument.
Inside, nothing depends on the values of tensors, so that CUDA graphs hold what the operators launch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_SERVED: dict[int, Callable[..., Tensor]] = {}


def handle() -> Tensor:
    """A tensor, on the device that vLLM makes a layer on, to be the layer's address."""
    return torch.zeros(1, dtype=torch.int8)


def serve(handle: Tensor, run: Callable[..., Tensor]) -> None:
    """Let the operators call `run` for this handle."""
    _SERVED[handle.data_ptr()] = run


def _linear(x: Tensor, handle: Tensor, out_features: int) -> Tensor:
    return _SERVED[handle.data_ptr()](x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], out_features)


def _experts(x: Tensor, chosen: Tensor, weights: Tensor, handle: Tensor) -> Tensor:
    return _SERVED[handle.data_ptr()](x, chosen, weights)


def _linear_shape(x: Any, handle: Any, out_features: Any) -> Any:
    return x.new_empty((*x.shape[:-1], out_features))


_library = torch.library.Library("atom", "FRAGMENT")
for _schema, _run, _shape in (
    ("served_linear(Tensor x, Tensor handle, SymInt out_features) -> Tensor", _linear, _linear_shape),
    (
        "served_experts(Tensor x, Tensor chosen, Tensor weights, Tensor handle) -> Tensor",
        _experts,
        lambda x, *rest: torch.empty_like(x),
    ),
):
    _library.define(_schema)
    _name = _schema.partition("(")[0]
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _run, _key)
    torch.library.register_fake(f"atom::{_name}", _shape, lib=_library)
