"""Weights of no meaning, for `--load-format dummy`: the time of a model without its files."""

from collections.abc import Mapping

import torch
from torch import Tensor


def fill(tensors: Mapping[str, Tensor]) -> None:
    """Random codes, small scales, and the layout that changes nothing, into the tensors of a linear by suffix."""
    for name, tensor in tensors.items():
        if name == "permutation":
            tensor.copy_(torch.arange(len(tensor)))
        elif name == "signs":
            tensor.fill_(1)
        elif name == "weight_exponent":
            tensor.fill_(127 - 10)
        elif tensor.dtype in (torch.uint8, torch.int8):
            tensor.random_(-15, 16) if name == "weight_multiplier" else tensor.random_()
        elif name in ("weight", "bias"):
            tensor.normal_(std=0.02)
        else:
            tensor.fill_(1e-3)
