"""Pages: how keys and values lie in a paged cache, and the numbers they hold.

One page keeps `page` tokens of one KV head: the codes of the keys, token after token, the codes of the values, and then
the fp16 scales of each token. A cache is one pool of pages per layer; which page holds which tokens is the page
table's business.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from atomcli.errors import UnsupportedError
from atomcli.formats import grids
from atomcli.formats.kv import dequantize_kv, quantize_kv

Element = Literal["int4", "int8", "fp8", "bf16"]
PAGES = (16, 32, 64)

_BITS = {"int4": 4, "int8": 8, "fp8": 8, "bf16": 16}
# Key scale, key minimum, value scale, value minimum; e4m3 codes have a sign and need no minimum.
_NUMBERS = {"int4": 4, "int8": 4, "fp8": 2, "bf16": 0}
_LARGEST_E4M3 = 448.0


class Vectors(NamedTuple):
    """One side of some tokens: codes uint8 (..., code_bytes) and fp16 (..., 2 | 1 | 0): scale, minimum."""

    codes: Tensor
    numbers: Tensor


class PageViews(NamedTuple):
    """Into a pool: codes uint8 (pages, kv_heads, page, code_bytes), numbers fp16 (pages, kv_heads, page, 4 | 2 | 0)."""

    keys: Tensor
    values: Tensor
    numbers: Tensor


@dataclass(frozen=True)
class PageFormat:
    """What a page holds: `page` tokens of one KV head in `element`.

    int4 and int8 are formats/kv.py: asymmetric, with an fp16 scale and minimum per token and head. fp8 is e4m3 with an
    fp16 scale per token and head, bf16 is as computed. Raises UnsupportedError for anything else.
    """

    element: Element
    head_dim: int
    page: int = 64

    def __post_init__(self) -> None:
        if self.element not in _BITS:
            raise UnsupportedError(f"A page holds {', '.join(get_args(Element))} elements, not {self.element}.")
        if self.page not in PAGES:
            raise UnsupportedError(f"A page holds {', '.join(map(str, PAGES))} tokens, not {self.page}.")
        if self.head_dim < 32 or self.head_dim % 32:
            raise UnsupportedError(f"Pages are made for a head_dim that is a multiple of 32, not {self.head_dim}.")

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one key or value."""
        return self.head_dim * _BITS[self.element] // 8

    @property
    def numbers(self) -> int:
        """fp16 numbers beside one token's codes, keys' and values' together."""
        return _NUMBERS[self.element]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of one KV head, key and value."""
        return 2 * self.code_bytes + 2 * self.numbers

    @property
    def bytes(self) -> int:
        """Bytes of one page of one KV head; a multiple of 16."""
        return self.page * self.bytes_per_token

    def allocate(self, pages: int, kv_heads: int, device: torch.device | str) -> Tensor:
        """A pool uint8 (pages, kv_heads, bytes) for one layer, uninitialized."""
        return torch.empty((pages, kv_heads, self.bytes), dtype=torch.uint8, device=device)

    def views(self, pool: Tensor) -> PageViews:
        """The parts of a pool, sharing its memory."""
        codes = self.page * self.code_bytes
        keys = pool[..., :codes].unflatten(-1, (self.page, self.code_bytes))
        values = pool[..., codes : 2 * codes].unflatten(-1, (self.page, self.code_bytes))
        if not self.numbers:
            return PageViews(keys, values, pool.new_empty((*pool.shape[:-1], self.page, 0), dtype=torch.float16))
        numbers = pool[..., 2 * codes :].view(torch.float16).unflatten(-1, (self.page, self.numbers))
        return PageViews(keys, values, numbers)

    def encode(self, x: Tensor) -> Vectors:
        """x (..., head_dim) as it is stored."""
        if self.element == "bf16":
            codes = x.bfloat16().contiguous().view(torch.uint8)
            return Vectors(codes, x.new_empty((*x.shape[:-1], 0), dtype=torch.float16))
        if self.element == "fp8":
            x = x.float()
            scale = (x.abs().amax(dim=-1) * (1 / _LARGEST_E4M3)).half()
            ratio = x * grids.reciprocal(scale)[..., None]
            codes = ratio.clamp(-_LARGEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn).view(torch.uint8)
            return Vectors(codes, scale[..., None])
        codes, scale, minimum = quantize_kv(x, self.element)
        return Vectors(codes, torch.stack([scale, minimum], dim=-1))

    def decode(self, codes: Tensor, numbers: Tensor) -> Tensor:
        """The vectors fp32 (..., head_dim) that `encode` stored."""
        if self.element == "bf16":
            return codes.contiguous().view(torch.bfloat16).float()
        if self.element == "fp8":
            return codes.contiguous().view(torch.float8_e4m3fn).float() * numbers.float()
        return dequantize_kv(codes, numbers[..., 0], numbers[..., 1], self.element)
