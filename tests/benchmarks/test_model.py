"""The model bench on tiny models: right counts and bytes, honest notes, one model at a time."""

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from atomcli.benchmarks import model as bench
from atomcli.benchmarks.model import Batch, bench_model, path_note, weight_bytes
from atomcli.benchmarks.systems import FORMATS, System, made_up
from atomcli.errors import UsageError
from atomcli.runtime.fused import FusedModel

CPU = torch.device("cpu")


def make_model(name: str = "bf16", tied: bool = False) -> FusedModel:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    config.architectures = ["LlamaForCausalLM"]
    return made_up(config, *FORMATS[name], CPU)


def test_rows_pair_the_models_and_count_bytes() -> None:
    calls: list[tuple[int, int]] = []
    rows = bench_model(
        [System(name, lambda name=name: make_model(name)) for name in ("bf16", "atom w4a8")],  # type: ignore[misc]
        batches=[1, 2],
        contexts=[60],
        new_tokens=3,
        repeats=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert [(row.labels["model"], row.labels["batch"]) for row in rows] == [
        ("bf16", 1),
        ("atom w4a8", 1),
        ("bf16", 2),
        ("atom w4a8", 2),
    ]
    # 2 layers, one page of 64 tokens per sequence, 2 heads; 2 × 32 numbers of 16 or 4 bits, the latter with 4 fp16
    kv = [row.measures["KV cache"].median for row in rows]  # type: ignore[union-attr]
    assert kv == [2 * 64 * 2 * each * batch for batch in (1, 2) for each in (128, 40)]
    per_block = 256 * (8 + 2 + 2 + 8) * 32 + 3 * 256 * 384
    outer = 2 * 64 * 256
    assert rows[0].measures["weights"].median == 2 * (2 * per_block + outer)  # type: ignore[union-attr]
    for row in rows:
        decode, first, prefill = row.measures["decode"], row.measures["first token"], row.measures["prefill"]
        assert decode is not None
        assert first is not None
        assert prefill is not None
        assert (decode.samples, prefill.samples) == (3, 2)
        assert decode.median > 0
        assert row.measures["step limit"] is None  # of a card's
    assert rows[0].measures["decode ratio"].median == 1  # type: ignore[union-attr]
    assert (rows[0].note, rows[1].note) == ("torch; bf16 pages; no graphs", "reference; int4 pages; no graphs")
    assert calls == [(done, 4) for done in range(1, 5)]


def test_one_model_at_a_time() -> None:
    alive: list[weakref.ref[FusedModel]] = []

    def load() -> FusedModel:
        gc.collect()
        assert all(reference() is None for reference in alive)
        model = make_model()
        alive.append(weakref.ref(model))
        return model

    bench_model([System("one", load), System("two", load)], [1], [4], new_tokens=1, repeats=1, warmup=0)
    assert len(alive) == 2


def test_decodes_every_token_from_the_cache() -> None:
    model = make_model()
    seen: list[tuple[int, list[int]]] = []
    hidden = model.hidden

    def look(tokens: Any, step: Any, pools: Any) -> Any:
        seen.append((len(tokens), step.lengths.tolist()))
        return hidden(tokens, step, pools)

    model.hidden = look  # type: ignore[method-assign]
    batch = Batch(model, 2, 8, 4)
    batch.prefill()
    batch.decode()
    # The first step is taken again and again to warm up.
    assert seen == [(16, [8, 8]), *[(2, [n, n]) for n in (*[9] * bench.WARMUP_STEPS, 9, 10, 11, 12)]]


def test_copied_prompts_are_what_prefilled_ones_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("atom w4a8")
    whole, copied = (Batch(model, 3, 70, 1) for _ in range(2))
    for batch in (whole, copied):
        batch.prompts[:] = batch.prompts[0]
        for pool in batch.pools:
            pool.zero_()
    whole.prefill()
    whole.decode()
    monkeypatch.setattr(bench, "PREFILL_TOKENS", 100)
    copied.decode()
    for a, b in zip(whole.pools, copied.pools, strict=True):
        assert torch.equal(a, b)


def test_tied_weights_count_once() -> None:
    assert weight_bytes(make_model()) - weight_bytes(make_model(tied=True)) == 64 * 256 * 2


def test_the_note_names_what_runs_each_product() -> None:
    model = make_model()
    quantized = make_model("W8A8")
    model.blocks[1] = quantized.blocks[1]
    assert path_note(model).startswith("reference (7), torch (4); ")


def test_out_of_memory_is_a_row_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: Any) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(Batch, "prefill", explode)
    (row,) = bench_model([System("one", make_model)], [1], [4], repeats=1)
    assert row.note == "out of memory"
    assert row.measures["decode"] is None
    assert row.measures["weights"] is not None


def test_a_cache_that_does_not_fit_names_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atomcli.runtime.pages.free_bytes", lambda model: 5 * model.pool_bytes(1))
    rows = bench_model([System("one", make_model)], [2, 8], [100], new_tokens=28, repeats=1)
    assert rows[0].measures["decode"] is not None
    assert rows[1].measures["decode"] is None
    assert rows[1].note.endswith("2 × 128 tokens would fit.")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batches": [0]}, "--batch 0"),
        ({"contexts": []}, "--context"),
        ({"new_tokens": 0}, "--new-tokens 0"),
        ({"repeats": 0}, "--repeats 0"),
        ({"contexts": [120], "new_tokens": 9}, "exceed the 128 positions of one"),
    ],
)
def test_refuses_bad_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        bench_model([System("one", make_model)], **({"batches": [1], "contexts": [4], "new_tokens": 1} | settings))
