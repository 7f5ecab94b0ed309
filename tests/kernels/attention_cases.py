"""Paged attention problems with random lengths, and their oracle: fp64 attention, which never sees pages."""

from dataclasses import dataclass

import torch
from torch import Tensor

from atomcli.formats.kv import dequantize_kv, quantize_kv
from atomcli.kernels.pages import Element, PageFormat


@dataclass
class Problem:
    """Sequences whose keys and values lie in random pages of a poisoned pool; `queries` of each are its last tokens."""

    fmt: PageFormat
    query: Tensor  # (sum of queries, heads, head_dim), rotated
    pool: Tensor
    page_table: Tensor
    starts: Tensor
    lengths: Tensor
    keys: list[Tensor]  # of each sequence, as dequantized, fp64 (length, kv_heads, head_dim)
    values: list[Tensor]

    def expected(
        self,
        scaling: float,
        window: int | None = None,
        extra_keys: Tensor | None = None,
        value_bias: Tensor | None = None,
    ) -> Tensor:
        """fp64 (sum of queries, heads, head_dim); extra_keys (positions, kv_heads, head_dim) are added to the keys."""
        rows = []
        for b, length in enumerate(self.lengths.tolist()):
            queries = self.query[self.starts[b] : self.starts[b + 1]].double()
            if not length:
                rows.append(torch.zeros_like(queries))
                continue
            group = self.query.shape[1] // self.pool.shape[1]
            keys = self.keys[b] if extra_keys is None else self.keys[b] + extra_keys[:length].double()
            values = self.values[b] if value_bias is None else self.values[b] + value_bias.double()
            mask = torch.ones(len(queries), length, dtype=torch.bool).tril(length - len(queries))
            if window is not None:
                mask &= torch.ones_like(mask).triu(length - len(queries) - window + 1)
            attended = torch.nn.functional.scaled_dot_product_attention(
                queries.transpose(0, 1),
                keys.repeat_interleave(group, 1).transpose(0, 1),
                values.repeat_interleave(group, 1).transpose(0, 1),
                attn_mask=mask,
                scale=scaling,
            )
            rows.append(attended.transpose(0, 1))
        return torch.cat(rows)

    def to(self, device: torch.device) -> "Problem":
        """The same problem with what the operators read on `device`; the oracle's side stays."""
        moved = (t.to(device) for t in (self.pool, self.page_table, self.starts, self.lengths))
        return Problem(self.fmt, self.query, *moved, self.keys, self.values)


def stored(x: Tensor, element: Element) -> Tensor:
    """x after a round trip through the cache's numbers, by formats/kv.py, or by torch's own casts."""
    if element == "bf16":
        return x.bfloat16().double()
    if element == "fp8":
        scale = (x.float().abs().amax(-1, keepdim=True) / 448).half().float()
        return ((x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).double()
    return dequantize_kv(*quantize_kv(x, element), element).double()


def problem(
    element: Element,
    lengths: list[int],
    *,
    head_dim: int = 64,
    page: int = 16,
    heads: int = 4,
    kv_heads: int = 2,
    queries: list[int] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    spare_pages: int = 2,
) -> Problem:
    """Random keys and values of these lengths (queries: of each sequence, 1 if not given, 0 for an idle one).

    Every byte that no token owns is 0xFF, which is NaN in each float format: what is read without need shows.
    """
    torch.manual_seed(seed)
    fmt = PageFormat(element, head_dim, page)
    wanted = [-(-length // page) for length in lengths]
    total, most = sum(wanted) + 1, max(*wanted, 1) + spare_pages
    pool = torch.full((total, kv_heads, fmt.bytes), 0xFF, dtype=torch.uint8)
    order = torch.randperm(total, dtype=torch.int32)
    page_table = torch.full((len(lengths), most), -1, dtype=torch.int32)
    counts = [1] * len(lengths) if queries is None else queries
    views, keys, values, used = fmt.views(pool), [], [], 0
    for b, length in enumerate(lengths):
        page_table[b, : wanted[b]] = order[used : used + wanted[b]]
        used += wanted[b]
        # A channel far from zero in the keys and vectors of very different sizes, as real ones are.
        key = torch.randn(length, kv_heads, head_dim) * (0.2 + torch.rand(length, kv_heads, 1) * 3)
        key[..., 3] += 6
        value = torch.randn(length, kv_heads, head_dim) * (0.01 + torch.rand(length, kv_heads, 1)) + 0.5
        encoded = fmt.encode(key), fmt.encode(value)
        token = torch.arange(length)
        where = page_table[b][token // page].long(), token % page
        views.keys[where[0], :, where[1]] = encoded[0].codes
        views.values[where[0], :, where[1]] = encoded[1].codes
        views.numbers[where[0], :, where[1]] = torch.cat([encoded[0].numbers, encoded[1].numbers], -1)
        keys.append(stored(key, element))
        values.append(stored(value, element))
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    query = torch.randn(int(starts[-1]), heads, head_dim).to(dtype)
    return Problem(fmt, query, pool, page_table, starts, torch.tensor(lengths, dtype=torch.int32), keys, values)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; infinite where anything is not finite."""
    actual = actual.double().cpu()
    if not actual.isfinite().all():
        return float("inf")
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def rope_tables(positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines fp32 (positions, head_dim / 2), base 10000."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(positions)[:, None] * frequencies
    return angles.cos(), angles.sin()
