"""Keys and values: asymmetric quantization per token and head, as the cache stores them."""

import torch
from torch import Tensor

from atomcli.formats import grids, packing

_LEVELS = {"int4": 15, "int8": 255}


def quantize_kv(x: Tensor, element: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize x (..., head_dim) to (codes, scale, minimum); v = scale * code + minimum, one pair per vector.

    codes: uint8 (..., head_dim / 2) packed for int4, (..., head_dim) for int8. scale, minimum: fp16 (...,).
    """
    x = x.float()
    levels = _LEVELS[element]
    minimum = x.amin(dim=-1).half()
    scale = ((x.amax(dim=-1) - minimum.float()) / levels).half()
    ratio = (x - minimum.float()[..., None]) * grids.reciprocal(scale)[..., None]
    codes = ratio.round().clamp(0, levels).to(torch.uint8)
    return (packing.pack_nibbles(codes.view(torch.int8)) if element == "int4" else codes), scale, minimum


def dequantize_kv(codes: Tensor, scale: Tensor, minimum: Tensor, element: str) -> Tensor:
    """The vectors (..., head_dim) fp32 that `quantize_kv` stored."""
    if element == "int4":
        codes = packing.unpack_nibbles(codes, codes.shape[-1] * 2, signed=False)
    return codes.float() * scale.float()[..., None] + minimum.float()[..., None]
