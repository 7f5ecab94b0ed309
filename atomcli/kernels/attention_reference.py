"""Attention on a paged cache in plain torch: what the kernels are tested against, and what runs where none serves."""

import torch
from torch import Tensor

from atomcli.formats.groups import apply_hadamard, hadamard_sizes
from atomcli.kernels.pages import PageFormat

Rope = tuple[Tensor, Tensor]  # cosines and sines, fp32 (positions, head_dim / 2)


def append(
    pool: Tensor, fmt: PageFormat, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, slots: Tensor,
    hadamard: bool, rotate_keys: bool, center: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See kernels.attention.append; everything is computed in fp32 and rounded once."""
    rotated = rotate(query, cos, sin)
    stored = rotate(key, cos, sin) if rotate_keys else key.float()
    if hadamard:
        rotated, stored = hadamard_heads(rotated), hadamard_heads(stored)
    if center is not None:
        stored = stored - center
    kept = slots >= 0
    pages, offsets = slots[kept] // fmt.page, slots[kept] % fmt.page
    views, keys, values = fmt.views(pool), fmt.encode(stored[kept]), fmt.encode(value[kept])
    views.keys[pages, :, offsets] = keys.codes
    views.values[pages, :, offsets] = values.codes
    views.numbers[pages, :, offsets] = torch.cat([keys.numbers, values.numbers], dim=-1)
    return rotated.to(query.dtype)


def attend(
    query: Tensor, pool: Tensor, fmt: PageFormat, page_table: Tensor, query_starts: Tensor, lengths: Tensor,
    scaling: float, window: int | None, key_bias: Tensor | None, value_bias: Tensor | None, rope: Rope | None,
    hadamard: bool, keys_rotated: bool, out: Tensor,
) -> None:  # fmt: skip
    """Sequence after sequence, in fp32: see kernels.attention.prefill. Decoding has one query per sequence."""
    starts, counts = query_starts.tolist(), lengths.tolist()
    for row, length in enumerate(counts):
        queries = query[starts[row] : starts[row + 1]]
        if not length or not len(queries):
            out[starts[row] : starts[row + 1]] = 0
            continue
        keys, values = gather(pool, fmt, page_table[row], length)
        positions = torch.arange(length, device=query.device)
        keys = _restored(keys, positions, key_bias, rope, hadamard, keys_rotated)
        group = query.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("thd,lhd->htl", queries.float(), keys) * scaling
        own = positions[length - len(queries) :, None]
        visible = positions <= own
        if window is not None:
            visible &= positions > own - window
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        attended = torch.einsum("htl,lhd->thd", weights, values)
        if value_bias is not None:
            attended = attended + value_bias.repeat_interleave(group, 0)
        out[starts[row] : starts[row + 1]] = attended.to(out.dtype)


def gather(pool: Tensor, fmt: PageFormat, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` keys and values fp32 (length, kv_heads, head_dim) of the sequence whose pages these are."""
    held = fmt.views(pool[pages[: -(-length // fmt.page)].long()])
    keys, values, numbers = (part.transpose(1, 2).flatten(0, 1)[:length] for part in held)
    side = numbers.shape[-1] // 2
    return fmt.decode(keys, numbers[..., :side]), fmt.decode(values, numbers[..., side:])


def _restored(
    keys: Tensor, positions: Tensor, bias: Tensor | None, rope: Rope | None, hadamard: bool, rotated: bool
) -> Tensor:
    """The keys (length, kv_heads, head_dim) that queries meet: the bias comes back, and the rotation where due."""
    if bias is None and rotated:
        return keys
    assert rope is not None
    cos, sin = rope[0][positions], rope[1][positions]
    if not rotated:
        return rotate(keys if bias is None else keys + bias, cos, sin)
    assert bias is not None
    turned = rotate(bias.expand(len(positions), *bias.shape), cos, sin)
    return keys + (hadamard_heads(turned) if hadamard else turned)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (tokens, heads, head_dim) by cos, sin fp32 (tokens, head_dim / 2), in fp32."""
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def hadamard_heads(x: Tensor) -> Tensor:
    """The Hadamard transform over head_dim of x (..., head_dim), fp32; its own inverse."""
    head_dim = x.shape[-1]
    return apply_hadamard(x, hadamard_sizes(head_dim, 1 << (head_dim.bit_length() - 1)))
