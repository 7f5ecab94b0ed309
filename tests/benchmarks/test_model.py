"""The model bench on tiny models: right counts and bytes, honest notes, one model at a time."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from atomcli.benchmarks.model import bench_model, generate_once, path_note, weight_bytes
from atomcli.errors import UsageError


def make_model(dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def test_rows_pair_the_models_and_count_bytes() -> None:
    calls: list[tuple[int, int]] = []
    rows = bench_model(
        {"parent": make_model, "half": lambda: make_model(torch.bfloat16)},
        batches=[1, 2],
        contexts=[8],
        new_tokens=3,
        repeats=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert [(row.labels["model"], row.labels["batch"]) for row in rows] == [
        ("parent", 1),
        ("half", 1),
        ("parent", 2),
        ("half", 2),
    ]
    # 2 layers, keys and values, 2 heads of 8, 8 positions
    kv = [row.measures["KV cache"].median for row in rows]  # type: ignore[union-attr]
    assert kv == [2 * 2 * 2 * 8 * 8 * size * batch for batch in (1, 2) for size in (4, 2)]
    assert rows[1].measures["weights"].median == weight_bytes(make_model(torch.bfloat16))  # type: ignore[union-attr]
    for row in rows:
        decode, first, prefill = row.measures["decode"], row.measures["first token"], row.measures["prefill"]
        assert decode is not None
        assert first is not None
        assert prefill is not None
        assert decode.samples == 2
        assert decode.median > 0
        # Up to the first token takes longer than the forward pass alone.
        assert first.median / 1e3 > row.labels["batch"] * 8 / prefill.high  # type: ignore[operator]
    assert (rows[0].note, rows[1].note) == ("fp32 linears of torch", "16-bit linears of torch")
    assert calls == [(done, 12) for done in range(1, 13)]


def test_one_model_at_a_time() -> None:
    alive: list[weakref.ref[nn.Module]] = []

    def load() -> Any:
        gc.collect()
        assert all(reference() is None for reference in alive)
        model = make_model()
        alive.append(weakref.ref(model))
        return model

    bench_model({"one": load, "two": load}, [1], [4], new_tokens=1, repeats=1, warmup=0)
    assert len(alive) == 2


def test_decodes_every_token_from_the_cache() -> None:
    model = make_model()
    seen: list[tuple[int, int]] = []

    def look(_: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        cache = inputs.get("past_key_values")
        seen.append((inputs["input_ids"].shape[1], 0 if cache is None else cache.get_seq_length()))

    model.register_forward_pre_hook(look, with_kwargs=True)
    generate_once(model, torch.zeros(1, 8, dtype=torch.int64), new_tokens=5)
    assert seen == [(8, 0), (1, 8), (1, 9), (1, 10), (1, 11), (1, 12)]


def test_a_quantized_cache_is_counted_and_named() -> None:
    from atomcli.formats.scheme import KVFormat
    from atomcli.runtime.decoder import adapt_block

    def load() -> Any:
        model = make_model(torch.bfloat16)
        for layer in model.model.layers:
            adapt_block(layer, KVFormat("int4"))
        return model

    plain, quantized = bench_model(
        {"plain": lambda: make_model(torch.bfloat16), "int4": load}, [2], [16], new_tokens=2, repeats=1
    )
    # per layer, key or value, head and position: 8 numbers of 16 bits, or 8 of 4 bits with an fp16 scale and minimum
    assert plain.measures["KV cache"].median == 2 * 2 * 2 * 16 * 2 * 16  # type: ignore[union-attr]
    assert quantized.measures["KV cache"].median == 2 * 2 * 2 * 16 * 2 * 8  # type: ignore[union-attr]
    assert quantized.note.endswith("attention dequantizes the cache")
    assert "cache" not in plain.note


def test_tied_weights_count_once() -> None:
    assert weight_bytes(make_model()) - weight_bytes(make_model(tied=True)) == 64 * 32 * 4


def test_says_when_only_the_reference_path_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from atomcli.benchmarks import model as bench
    from atomcli.formats.scheme import SCHEMES
    from atomcli.runtime.linear import QuantLinear

    scheme = next(iter(SCHEMES.values()))
    holder = make_model()
    holder.extra = nn.ModuleList([QuantLinear(512, 64, scheme), QuantLinear(512, 32, scheme)])
    assert path_note(holder, 4).startswith("reference path: no kernel runs")
    monkeypatch.setattr(
        bench, "pick_kernel", lambda linear, x: bench.reference_kernel if linear.out_features == 32 else object()
    )
    assert path_note(holder, 4) == "kernels in 1 of 2 linears, the reference path in the others"
    monkeypatch.setattr(bench, "pick_kernel", lambda linear, x: object())
    assert path_note(holder, 4) == "kernels in all 2 quantized linears"


def test_out_of_memory_is_a_row_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    from atomcli.benchmarks import model as bench

    def explode(*_: Any) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(bench, "generate_once", explode)
    (row,) = bench_model({"one": make_model}, [1], [4], repeats=1)
    assert row.note == "out of memory"
    assert row.measures["decode"] is None
    assert row.measures["weights"] is not None


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
        bench_model({"one": make_model}, **({"batches": [1], "contexts": [4], "new_tokens": 1} | settings))
