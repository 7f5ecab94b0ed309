"""Attention with a quantized KV cache: one module in place of every family's own.

What is cached, per token and head: the key before or after RoPE (after: in the Hadamard basis, if asked for) and the
value, both without their projections' biases. What is attended to is computed from what is cached, with or without
a cache, so that the two give the same numbers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atomcli.errors import UnsupportedError
from atomcli.formats.groups import apply_hadamard, hadamard_sizes
from atomcli.formats.kv import dequantize_kv, quantize_kv
from atomcli.formats.scheme import KVFormat
from atomcli.kernels.attention import append, decode, prefill, why_not
from atomcli.kernels.pages import PageFormat
from atomcli.models.registry import describe
from atomcli.runtime.cache import quantized_layer
from atomcli.runtime.linear import QuantLinear
from atomcli.runtime.paged_cache import PagedLayer, paged_layer


class Attention(nn.Module):
    """Self-attention over projections, head norms and scaling taken from transformers' own module.

    `key_center` (kv_heads, head_dim) is what a centered cache stores keys without, in the basis of the cache.
    `key_observer` gets the keys after RoPE without their bias, (batch, kv_heads, tokens, head_dim).

    Raises UnsupportedError for a format that would multiply a key bias by a Hadamard: the bias towers over what the
    keys say, and 4 bits then hold little but the bias.
    """

    is_causal = True
    q_proj: nn.Linear | QuantLinear
    k_proj: nn.Linear | QuantLinear
    v_proj: nn.Linear | QuantLinear
    o_proj: nn.Linear | QuantLinear
    key_center: Tensor | None

    def __init__(self, original: Any, kv: KVFormat) -> None:
        super().__init__()
        self.config, self.layer_idx = original.config, int(original.layer_idx)
        self.head_dim, self.scaling = int(original.head_dim), float(original.scaling)
        self.num_key_value_groups = int(original.num_key_value_groups)
        self.attention_dropout = float(original.attention_dropout)
        self.q_proj, self.k_proj = original.q_proj, original.k_proj
        self.v_proj, self.o_proj = original.v_proj, original.o_proj
        self.q_norm, self.k_norm = getattr(original, "q_norm", None), getattr(original, "k_norm", None)
        self.kv = kv
        self._check(kv)
        self.key_observer: Callable[[Tensor], None] | None = None
        weight, center = original.k_proj.weight, None
        if kv.centered and kv.element != "float":
            center = weight.new_empty(weight.shape[0] // self.head_dim, self.head_dim)
        self.register_buffer("key_center", center)

    def _check(self, kv: KVFormat) -> None:
        if kv.element == "float" or self.k_proj.bias is None:
            return
        if kv.hadamard and not kv.bias_free:
            raise UnsupportedError(
                "kv_cache.hadamard would rotate keys that still contain their projection bias",
                "Set kv_cache.bias_free: true, or kv_cache.hadamard: false.",
            )
        if self.k_norm is not None and (kv.hadamard or kv.bias_free):
            raise UnsupportedError(
                "Keys that are normalized after their bias was added can't be cached without it",
                "Set kv_cache.bias_free: false and kv_cache.hadamard: false.",
            )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (batch, tokens, hidden) -> (batch, tokens, hidden), as transformers' attention modules."""
        cos, sin = position_embeddings
        pages = self._pages(past_key_values, hidden_states)
        if pages is not None:
            return self.o_proj(self._attend_in_pages(pages, hidden_states, cos, sin, attention_mask)), None
        quantized = self.kv.element != "float"
        keep_bias = not (quantized and self.kv.bias_free)
        query = rotate(self._heads(self.q_proj(hidden_states), self.q_norm), cos, sin)
        if self.key_observer is not None:
            observed = self._heads(_project(self.k_proj, hidden_states, False), self.k_norm)
            self.key_observer(rotate(observed, cos, sin))
        key = self._heads(_project(self.k_proj, hidden_states, keep_bias), self.k_norm)
        value = self._heads(_project(self.v_proj, hidden_states, keep_bias))
        if quantized:
            if self.kv.position == "after_rope":
                key = rotate(key, cos, sin)
            if self.kv.hadamard:
                query, key = head_hadamard(query).to(query.dtype), head_hadamard(key)
            if self.key_center is not None:
                key = key.float() - self.key_center[:, None].float()
            key, value = self._stored(key, value, cos, sin, past_key_values, hidden_states.dtype)
        else:
            key = rotate(key, cos, sin)
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
        attended, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        if not keep_bias and self.v_proj.bias is not None:
            # The weights of a query sum to one, so a bias of the values is a bias of what is attended.
            bias = self.v_proj.bias.view(-1, self.head_dim).repeat_interleave(self.num_key_value_groups, dim=0)
            attended = attended + bias.to(attended.dtype)
        return self.o_proj(attended.reshape(*hidden_states.shape[:-1], -1)), weights

    def _pages(self, cache: Cache | None, x: Tensor) -> PagedLayer | None:
        """This layer's pages where kernels store and read them, else None."""
        if cache is None or self.kv.element == "float" or self.key_observer is not None:
            return None
        if self.head_dim % 32:  # no page is made for it
            return None
        fmt = PageFormat(self.kv.element, self.head_dim)
        reason = why_not(fmt, x.device, x.dtype, self.kv.position == "after_rope")
        has_bias = self.kv.bias_free and self.k_proj.bias is not None
        layers = int(self.config.num_hidden_layers)
        return paged_layer(cache, self.layer_idx, fmt, layers, has_bias) if reason is None else None

    def _attend_in_pages(
        self, layer: PagedLayer, hidden_states: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None
    ) -> Tensor:
        """What `o_proj` gets, (batch, tokens, heads * head_dim), by the kernels over the layer's pages."""
        batch, count, _ = hidden_states.shape
        sequences, window = layer.sequences, describe(self.config).window(self.config, self.layer_idx)
        if layer.owns_sequences:
            sequences.extend(batch, count, mask, cos, sin)
        sequences.check(mask, window)
        new, lengths, table = sequences.new, sequences.lengths, sequences.table
        assert new is not None
        assert lengths is not None
        assert table is not None
        add_bias = not self.kv.bias_free
        parts = (
            (self.q_proj(hidden_states), self.q_norm),
            (_project(self.k_proj, hidden_states, add_bias), self.k_norm),
            (_project(self.v_proj, hidden_states, add_bias), None),
        )
        heads = [self._heads(x, norm).transpose(1, 2).flatten(0, 1) for x, norm in parts]
        query, key, value = heads if new.rows is None else [x[new.rows] for x in heads]
        pool = layer.room(batch, key.shape[1], key.device)
        rotate_keys = self.kv.position == "after_rope"
        center = None if self.key_center is None else self.key_center.float()
        query = append(
            pool, layer.format, query, key, value, new.cos, new.sin, new.slots, self.kv.hadamard, rotate_keys, center
        )
        shared: dict[str, Any] = {
            "window": window,
            "key_bias": None if add_bias else self._head_bias(self.k_proj),
            "value_bias": None if add_bias else self._head_bias(self.v_proj),
            "rope": sequences.rope,
            "hadamard": self.kv.hadamard,
            "keys_rotated": rotate_keys,
        }
        if new.query_starts is None:
            attended = decode(query, pool, layer.format, table, lengths, self.scaling, **shared)
        else:
            starts = new.query_starts
            attended = prefill(query, pool, layer.format, table, starts, lengths, self.scaling, **shared)
        if new.rows is not None:
            padded = attended.new_zeros(batch * count, *attended.shape[1:])
            padded[new.rows] = attended
            attended = padded
        return attended.view(batch, count, -1)

    def _head_bias(self, linear: nn.Linear | QuantLinear) -> Tensor | None:
        return None if linear.bias is None else linear.bias.float().view(-1, self.head_dim)

    def _heads(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(batch, tokens, heads * head_dim) -> (batch, heads, tokens, head_dim)."""
        x = x.view(*x.shape[:-1], -1, self.head_dim)
        return (x if norm is None else norm(x)).transpose(1, 2)

    def _stored(
        self, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys and values as they come back from 4 or 8 bits, past ones included, ready to be attended to."""
        layer = None if cache is None else quantized_layer(cache, self.layer_idx, self.kv)
        if cache is None or layer is None:
            key = dequantize_kv(*quantize_kv(key, self.kv.element), self.kv.element)
            value = dequantize_kv(*quantize_kv(value, self.kv.element), self.kv.element)
        else:
            rotation = (cos, sin) if self._rotates_on_read else None
            key, value = cache.update(key, value, self.layer_idx, rotation=rotation)
            if self._rotates_on_read:
                cos, sin = layer.rotations.last(key.shape[2], key.device)
        key, value = self._restored(key, cos, sin).to(dtype), value.to(dtype)
        if cache is not None and layer is None:
            return cache.update(key, value, self.layer_idx)
        return key, value

    @property
    def _rotates_on_read(self) -> bool:
        return self.kv.position == "before_rope" or (self.kv.bias_free and self.k_proj.bias is not None)

    def _restored(self, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The keys that queries meet, from the cached ones: the bias comes back, and the rotation where it is due."""
        bias = self.k_proj.bias if self.kv.bias_free else None
        if bias is not None:
            bias = bias.float().view(1, -1, 1, self.head_dim)
        if self.kv.position == "before_rope":
            return rotate(key if bias is None else key + bias, cos.float(), sin.float())
        if bias is None:
            return key
        bias = rotate(bias, cos.float(), sin.float())
        return key + (head_hadamard(bias) if self.kv.hadamard else bias)


def head_hadamard(x: Tensor) -> Tensor:
    """x (..., head_dim) times the orthonormal Hadamard that keys are cached in, fp32."""
    head_dim = x.shape[-1]
    return apply_hadamard(x, hadamard_sizes(head_dim, 1 << (head_dim.bit_length() - 1)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (batch, heads, tokens, head_dim) by cos, sin (batch, tokens, head_dim), as transformers applies it."""
    low, high = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-high, low], dim=-1) * sin.unsqueeze(1)


def _project(linear: nn.Linear | QuantLinear, x: Tensor, add_bias: bool) -> Tensor:
    if add_bias or linear.bias is None:
        return linear(x)
    if isinstance(linear, QuantLinear):
        return linear(x, add_bias=False)
    return nn.functional.linear(x, linear.weight)
