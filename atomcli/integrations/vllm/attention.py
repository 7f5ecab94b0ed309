"""The KV cache of an atom checkpoint in vLLM: keys and values on quantized pages, attended to by kernels.attention.

vLLM keeps its block tables, its prefix cache and its scheduler; it sees pages of so and so many bytes. The cache's
format is the checkpoint's, so nothing has to be asked for on the command line: each attention layer changes its backend
when it is made.
"""

from dataclasses import dataclass
from functools import cache, partial
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.utils import set_weight_attrs
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from atomcli.errors import InputError, UnsupportedError
from atomcli.formats.scheme import KVFormat
from atomcli.kernels import attention, attention_reference
from atomcli.kernels.attention import Rope
from atomcli.kernels.pages import PAGES, PageFormat


@dataclass
class AtomMetadata(AttentionMetadata):
    """What a batch's attention needs, cut once for all layers.

    The first `decodes` of the `tokens` are each all of a sequence's and take the kernel for that; the others are
    prefilled. A sequence's length includes its tokens of this batch.
    """

    tokens: int
    decodes: int
    slots: Tensor  # int64 (tokens,)
    decoded_pages: Tensor  # int32 (decodes, pages)
    decoded_lengths: Tensor  # int32 (decodes,)
    query_starts: Tensor  # int32 (prefilled sequences + 1,), counted from the first of their tokens
    prefilled_pages: Tensor  # int32 (prefilled sequences, pages)
    prefilled_lengths: Tensor  # int32 (prefilled sequences,)
    positions: Tensor | None  # int64 (tokens,), where keys are stored before RoPE


class AtomMetadataBuilder(AttentionMetadataBuilder[AtomMetadata]):
    """Passes vLLM's own tensors on; nothing is copied, nothing waits for the device."""

    reorder_batch_threshold = 1  # sequences with one token come first

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.kv: KVFormat = vllm_config.quant_config.plan.kv_cache

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Whole steps of decoding are captured; positions are made for each batch, so keys before RoPE are not."""
        before_rope = vllm_config.quant_config.plan.kv_cache.position == "before_rope"
        return AttentionCGSupport.NEVER if before_rope else AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AtomMetadata:
        """The metadata of one batch."""
        common = common_attn_metadata
        positions = None
        if self.kv.position == "before_rope":
            positions = _positions(common.query_start_loc, common.seq_lens, common.num_actual_tokens)
        tokens = common.num_actual_tokens
        if common.max_query_len == 1:
            decodes = rows = tokens  # one token each: rows beyond are padding
        else:
            rows = common.num_reqs
            decodes = leading_decodes(common.query_start_loc_cpu[: rows + 1])
        starts = common.query_start_loc[decodes : rows + 1]
        return AtomMetadata(
            tokens=tokens,
            decodes=decodes,
            slots=common.slot_mapping[:tokens],
            decoded_pages=common.block_table_tensor[:decodes],
            decoded_lengths=common.seq_lens[:decodes],
            query_starts=starts - decodes if 0 < decodes < rows else starts,
            prefilled_pages=common.block_table_tensor[decodes:rows],
            prefilled_lengths=common.seq_lens[decodes:rows],
            positions=positions,
        )


class AtomBackend(AttentionBackend):
    """Attention on quantized pages."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """Under which vLLM's log speaks of it."""
        return "ATOM"

    @staticmethod
    def get_impl_cls() -> type["AtomAttention"]:
        """The layers' implementation."""
        return AtomAttention

    @staticmethod
    def get_builder_cls() -> type[AtomMetadataBuilder]:
        """What makes the metadata of a batch."""
        return AtomMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Tokens of a page; vLLM cuts its larger blocks into such."""
        return list(PAGES)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """The largest pages: the longer a run of bytes, the better memory serves it."""
        return max(PAGES)

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """The pool of a layer, for versions of vLLM that ask (0.25); `head_size` is that of `cache_spec`."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        """A page of one head is one run of bytes."""
        from vllm.v1.kv_cache_layout import KVCacheLayout

        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows are a mask."""
        return True


