"""The quantized KV cache: layers of a transformers cache that hold packed codes, one scale and minimum per vector."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from atomcli.formats.kv import dequantize_kv, quantize_kv
from atomcli.formats.scheme import KVFormat
from atomcli.runtime.paged_cache import PagedLayer

_STATES = ("keys", "key_scale", "key_minimum", "values", "value_scale", "value_minimum")


class Rotations:
    """RoPE's cosines and sines of every cached token, for keys (or key biases) that are rotated when they are read.

    One copy serves all layers of a cache: (batch or 1, tokens, head_dim / 2) each, in the model's dtype.
    """

    def __init__(self) -> None:
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def append(self, cos: Tensor, sin: Tensor) -> None:
        """Add the rotations of new tokens; cos, sin (batch or 1, tokens, head_dim), whose two halves are equal."""
        half = cos.shape[-1] // 2
        self.cos = _cat(self.cos, cos[..., :half])
        self.sin = _cat(self.sin, sin[..., :half])

    def last(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rotations of the last `tokens` tokens, (batch or 1, tokens, head_dim) each."""
        assert self.cos is not None
        assert self.sin is not None
        cos, sin = self.cos[:, -tokens:].to(device), self.sin[:, -tokens:].to(device)
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in this order."""
        if self.cos is not None and self.sin is not None and self.cos.shape[0] > 1:
            self.cos, self.sin = self.cos[rows.to(self.cos.device)], self.sin[rows.to(self.sin.device)]

    def repeat(self, repeats: int) -> None:
        """Repeat each batch row."""
        if self.cos is not None and self.sin is not None and self.cos.shape[0] > 1:
            self.cos = self.cos.repeat_interleave(repeats, dim=0)
            self.sin = self.sin.repeat_interleave(repeats, dim=0)

    def drop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens."""
        if self.cos is not None and self.sin is not None:
            self.cos, self.sin = self.cos[:, :-tokens], self.sin[:, :-tokens]

    def clear(self) -> None:
        """Forget everything."""
        self.cos = self.sin = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.cos, self.sin) if t is not None)


