"""Linears of 16-bit weights on a CPU whose arithmetic has 32 bits.

Without AVX-512 torch multiplies bfloat16 and fp16 matrices by a loop, many times slower than fp32 ones: the parent of
the demo model takes 17 s for 512 tokens on one core of an EPYC, and 3.6 s this way. Both sum in fp32 and round once,
so the numbers are the same up to the order of a sum.
"""

from functools import cache

import torch
from torch import Tensor, nn

FEWEST_ROWS = 32  # with fewer, converting the weight takes longer than the loop


class WideLinear(nn.Linear):
    """An nn.Linear that multiplies many rows on a CPU in fp32; everywhere else, and for few, it is one."""

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) -> (..., out_features) in the same dtype."""
        dtype, rows = input.dtype, input.numel() // self.in_features
        same = input.is_cpu and self.weight.dtype == dtype
        if not same or rows < FEWEST_ROWS or multiplies(dtype):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias).to(dtype)


def widen(module: nn.Module) -> None:
    """Make every nn.Linear of the module a WideLinear; its parameters stay what they are, on any device."""
    for each in module.modules():
        if type(each) is nn.Linear:
            each.__class__ = WideLinear


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype` as they are."""
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in checks:
        return True
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, checks[dtype])())
