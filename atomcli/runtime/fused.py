"""A causal language model whose blocks are fused steps over rows of tokens, with keys and values in pages.

The numbers are those of the modules it is made from (runtime/decoder.py): the same products, norms and cache format.
What differs is how few kernels they take: per block one product for q, k and v, one kernel that rotates, quantizes and
stores, one attention, one product each for o, gate and up, and down; every quantization includes what comes before it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atomcli.errors import UnsupportedError
from atomcli.kernels import attention
from atomcli.kernels.begin_decode import begin_decode
from atomcli.kernels.pages import PageFormat
from atomcli.models.block import Family, head_dim
from atomcli.models.registry import describe
from atomcli.runtime.attention import Attention
from atomcli.runtime.projection import Norm, Projection

PAGE = 64  # tokens


@dataclass(frozen=True)
class Step:
    """What the blocks need beside the hidden states of T tokens of B sequences.

    cos, sin fp32 (T, head_dim / 2) of each token's position. slots int64 (T,): page * tokens of a page + offset where
    its key and value go, negative for nowhere. page_table int32 (B, pages), lengths int32 (B,): keys of each sequence,
    the new ones included. query_starts int32 (B + 1,): where each sequence's tokens begin; None: one token each.
    embedded (T, hidden): the tokens' embeddings, where they are known already.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    page_table: Tensor
    lengths: Tensor
    query_starts: Tensor | None = None
    embedded: Tensor | None = None


class FusedModel:
    """A model ready to run in pages; `context` bounds the positions, the model's own where it is None.

    `blocks` are decoder layers of `runtime.decoder`; they are read one at a time and not kept. Raises
    UnsupportedError for a model whose positions or cache the runtime can't have.
    """

    def __init__(self, outer: PreTrainedModel, blocks: Iterable[nn.Module], context: int | None = None) -> None:
        config: Any = outer.config
        family = describe(config)
        self.config = config
        self.embedding = outer.model.embed_tokens.weight.detach()
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.context = min(context or config.max_position_embeddings, config.max_position_embeddings)
        self.cos, self.sin = _rotations(outer, self.context)
        self.blocks: list[FusedBlock] = []
        for index, block in enumerate(blocks):
            self.blocks.append(FusedBlock(block, family, config, index, self.dtype, (self.cos, self.sin)))
        self.format = self.blocks[0].format
        self.norm = Norm.of(outer.model.norm)
        self.head = Projection([outer.lm_head], self.dtype)

    @classmethod
    def of(cls, model: PreTrainedModel, context: int | None = None) -> "FusedModel":
        """The model that `load_parent`, `load_checkpoint` or `from_pretrained` gave, on the device it lies on."""
        return cls(model, model.model.layers, context)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.blocks[0].kv_heads

    @property
    def capturable(self) -> bool:
        """Whether a step runs on kernels alone and asks the host nothing, so that a CUDA graph can hold it."""
        return self.device.type == "cuda" and all(
            block.routes_on_device and block.attention_reason(self.device, self.dtype) is None for block in self.blocks
        )

    @property
    def kernels(self) -> list[str]:
        """What runs each product of the blocks: a kernel's name, "torch" or "reference"."""
        return [name for block in self.blocks for projection in block.projections for name in projection.kernels]

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that a step of few tokens reads: all but the embedding's other rows."""
        return self.head.nbytes + sum(block.nbytes for block in self.blocks)

    @property
    def parameters(self) -> int:
        """Weights that every token is multiplied by: head and linears, but no experts."""
        return self.head.parameters + sum(block.parameters for block in self.blocks)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all blocks."""
        return self.kv_heads * sum(block.format.bytes_per_token for block in self.blocks)

    def new_pools(self, pages: int) -> list[Tensor]:
        """Pages for keys and values, a pool for each block: uint8 (pages, kv_heads, bytes)."""
        return [block.format.allocate(pages, self.kv_heads, self.device) for block in self.blocks]

    def pool_bytes(self, pages: int) -> int:
        """Bytes of `new_pools`."""
        return pages * self.kv_heads * sum(block.format.bytes for block in self.blocks)

    def step(self, positions: Tensor, slots: Tensor, page_table: Tensor, lengths: Tensor, **more: Any) -> Step:
        """The step of tokens at `positions` int64 (T,); the other arguments as in `Step`."""
        return Step(self.cos[positions], self.sin[positions], slots, page_table, lengths, **more)

    def decode_step(self, tokens: Tensor, lengths: Tensor, page_table: Tensor) -> tuple[Step, Tensor]:
        """The step that adds `tokens` int64 (B,) to sequences of `lengths` int32 (B,), and the tokens' positions.

        Lengths grow in place; sequences of length 0 are idle and stay so.
        """
        pending = begin_decode(tokens, lengths, page_table, self.format.page, self.cos, self.sin, self.embedding)
        step = Step(pending.cos, pending.sin, pending.slots, page_table, lengths, embedded=pending.embedded)
        return step, pending.positions

    def hidden(self, tokens: Tensor, step: Step, pools: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The last block's output and the residual beside it, (T, hidden) each; stores the tokens' keys and values."""
        x = nn.functional.embedding(tokens, self.embedding) if step.embedded is None else step.embedded
        residual = None
        for block, pool in zip(self.blocks, pools, strict=True):
            x, residual = block(x, residual, step, pool)
        assert residual is not None
        return x, residual

    def logits(self, x: Tensor, residual: Tensor) -> Tensor:
        """Logits (T, vocabulary) from what `hidden` gives, or from some of its rows."""
        return self.head.normed(x, residual, self.norm)[0]


