"""Tensor parallelism: which part of a linear's tensors one rank holds. Plain torch, no vLLM.

A rank holds rows, of every quantized linear outside of experts. Codes, scales and outliers are cut alike, no group is
cut, and each output is summed where one rank would sum it: what the kernels add up as integers is the same number. Of
o and down, whose input comes in parts, the ranks gather it, quantize all of it and gather what their rows give. vLLM
would give a rank input channels instead and add up over the ranks: rounded parts of a sum are another sum.
"""

from torch import Tensor

# One for all rows.
WHOLE = ("permutation", "signs", "weight_tensor_scale")


def tensor_part(suffix: str, tensor: Tensor, rows: tuple[int, int]) -> Tensor:
    """Rows [start, stop) of a checkpoint tensor of a linear; what belongs to all rows stays whole."""
    return tensor if suffix in WHOLE else tensor[rows[0] : rows[1]]
