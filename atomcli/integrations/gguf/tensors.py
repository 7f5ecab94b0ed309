"""Rows of Q4_0 and Q8_0: blocks of 32 weights, an fp16 scale before them.

https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

import numpy as np
import torch
from torch import Tensor

from atomcli.formats.scheme import Scheme
from atomcli.formats.weights import QuantizedWeight
from atomcli.integrations.gguf.schema import BLOCK


def row_bytes(scheme: Scheme, channels: int) -> int:
    """The bytes of a row of so many channels in a plain scheme."""
    return channels // BLOCK * (2 + BLOCK * scheme.weights.grid.bits // 8)


def to_rows(weight: QuantizedWeight) -> np.ndarray:
    """The bytes (N, bytes of a row) of a weight in a plain scheme with groups of 32 and one level of scales."""
    rows = weight.shape[0]
    scales = weight.scales().half().numpy().view(np.uint8).reshape(rows, -1, 2)
    codes = weight.body_codes().numpy().reshape(rows, -1, BLOCK)
    if weight.scheme.weights.element == "int4":
        # Byte j of a block has its element j in the low nibble and element j + 16 in the high one.
        unsigned = (codes + 8).astype(np.uint8)
        stored = unsigned[..., : BLOCK // 2] | unsigned[..., BLOCK // 2 :] << 4
    else:
        stored = codes.view(np.uint8)
    return np.concatenate([scales, stored], axis=-1).reshape(rows, -1)


def dense_rows(tensor: Tensor) -> np.ndarray:
    """The bytes of a 16-bit or fp32 tensor, its last dimension in bytes; a vector in fp32, as llama.cpp wants it."""
    if tensor.ndim == 1:
        return tensor.float().numpy()
    return tensor.contiguous().view(torch.uint8).numpy()


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """q's or k's rows (or bias) in llama.cpp's order for its rotary embedding: (i, i + head_dim / 2) become pairs."""
    if not heads:
        return rows
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