class FusedBlock:
    """One decoder layer as a few kernels; made from a layer of `runtime.decoder`."""

    def __init__(
        self,
        block: Any,
        family: Family,
        config: Any,
        index: int,
        dtype: torch.dtype,
        rope: tuple[Tensor, Tensor],
    ) -> None:
        layer: Attention = block.self_attn
        kv, self.head_dim, self.scaling = layer.kv, layer.head_dim, layer.scaling
        self.format = page_format(kv.element, self.head_dim, dtype)
        self.heads = layer.q_proj.out_features // self.head_dim
        self.kv_heads = layer.k_proj.out_features // self.head_dim
        self.window = family.window(config, index)
        keep_bias = kv.element == "float" or not kv.bias_free
        self.qkv = Projection([layer.q_proj, layer.k_proj, layer.v_proj], dtype, [True, keep_bias, keep_bias])
        self.o = Projection([layer.o_proj], dtype)
        self.q_norm = None if layer.q_norm is None else Norm.of(layer.q_norm)
        self.k_norm = None if layer.k_norm is None else Norm.of(layer.k_norm)
        self.hadamard = kv.element != "float" and kv.hadamard
        self.keys_rotated = kv.element == "float" or kv.position == "after_rope"
        self.key_bias = None if keep_bias else self._head_bias(layer.k_proj.bias)
        self.value_bias = None if keep_bias else self._head_bias(layer.v_proj.bias)
        self.key_center = None if layer.key_center is None else layer.key_center.detach().float()
        self.rope = rope if self.key_bias is not None or not self.keys_rotated else None
        self.norm, self.mlp_norm = Norm.of(block.input_layernorm), Norm.of(block.post_attention_layernorm)
        self.is_sparse = hasattr(block.mlp, "experts")
        self.mlp = block.mlp
        self.projections = [self.qkv, self.o]
        if not self.is_sparse:
            self.gate_up = Projection([block.mlp.gate_proj, block.mlp.up_proj], dtype)
            self.down = Projection([block.mlp.down_proj], dtype)
            self.projections += [self.gate_up, self.down]
            self.activation = None if config.hidden_act in ("silu", "swish") else block.mlp.act_fn
            self.gates_one_token = self.activation is None and self.gate_up.gates_one_token
            self.mlp = None  # its weights live on in the projections alone

    @property
    def nbytes(self) -> int:
        """Bytes of stored weights, all experts included."""
        experts = [] if self.mlp is None else [*self.mlp.parameters(), *self.mlp.buffers()]
        return sum(projection.nbytes for projection in self.projections) + sum(tensor.nbytes for tensor in experts)

    @property
    def routes_on_device(self) -> bool:
        """Whether tokens find their experts without the host; true of a block without experts."""
        return self.mlp is None or self.mlp.experts.kernel_choice().kernel is not None

    def attention_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the reference attends on `device`, or None where a kernel does."""
        return attention.why_not(self.format, device, dtype, self.keys_rotated)

    @property
    def parameters(self) -> int:
        """Weights of the linears, but for experts."""
        return sum(projection.parameters for projection in self.projections)

    def __call__(self, x: Tensor, residual: Tensor | None, step: Step, pool: Tensor) -> tuple[Tensor, Tensor]:
        """x and residual (T, hidden), whose sum is the block's input -> the same for the next block."""
        qkv, residual = self.qkv.normed(x, residual, self.norm)
        x = self.o.plain(self._attend(qkv, step, pool))
        if self.is_sparse:
            rows, residual = self.mlp_norm.rows(x, residual)
            return _experts(self.mlp, rows), residual
        if len(x) == 1 and self.gates_one_token:
            hidden, residual = self.gate_up.activated(x, residual, self.mlp_norm)
            return self.down.plain(hidden), residual
        gate_up, residual = self.gate_up.normed(x, residual, self.mlp_norm)
        if self.activation is None:
            return self.down.gated(gate_up), residual
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down.plain(self.activation(gate) * up), residual

    def _attend(self, qkv: Tensor, step: Step, pool: Tensor) -> Tensor:
        """Attention over what is cached, the tokens of this step included; (T, heads * head_dim)."""
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv.split(self.qkv.sizes, dim=-1))
        query = query if self.q_norm is None else self.q_norm.heads(query)
        key = key if self.k_norm is None else self.k_norm.heads(key)
        new = (query, key, value, step.cos, step.sin, step.slots)
        if step.query_starts is None and self.keys_rotated and self.key_bias is None:
            return attention.append_and_decode(
                pool, self.format, *new, step.page_table, step.lengths, self.scaling, self.window, self.value_bias,
                hadamard=self.hadamard, center=self.key_center, settled=True,
            ).flatten(1)  # fmt: skip
        query = attention.append(pool, self.format, *new, self.hadamard, self.keys_rotated, self.key_center)
        shared: dict[str, Any] = {
            "window": self.window,
            "key_bias": self.key_bias,
            "value_bias": self.value_bias,
            "rope": self.rope,
            "hadamard": self.hadamard,
            "keys_rotated": self.keys_rotated,
        }
        if step.query_starts is None:
            attended = attention.decode(
                query, pool, self.format, step.page_table, step.lengths, self.scaling, settled=True, **shared
            )
        else:
            attended = attention.prefill(
                query, pool, self.format, step.page_table, step.query_starts, step.lengths, self.scaling, **shared
            )
        return attended.flatten(1)

    def _head_bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias.detach().float().view(-1, self.head_dim)