class AtomAttention(AttentionImpl[AtomMetadata]):
    """One layer: append to its pages, then attend to what they hold.

    Queries and keys come rotated from vLLM; for a cache that holds keys before RoPE they are rotated back first.
    """

    def __init__(self, layer: Any, kv: KVFormat, config: Any) -> None:
        self.kv, self.config, self.name = kv, config, layer.layer_name
        self.num_heads, self.num_kv_heads, self.head_size = layer.num_heads, layer.num_kv_heads, layer.head_size
        self.scale, self.window = float(layer.impl.scale), layer.sliding_window
        self.kv_cache_dtype = "auto"
        self.key_bias: Tensor | None = None
        self.value_bias: Tensor | None = None
        self.loaded_center: Tensor | None = None
        self.center: Tensor | None = None
        self.rope: Rope | None = None
        self.turns: Rope | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take the biases that the projections left to the cache, and the rotations where keys need them."""
        vllm = get_current_vllm_config()
        key_bias, value_bias = self.config.cache_biases.get(self.name, (None, None))
        if key_bias is not None:
            self.key_bias = key_bias.float().view(self.num_kv_heads, self.head_size)
            self.value_bias = value_bias.float().view(self.num_kv_heads, self.head_size)
        if self.kv.centered:
            self.center = self._center()
        if self.key_bias is not None or self.kv.position == "before_rope":
            self.rope = rotations(vllm.model_config, self.head_size)
        device = torch.device(vllm.device_config.device_type)
        if device.type == "cuda":
            fmt = page_format(self.kv, self.head_size, PAGES[0])
            reason = attention.why_not(fmt, device, act_dtype, self.kv.position == "after_rope")
            if reason is not None:
                raise UnsupportedError(f"No kernel attends to the checkpoint's KV cache on this GPU: {reason}")
        self.turns = identity(vllm.scheduler_config.max_num_batched_tokens, self.head_size // 2, device)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: AtomMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query (T, heads, head_dim), key and value (T, kv heads, head_dim) -> output, like query."""
        if attn_metadata is None:  # vLLM measures memory before there is a cache
            return output.zero_()
        batch, tokens, decodes = attn_metadata, attn_metadata.tokens, attn_metadata.decodes
        fmt = page_format(self.kv, self.head_size, kv_cache.shape[2])
        pool = kv_cache.flatten(2)
        query, key, value = query[:tokens], key[:tokens], value[:tokens]
        keys_rotated = self.kv.position == "after_rope"
        if not keys_rotated:
            key = self._rotated_back(key, batch.positions)
        if self.center is not None:
            key = (key.float() - self.center).to(key.dtype)
        assert self.turns is not None
        cos, sin = self.turns[0][:tokens], self.turns[1][:tokens]
        query = attention.append(pool, fmt, query, key, value, cos, sin, batch.slots, self.kv.hadamard)
        attend: dict[str, Any] = {
            "scaling": self.scale,
            "window": self.window,
            "key_bias": self.key_bias,
            "value_bias": self.value_bias,
            "rope": self.rope,
            "hadamard": self.kv.hadamard,
            "keys_rotated": keys_rotated,
        }
        if decodes:
            pages, lengths, out = batch.decoded_pages, batch.decoded_lengths, output[:decodes]
            attention.decode(query[:decodes], pool, fmt, pages, lengths, out=out, **attend)
        if decodes < tokens:
            starts, pages, lengths = batch.query_starts, batch.prefilled_pages, batch.prefilled_lengths
            out = output[decodes:tokens]
            attention.prefill(query[decodes:], pool, fmt, pages, starts, lengths, out=out, **attend)
        return output

    def _center(self) -> Tensor:
        """What keys are stored without, fp32 (kv heads, head_dim), in the basis in which vLLM hands them over."""
        if self.loaded_center is None:
            raise InputError(f"The checkpoint lacks the key_center of {self.name}", "The checkpoint is incomplete")
        center = self.loaded_center.float()
        return attention_reference.hadamard_heads(center) if self.kv.hadamard else center  # its own inverse

    def _rotated_back(self, key: Tensor, positions: Tensor | None) -> Tensor:
        assert self.rope is not None
        assert positions is not None
        cos, sin = (table[positions, None] for table in self.rope)
        low, high = key.float().chunk(2, dim=-1)
        return torch.cat([low * cos + high * sin, high * cos - low * sin], dim=-1).to(key.dtype)


