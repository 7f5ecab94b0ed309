"""Tiny quantized models of every family whose heads fit a page, as modules and in the fused runtime."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from atomcli.formats.scheme import ActivationFormat, KVFormat, Scheme, WeightFormat
from atomcli.models.registry import describe
from atomcli.runtime import decoder
from atomcli.runtime.fused import FusedModel
from tests.helpers.tiny import random_parent, write_checkpoint

W4A4 = Scheme(
    WeightFormat("int4", 32, "two_level"), ActivationFormat("int4", 32, "two_level", False, 0.95), 16, "hadamard"
)
KV4 = KVFormat("int4", "after_rope", True, True)
KV8 = KVFormat("int8", "after_rope", True, True)


def tiny_model(
    name: str,
    scheme: Scheme | None = W4A4,
    kv: KVFormat = KV4,
    skip: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PreTrainedModel:
    """A checkpoint of a random model, loaded; with `scheme` None its linears stay as they are."""
    _, source = random_parent(name, dtype=dtype, **({"head_dim": 32} | overrides))
    if scheme is None:
        blocks = range(source.config.num_hidden_layers)
        skip = tuple(name for index in blocks for name in describe(source.config).linears(source.config, index))
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory) / "out", source, scheme or W4A4, kv, skip)
        return decoder.load_checkpoint(Path(directory) / "out")


def fused_logits(model: FusedModel, tokens: torch.Tensor, chunks: tuple[int, ...], page_order: int = 0) -> torch.Tensor:
    """Logits (batch, tokens, vocabulary) of tokens (batch, tokens), prefilled in chunks of these lengths.

    A chunk of one token is decoded. Pages lie in an order that depends on `page_order`.
    """
    batch, page = len(tokens), model.format.page
    width = -(-tokens.shape[1] // page)
    order = torch.randperm(batch * width, generator=torch.Generator().manual_seed(page_order))
    table = order.view(batch, width).to(torch.int32).to(model.device)
    pools = model.new_pools(batch * width)
    for pool in pools:
        pool.fill_(0xFF)  # NaNs in fp16 and bf16: whoever reads what was never stored shows it
    parts, start = [], 0
    for count in chunks:
        positions = torch.arange(start, start + count, device=model.device).repeat(batch)
        rows = torch.arange(batch, device=model.device).repeat_interleave(count)
        slots = table[rows, positions // page].long() * page + positions % page
        lengths = torch.full((batch,), start + count, dtype=torch.int32, device=model.device)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=model.device) * count
        step = model.step(positions, slots, table, lengths, query_starts=None if count == 1 else starts)
        flat = tokens[:, start : start + count].flatten().to(model.device)
        logits = model.logits(*model.hidden(flat, step, pools))
        parts.append(logits.view(batch, count, -1))
        start += count
    return torch.cat(parts, dim=1)