def page_format(element: str, dim: int, dtype: torch.dtype, page: int = PAGE) -> PageFormat:
    """The pages of a cache format; UnsupportedError where 16-bit pages would round what the model computes in."""
    if element == "float" and dtype != torch.bfloat16:
        raise UnsupportedError(
            f"The runtime keeps unquantized keys and values in bfloat16; the model is in {str(dtype)[6:]}",
            "Load the model in bfloat16, or quantize its cache.",
        )
    return PageFormat("bf16" if element == "float" else element, dim, page)  # type: ignore[arg-type]


def _experts(mlp: Any, rows: Tensor) -> Tensor:
    """transformers' own routing; its modules take a batch and, in some versions, answer the router's scores too."""
    out = mlp(rows.unsqueeze(0))
    out = out[0] if isinstance(out, tuple) else out
    answer: Tensor = out.view_as(rows)
    return answer


def _rotations(outer: Any, positions: int) -> tuple[Tensor, Tensor]:
    """RoPE's cosines and sines as the model's own module gives them, fp32 (positions, head_dim / 2)."""
    kind = getattr(outer.model.rotary_emb, "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise UnsupportedError(
            f"The runtime needs rotations that don't depend on a sequence's length; the model's are {kind!r}",
            "Run it through transformers.",
        )
    weight = outer.model.embed_tokens.weight
    cos, sin = outer.model.rotary_emb(weight[:1], torch.arange(positions, device=weight.device)[None])
    half = head_dim(outer.config) // 2
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()