class QuantizedKVLayer(DynamicLayer):
    """One layer's keys and values, packed: uint8 codes (batch, heads, tokens, bytes), fp16 scale and minimum.

    `update` takes the vectors to store and returns all stored ones, dequantized, fp32. The layer that owns the
    rotations keeps them in step with its tokens; the others only read them.
    """

    def __init__(self, kv: KVFormat, rotations: Rotations, owns_rotations: bool) -> None:
        super().__init__()
        self.kv, self.rotations, self.owns_rotations = kv, rotations, owns_rotations
        for name in _STATES:
            setattr(self, name, None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember the dtype and device of the states, as every cache layer does."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store (batch, heads, tokens, head_dim) vectors; `rotation` is (cos, sin) of the new tokens, where needed."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rotation = kwargs.get("rotation")
        if rotation is not None and self.owns_rotations:
            self.rotations.append(*rotation)
        new = (*quantize_kv(key_states, self.kv.element), *quantize_kv(value_states, self.kv.element))
        states = [_cat(getattr(self, name), added, dim=2) for name, added in zip(_STATES, new, strict=True)]
        self._keep(states, key_states.shape[-2])
        keys = dequantize_kv(states[0], states[1], states[2], self.kv.element)
        values = dequantize_kv(states[3], states[4], states[5], self.kv.element)
        return keys, values

    def _keep(self, states: list[Tensor], added: int) -> None:
        for name, state in zip(_STATES, states, strict=True):
            setattr(self, name, state)

    @property
    def nbytes(self) -> int:
        """Bytes this layer holds, its share of the rotations included."""
        held = sum(getattr(self, name).nbytes for name in _STATES if getattr(self, name) is not None)
        return held + (self.rotations.nbytes if self.owns_rotations else 0)

    def get_seq_length(self) -> int:
        """Number of cached tokens."""
        return 0 if self.keys is None else self.keys.shape[2]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`."""
        self._map(lambda state: state[indices.to(state.device)])
        if self.owns_rotations:
            self.rotations.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))
        if self.owns_rotations:
            self.rotations.repeat(repeats)

    def crop(self, tokens_to_remove: int, **kwargs: Any) -> None:
        """Forget the last tokens: a negative number of them, or a positive length to keep (the older meaning)."""
        length = self.get_seq_length()
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        if remove:
            self._map(lambda state: state[:, :, :-remove])
            if self.owns_rotations:
                self.rotations.drop(remove)

    def reset(self) -> None:
        """Forget everything."""
        for name in _STATES:
            setattr(self, name, None)
        if self.owns_rotations:
            self.rotations.clear()
        self.is_initialized = False

    def offload(self) -> None:
        """Move the packed states to the CPU."""
        self._map(lambda state: state.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Bring the packed states back to their device."""
        if self.is_initialized:
            self._map(lambda state: state.to(self.device, non_blocking=True))

    def _map(self, change: Any) -> None:
        for name in _STATES:
            state = getattr(self, name)
            if state is not None:
                setattr(self, name, change(state))


class QuantizedSlidingKVLayer(QuantizedKVLayer):
    """A quantized layer that holds only the tokens the next one can still see through a sliding window."""

    is_sliding = True

    def __init__(self, kv: KVFormat, rotations: Rotations, owns_rotations: bool, window: int) -> None:
        super().__init__(kv, rotations, owns_rotations)
        self.sliding_window, self.cumulative_length, self.record_past = window, 0, False

    def activate_past_recording(self) -> None:
        """Hold all tokens until `crop` is called, for speculative decoding."""
        self.record_past = True

    def _keep(self, states: list[Tensor], added: int) -> None:
        self.cumulative_length += added
        if not self.record_past:
            # Cloned, so that the tokens outside the window are really freed.
            length = states[0].shape[2]
            keep = min(length, self.sliding_window - 1)
            states = [state[:, :, length - keep :].clone() if keep < length else state for state in states]
        super()._keep(states, added)

    def get_seq_length(self) -> int:
        """Number of tokens seen, cached or not."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the next `query_length` queries attend to."""
        offset = max(self.cumulative_length - self.sliding_window + 1, 0)
        return min(self.cumulative_length, self.sliding_window - 1) + query_length, offset

    def crop(self, tokens_to_remove: int, **kwargs: Any) -> None:
        """Forget the last tokens; once the window has been full this needs `activate_past_recording` beforehand."""
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError("A sliding window that was full can't be cropped: older tokens are gone.")
        length = self.cumulative_length
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        super().crop(-remove)
        self.cumulative_length -= remove
        held = 0 if self.keys is None else self.keys.shape[2]
        excess = held - (self.sliding_window - 1)
        if excess > 0:
            self._map(lambda state: state[:, :, excess:].clone())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.cumulative_length = 0


def quantized_layer(cache: Cache, index: int, kv: KVFormat) -> QuantizedKVLayer | None:
    """Layer `index` of a cache as a quantized one, or None where the cache is of another kind (a static one).

    A growing layer that is still empty is replaced: the caches that transformers makes by default, in `generate` and
    in a plain forward, become quantized ones without being asked for.
    """
    replicated: Any = getattr(cache, "layer_class_to_replicate", None)
    if replicated is DynamicLayer:
        while len(cache.layers) <= index:
            cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[index]
    quantized: Any
    if isinstance(layer, QuantizedKVLayer):
        return layer
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.is_initialized:
        return None
    owner = next((other for other in cache.layers if isinstance(other, QuantizedKVLayer)), None)
    rotations = Rotations() if owner is None else owner.rotations
    if isinstance(layer, DynamicSlidingWindowLayer):
        quantized = QuantizedSlidingKVLayer(kv, rotations, owner is None, int(layer.sliding_window))
        quantized.record_past = getattr(layer, "record_past", False)
    else:
        quantized = QuantizedKVLayer(kv, rotations, owner is None)
    cache.layers[index] = quantized
    return quantized


def cache_bytes(cache: Cache) -> int:
    """Bytes that a cache holds, quantized or not."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, QuantizedKVLayer | PagedLayer):
            total += layer.nbytes
        else:
            total += sum(state.nbytes for state in (layer.keys, layer.values) if state is not None)
    return total


def _cat(held: Tensor | None, added: Tensor, dim: int = 1) -> Tensor:
    if held is None:
        return added
    if held.shape[0] != added.shape[0]:
        # Positions may be given once for the batch in one call and per row in another.
        rows = max(held.shape[0], added.shape[0])
        held, added = held.expand(rows, *held.shape[1:]), added.expand(rows, *added.shape[1:])
    return torch.cat([held, added], dim=dim)
