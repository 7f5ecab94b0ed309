"""The cache that transformers' `generate` fills where kernels attend: pages that hold 4 or 8 bits, read as they are.

A row of the batch is a sequence of its own: tokens that the attention mask hides (padding) are neither stored nor
attended to, so key j of a row is its j-th real token. All layers of a cache share that bookkeeping; page w of row b is
page w * rows + b of every layer's pool, which grows at its end.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from atomcli.errors import UnsupportedError
from atomcli.kernels.pages import PageFormat
from atomcli.runtime import memory

_SPARE_PAGES = 4  # beyond what is needed, so that a pool doesn't grow at every page


@dataclass(frozen=True)
class NewTokens:
    """The tokens of one forward pass that are stored, T of B sequences; see `runtime.fused.Step` for the tensors.

    `rows` int64 (T,) are their places among all B * Q tokens of the pass, None where these are all.
    """

    rows: Tensor | None
    cos: Tensor
    sin: Tensor
    slots: Tensor
    query_starts: Tensor | None


class Sequences:
    """What all layers of a cache share: how long each row's sequence is and which pages hold it.

    With `keeps_rope` also RoPE's cosines and sines of every position, for key biases that are rotated on reading.
    """

    def __init__(self, page: int, layers: int, keeps_rope: bool = False) -> None:
        self.page, self.layers, self.keeps_rope = page, layers, keeps_rope
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.columns = 0  # tokens seen of each row, padding included
        self.width = 0  # pages of each row
        self.hidden: Tensor | None = None  # bool (B, columns): padding; None where there was none
        self.lengths: Tensor | None = None
        self.table: Tensor | None = None
        self.new: NewTokens | None = None
        self.rope: tuple[Tensor, Tensor] | None = None  # fp32 (positions, head_dim / 2); the last row is no position's

    def extend(self, batch: int, count: int, mask: Tensor | None, cos: Tensor, sin: Tensor) -> None:
        """Take in `count` more tokens of each row; mask (B, 1, count, keys) as transformers makes it, cos, sin (B or 1,
        count, head_dim).

        Raises UnsupportedError for a mask that is not causal up to padding.
        """
        device = cos.device
        if self.lengths is None:
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        hidden = self._hidden(mask, batch, count, device)
        self.columns += count
        if self.columns > self.width * self.page or self.table is None:
            self.width = -(-self.columns // self.page) + _SPARE_PAGES
            self.table = self._table(batch, device)
        real = torch.ones(batch, count, dtype=torch.bool, device=device) if hidden is None else ~hidden
        positions = self.lengths[:, None] + real.cumsum(1) - 1
        pages = self.table.gather(1, (positions.clamp(min=0) // self.page)).long()
        slots = torch.where(real, pages * self.page + positions % self.page, -1).flatten()
        counts = real.sum(1)
        self.lengths = (self.lengths + counts).int()
        half = cos.shape[-1] // 2
        cos, sin = (part[..., :half].float().expand(batch, -1, -1).flatten(0, 1) for part in (cos, sin))
        if self.keeps_rope:
            self._keep_rope(cos, sin, torch.where(real, positions, self.width * self.page).flatten())
        if count == 1:
            self.new = NewTokens(None, cos.contiguous(), sin.contiguous(), slots, None)
            return
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        rows = None if hidden is None else real.flatten().nonzero()[:, 0]
        if rows is not None:
            cos, sin, slots = cos[rows], sin[rows], slots[rows]
        self.new = NewTokens(rows, cos.contiguous(), sin.contiguous(), slots, starts)

    def _hidden(self, mask: Tensor | None, batch: int, count: int, device: torch.device) -> Tensor | None:
        """Which of the new tokens are padding, bool (B, count), or None for none."""
        if mask is None:
            if self.hidden is not None:
                self.hidden = torch.nn.functional.pad(self.hidden, (0, count))
            return None
        visible = mask if mask.dtype == torch.bool else mask == 0
        visible = visible[:, 0].expand(batch, -1, -1)
        own = visible[:, :, self.columns :].diagonal(dim1=1, dim2=2)
        past = self.hidden
        if past is None:
            past = torch.zeros(batch, self.columns, dtype=torch.bool, device=device)
        self.hidden = torch.cat([past, ~own], dim=1)
        return ~own

    def _keep_rope(self, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        """Note the rotations of positions (T,); those of padding go to the row after the last position."""
        rows = self.width * self.page + 1
        if self.rope is None or len(self.rope[0]) < rows:
            held = self.rope or (cos[:0], sin[:0])
            grown = [torch.cat([part, part.new_zeros(rows - len(part), part.shape[1])]) for part in held]
            self.rope = (grown[0], grown[1])
        self.rope[0][positions], self.rope[1][positions] = cos, sin

    def check(self, mask: Tensor | None, window: int | None) -> None:
        """Raise UnsupportedError for a prompt's mask that hides more than padding, the future and what is too far."""
        if mask is None or self.hidden is None or mask.shape[2] == 1:
            return
        visible = mask if mask.dtype == torch.bool else mask == 0
        keys = torch.arange(self.columns, device=mask.device)
        queries = keys[self.columns - mask.shape[2] :, None]
        expected = keys <= queries
        if window is not None:
            expected = expected & (keys > queries - window)
        padding = self.hidden
        same = visible[:, 0] == (expected & ~padding[:, None])
        if not bool((same | padding[:, self.columns - mask.shape[2] :, None]).all()):
            raise UnsupportedError(
                "The attention mask hides more than padding and the future, which the attention kernels can't",
                "Pass a 2D attention mask, or run the model on the CPU.",
            )

    def remove(self, columns: int) -> None:
        """Forget the last `columns` tokens of each row."""
        assert self.lengths is not None
        gone: Tensor | int = columns
        if self.hidden is not None:
            gone = (~self.hidden[:, self.columns - columns :]).sum(1)
            self.hidden = self.hidden[:, : self.columns - columns]
        self.lengths = (self.lengths - gone).int()
        self.columns -= columns

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in this order."""
        assert self.lengths is not None
        self.lengths = self.lengths[rows]
        self.hidden = None if self.hidden is None else self.hidden[rows]
        self.table = self._table(len(rows), self.lengths.device)

    def _table(self, batch: int, device: torch.device) -> Tensor:
        pages = torch.arange(self.width * batch, dtype=torch.int32, device=device)
        return pages.view(self.width, batch).T.contiguous()


class PagedLayer(DynamicLayer):
    """One layer's pages in a transformers cache; the layer that owns the shared bookkeeping keeps it in step."""

    def __init__(self, fmt: PageFormat, sequences: Sequences, owns_sequences: bool) -> None:
        super().__init__()
        self.format, self.sequences, self.owns_sequences = fmt, sequences, owns_sequences
        self.pool: Tensor | None = None
        self.batch = 0

    def room(self, batch: int, kv_heads: int, device: torch.device) -> Tensor:
        """The layer's pool, large enough for what the sequences hold now.

        Raises RunError, before any layer's pool has grown, when those of all layers would not fit into memory.
        """
        self.is_initialized, self.batch, self.device = True, batch, device
        pages = self.sequences.width * batch
        held = 0 if self.pool is None else self.pool.shape[0]
        if held < pages:
            if self.owns_sequences:
                page_bytes, layers = kv_heads * self.format.bytes, self.sequences.layers
                # Each pool is copied as it grows, one after the other.
                budget = memory.free_bytes(device) + held * page_bytes * (layers - 1)
                memory.require_pages(
                    self.format.page, page_bytes * layers, pages, batch, self.sequences.columns, budget
                )
            more = self.format.allocate(pages - held, kv_heads, device)
            self.pool = more if self.pool is None else torch.cat([self.pool, more])
        assert self.pool is not None
        return self.pool

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Pages are written and read by the attention kernels alone."""
        raise UnsupportedError("Keys and values in pages are stored by atom's attention, not by Cache.update.")

    @property
    def nbytes(self) -> int:
        """Bytes of the pages."""
        return 0 if self.pool is None else self.pool.nbytes

    def get_seq_length(self) -> int:
        """Number of tokens seen of each row, padding included."""
        return self.sequences.columns if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the next `query_length` queries attend to."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int, **kwargs: Any) -> None:
        """Forget the last tokens: a negative number of them, or a positive length to keep (the older meaning)."""
        length = self.sequences.columns
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        if remove and self.owns_sequences:
            self.sequences.remove(remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`; each row gets pages of its own."""
        if self.pool is None:
            return
        indices = indices.to(self.pool.device)
        by_row = self.pool.view(-1, self.batch, *self.pool.shape[1:])
        self.pool = by_row.index_select(1, indices).flatten(0, 1)
        self.batch = len(indices)
        if self.owns_sequences:
            self.sequences.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        self.pool, self.is_initialized = None, False
        if self.owns_sequences:
            self.sequences.clear()

    def offload(self) -> None:
        """Move the pages to the CPU."""
        self.pool = None if self.pool is None else self.pool.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Bring the pages back to their device."""
        if self.pool is not None:
            self.pool = self.pool.to(self.device, non_blocking=True)


def paged_layer(cache: Cache, index: int, fmt: PageFormat, layers: int, keeps_rope: bool = False) -> PagedLayer | None:
    """Layer `index` of a cache of `layers` layers as pages, or None where the cache is of another kind (a static one).

    A growing layer that is still empty is replaced: the caches that transformers makes by default hold pages then.
    `keeps_rope` is for layers whose key biases are added on reading.
    """
    replicated: Any = getattr(cache, "layer_class_to_replicate", None)
    if replicated is DynamicLayer:
        while len(cache.layers) <= index:
            cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[index]
    if isinstance(layer, PagedLayer):
        return layer
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.is_initialized:
        return None
    owner = next((other for other in cache.layers if isinstance(other, PagedLayer)), None)
    sequences = Sequences(fmt.page, layers, keeps_rope) if owner is None else owner.sequences
    paged = PagedLayer(fmt, sequences, owner is None)
    cache.layers[index] = paged
    return paged