class AtomCacheMethod(BaseKVCacheMethod):
    """Gives an attention layer of vLLM our backend, our implementation and the pages' size."""

    def create_weights(self, layer: Any) -> None:
        """Called when the layer has been made."""
        config = self.quant_config
        kv = config.plan.kv_cache
        page_format(kv, layer.head_size, PAGES[0])  # refuses here what no page can hold
        if getattr(layer, "head_size_v", layer.head_size) != layer.head_size or layer.has_sink:
            raise UnsupportedError(f"{layer.layer_name} attends in a way that atom's cache doesn't know")
        layer.impl = AtomAttention(layer, kv, config)
        layer.attn_backend = AtomBackend
        if kv.centered:
            slot = nn.Parameter(torch.empty(0), requires_grad=False)
            set_weight_attrs(slot, {"weight_loader": partial(_load_center, layer)})
            layer.register_parameter("key_center", slot)
            if config.dummy:
                layer.impl.loaded_center = torch.zeros(layer.num_kv_heads, layer.head_size)
        layer.get_kv_cache_spec = MethodType(partial(cache_spec, kv), layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """A checkpoint stores no scales of its cache."""


def _load_center(layer: Any, slot: nn.Parameter, center: Tensor) -> None:
    """Take this rank's heads of key_center (all kv heads, head_dim)."""
    heads, width = layer.num_kv_heads, layer.head_size
    if center.dim() != 2 or center.shape[1] != width or center.shape[0] % heads:
        raise InputError(f"The key_center of {layer.layer_name} is {list(center.shape)}, not (heads, {width})")
    shards = center.shape[0] // heads
    first = get_tensor_model_parallel_rank() * shards // get_tensor_model_parallel_world_size() * heads
    layer.impl.loaded_center = center[first : first + heads].to(slot.device, copy=True)


def cache_spec(kv: KVFormat, layer: Any, vllm: Any) -> KVCacheSpec:
    """The bytes of a layer's pages, as keys and values of bytes: half of what a token takes is the key's."""
    block = vllm.cache_config.block_size
    width = page_format(kv, layer.head_size, PAGES[0]).bytes_per_token // 2
    common = {"block_size": block, "num_kv_heads": layer.num_kv_heads, "head_size": width, "dtype": torch.uint8}
    if layer.sliding_window is not None:
        return SlidingWindowSpec(**common, sliding_window=layer.sliding_window)
    return FullAttentionSpec(**common)


@cache
def page_format(kv: KVFormat, head_dim: int, page: int) -> PageFormat:
    """The pages of a quantized cache."""
    return PageFormat(kv.element, head_dim, page)  # type: ignore[arg-type]


def rotations(model_config: Any, head_dim: int) -> Rope:
    """Cosines and sines fp32 (positions, head_dim / 2) of the model's RoPE, which vLLM made already."""
    text = model_config.hf_text_config
    rope = get_rope(
        head_dim,
        max_position=text.max_position_embeddings,
        rope_parameters=getattr(text, "rope_parameters", None),
        is_neox_style=True,
        dtype=model_config.dtype,
    )
    cos, sin = rope.cos_sin_cache.float().chunk(2, dim=-1)
    return cos.contiguous(), sin.contiguous()


_IDENTITIES: dict[tuple[int, int, torch.device], Rope] = {}


def identity(tokens: int, half: int, device: torch.device) -> Rope:
    """The rotation that changes nothing, for as many tokens as a batch can have; shared by all layers."""
    key = tokens, half, device
    if key not in _IDENTITIES:
        cos = torch.ones(tokens, half, dtype=torch.float32, device=device)
        _IDENTITIES[key] = cos, torch.zeros_like(cos)
    return _IDENTITIES[key]


def leading_decodes(query_starts: Tensor) -> int:
    """How many sequences at the front of a batch have one token; query_starts int32 (sequences + 1,) on the host."""
    longer = query_starts.diff() != 1
    return int(longer.int().argmax()) if longer.any() else len(longer)


def _positions(query_starts: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """Each token's position in its sequence, whose last key belongs to its last query."""
    counts = query_starts[1:] - query_starts[:-1]
    offsets = (lengths - counts - query_starts[:-1])[: len(counts)]
    owner = torch.searchsorted(query_starts[1:].contiguous(), torch.arange(tokens, device=lengths.device), right=True)
    return torch.arange(tokens, device=lengths.device) + offsets[owner.clamp(max=len(counts) - 1)]
