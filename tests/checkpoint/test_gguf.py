"""GGUF files made here the way llama.cpp's converter makes them, read back under Hugging Face names."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from atomcli.checkpoint.gguf_config import build_config
from atomcli.checkpoint.source import open_source
from atomcli.errors import InputError, UnsupportedError

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FEED, VOCAB, EXPERTS = 64, 4, 2, 16, 96, 40, 3
GENERATOR = np.random.default_rng(0)

METADATA: dict[str, Any] = {
    "block_count": 2,
    "context_length": 512,
    "embedding_length": HIDDEN,
    "feed_forward_length": FEED,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500000.0,
    "vocab_size": VOCAB,
}
MIXTURE = {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": FEED}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp convert_hf_to_gguf.py, LlamaModel.permute, stated row by row."""
    half = weight.shape[0] // heads // 2
    order = [head * 2 * half + part * half + pair for head in range(heads) for pair in range(half) for part in (0, 1)]
    return weight[order]


def random_weight(*shape: int) -> np.ndarray:
    """Values that bfloat16 holds exactly, so that every format's reading can be compared bit for bit."""
    return (GENERATOR.integers(-100, 100, shape) / 64).astype(np.float32)


def llama_block(prefix: str, block: str, heads_permuted: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One block under its Hugging Face names and under llama.cpp's."""
    hf: dict[str, np.ndarray] = {}
    ours: dict[str, np.ndarray] = {}
    for source, target, shape in (
        ("self_attn.q_proj", "attn_q", (HEADS * HEAD_DIM, HIDDEN)),
        ("self_attn.k_proj", "attn_k", (KV_HEADS * HEAD_DIM, HIDDEN)),
        ("self_attn.v_proj", "attn_v", (KV_HEADS * HEAD_DIM, HIDDEN)),
        ("self_attn.o_proj", "attn_output", (HIDDEN, HEADS * HEAD_DIM)),
        ("input_layernorm", "attn_norm", (HIDDEN,)),
        ("post_attention_layernorm", "ffn_norm", (HIDDEN,)),
    ):
        weight = random_weight(*shape)
        hf[f"{prefix}{source}.weight"] = weight
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(target)
        ours[f"{block}{target}.weight"] = permuted(weight, heads) if heads and heads_permuted else weight
    return hf, ours


def dense(hf: dict[str, np.ndarray], ours: dict[str, np.ndarray], prefix: str, block: str) -> None:
    for role, shape in (("gate", (FEED, HIDDEN)), ("up", (FEED, HIDDEN)), ("down", (HIDDEN, FEED))):
        weight = random_weight(*shape)
        hf[f"{prefix}mlp.{role}_proj.weight"] = ours[f"{block}ffn_{role}.weight"] = weight


def mixture(names: dict[str, str], router: str) -> Callable[..., None]:
    def add(hf: dict[str, np.ndarray], ours: dict[str, np.ndarray], prefix: str, block: str) -> None:
        weight = random_weight(EXPERTS, HIDDEN)
        hf[f"{prefix}{router}.weight"] = ours[f"{block}ffn_gate_inp.weight"] = weight
        for role, shape in (("gate", (FEED, HIDDEN)), ("up", (FEED, HIDDEN)), ("down", (HIDDEN, FEED))):
            stacked = random_weight(EXPERTS, *shape)
            ours[f"{block}ffn_{role}_exps.weight"] = stacked
            for expert in range(EXPERTS):
                hf[f"{prefix}{names[role].format(expert)}.weight"] = stacked[expert]

    return add


MIXTRAL = mixture(
    {r: f"block_sparse_moe.experts.{{}}.w{n}" for r, n in (("gate", 1), ("up", 3), ("down", 2))},
    "block_sparse_moe.gate",
)
QWEN3_MOE = mixture({role: f"mlp.experts.{{}}.{role}_proj" for role in ("gate", "up", "down")}, "mlp.gate")


def tensors(architecture: str, feed_forward: Callable[..., None], tied: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A whole model under both names."""
    embedding, norm = random_weight(VOCAB, HIDDEN), random_weight(HIDDEN)
    hf = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm}
    ours = {"token_embd.weight": embedding, "output_norm.weight": norm}
    if not tied:
        hf["lm_head.weight"] = ours["output.weight"] = random_weight(VOCAB, HIDDEN)
    for layer in range(2):
        prefix, block = f"model.layers.{layer}.", f"blk.{layer}."
        for all_names, names in zip((hf, ours), llama_block(prefix, block, architecture == "llama"), strict=True):
            all_names.update(names)
        feed_forward(hf, ours, prefix, block)
        if architecture == "qwen2":
            for source, rows in (("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM)):
                bias = random_weight(rows)
                hf[f"{prefix}self_attn.{source}_proj.bias"] = ours[f"{block}attn_{source}.bias"] = bias
        if architecture.startswith("qwen3"):
            for source in ("q", "k"):
                weight = random_weight(HEAD_DIM)
                hf[f"{prefix}self_attn.{source}_norm.weight"] = ours[f"{block}attn_{source}_norm.weight"] = weight
    return hf, ours


def write_gguf(
    path: Path,
    architecture: str,
    ours: dict[str, np.ndarray],
    metadata: dict[str, Any] | None = None,
    stored: gguf.GGMLQuantizationType | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (METADATA | (metadata or {})).items():
        if value is None:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key}", value)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    for name, tensor in ours.items():
        if stored is None or tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


CASES: dict[str, tuple[str, Callable[..., None], bool, dict[str, Any], str]] = {
    "llama": ("llama", dense, False, {}, "llama"),
    "llama tied": ("llama", dense, True, {"rope.dimension_count": HEAD_DIM}, "llama"),
    "qwen2": ("qwen2", dense, True, {}, "qwen2"),
    "qwen3": ("qwen3", dense, False, {"attention.key_length": HEAD_DIM}, "qwen3"),
    "mixtral": ("llama", MIXTRAL, False, MIXTURE, "mixtral"),
    "qwen3moe": ("qwen3moe", QWEN3_MOE, False, MIXTURE | {"attention.key_length": HEAD_DIM}, "qwen3_moe"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_family_comes_out_under_its_names(tmp_path: Path, case: str) -> None:
    architecture, feed_forward, tied, metadata, model_type = CASES[case]
    hf, ours = tensors(architecture, feed_forward, tied)
    source = open_source(str(write_gguf(tmp_path / "m.gguf", architecture, ours, metadata)))
    assert source.config.model_type == model_type
    assert source.config.tie_word_embeddings is tied
    assert source.config.rope_parameters["rope_theta"] == 500000.0
    assert source.config.rms_norm_eps == 1e-5
    assert source.config.head_dim == HEAD_DIM
    assert source.names() == hf.keys()
    for name, weight in hf.items():
        assert source.shape(name) == weight.shape
        assert torch.equal(source.read(name), torch.from_numpy(weight).to(torch.bfloat16)), name


@pytest.mark.parametrize("case", ["llama", "qwen2", "mixtral", "qwen3moe"])
def test_transformers_has_a_place_for_every_tensor(tmp_path: Path, case: str) -> None:
    """The config describes a model whose parameters are exactly the file's (experts are fused by transformers)."""
    from transformers import AutoModelForCausalLM

    architecture, feed_forward, tied, metadata, _ = CASES[case]
    _, ours = tensors(architecture, feed_forward, tied)
    source = open_source(str(write_gguf(tmp_path / "m.gguf", architecture, ours, metadata)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        expected.pop("lm_head.weight")
    plain = {name: source.shape(name) for name in source.names() if ".experts." not in name and "moe" not in name}
    fused = {name for name in expected if "experts" in name or name.endswith("mlp.gate.weight")}
    assert plain.items() >= {name: shape for name, shape in expected.items() if name not in fused}.items()
    assert sum(math.prod(source.shape(name)) for name in source.names()) == sum(
        math.prod(shape) for shape in expected.values()
    )


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_stored_formats(tmp_path: Path, kind: str) -> None:
    stored = gguf.GGMLQuantizationType[kind]
    hf, ours = tensors("qwen2", dense, True)
    source = open_source(str(write_gguf(tmp_path / "m.gguf", "qwen2", ours, stored=stored)))
    name = "model.layers.1.mlp.down_proj.weight"
    expected = gguf.dequantize(gguf.quantize(hf[name], stored), stored)
    assert torch.equal(source.read(name), torch.from_numpy(expected.copy()).to(torch.bfloat16))
    assert source.dtype == source.read(name).dtype == torch.bfloat16


def test_large_tensors_are_dequantized_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = tensors("llama", dense, False)
    source = open_source(str(write_gguf(tmp_path / "m.gguf", "llama", ours, stored=gguf.GGMLQuantizationType.Q8_0)))
    whole = {name: source.read(name) for name in source.names()}
    monkeypatch.setattr("atomcli.checkpoint.gguf._PIECE", 3 * HIDDEN)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in whole.items())


def llama3_factors(factor: float) -> np.ndarray:
    """The loop of llama.cpp's convert_hf_to_gguf.py for rope_type llama3."""
    low, high, original, values = 1.0, 4.0, 8192, []
    for frequency in 1.0 / 500000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            values.append(1.0)
        elif wavelength > original / low:
            values.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            values.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(values, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rotary_factors_of_llama_3(tmp_path: Path, factor: float) -> None:
    hf, ours = tensors("llama", dense, False)
    ours["rope_freqs.weight"] = llama3_factors(factor)
    source = open_source(str(write_gguf(tmp_path / "m.gguf", "llama", ours)))
    assert source.names() == hf.keys()
    assert source.config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_other_rotary_factors_are_refused(tmp_path: Path) -> None:
    _, ours = tensors("llama", dense, False)
    ours["rope_freqs.weight"] = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight\) that are not those of Llama"):
        open_source(str(write_gguf(tmp_path / "m.gguf", "llama", ours)))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 128},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        ({"type": "none"}, {"rope_type": "default"}),
    ],
)
def test_rope_scaling(keys: dict[str, Any], expected: dict[str, Any]) -> None:
    metadata = {f"qwen2.{key}": value for key, value in METADATA.items()} | {"general.architecture": "qwen2"}
    metadata |= {f"qwen2.rope.scaling.{key}": value for key, value in keys.items()}
    config = build_config(metadata, {"output.weight"}, lambda: np.empty(0), "m.gguf")
    assert expected.items() <= config.rope_parameters.items()
    with pytest.raises(UnsupportedError, match="rope scaling 'longrope'"):
        build_config(metadata | {"qwen2.rope.scaling.type": "longrope"}, set(), lambda: np.empty(0), "m.gguf")


def test_the_embedding_says_the_vocabulary_where_the_metadata_do_not(tmp_path: Path) -> None:
    _, ours = tensors("qwen2", dense, True)
    source = open_source(str(write_gguf(tmp_path / "m.gguf", "qwen2", ours, {"vocab_size": None})))
    assert source.config.vocab_size == VOCAB == source.shape("model.embed_tokens.weight")[0]


def test_parts_of_one_model(tmp_path: Path) -> None:
    hf, ours = tensors("llama", dense, False)
    names = sorted(ours)
    first, second = (tmp_path / f"m-0000{part}-of-00002.gguf" for part in (1, 2))
    write_gguf(first, "llama", {name: ours[name] for name in names[::2]})
    with pytest.raises(InputError, match=r"Part .*m-00002-of-00002\.gguf of the GGUF model is missing"):
        open_source(str(first))
    write_gguf(second, "llama", {name: ours[name] for name in names[1::2]})
    source = open_source(str(first))
    assert source.names() == hf.keys()
    for name, weight in hf.items():
        assert torch.equal(source.read(name), torch.from_numpy(weight).to(torch.bfloat16))


def test_what_gguf_cant_be_read(tmp_path: Path) -> None:
    _, ours = tensors("llama", dense, False)
    with pytest.raises(UnsupportedError, match="is of architecture 'gpt2'"):
        open_source(str(write_gguf(tmp_path / "a.gguf", "gpt2", ours)))
    with pytest.raises(
        UnsupportedError, match=r"GGUF tensor blk\.0\.attn_sinks\.weight has no counterpart in a llama model"
    ):
        open_source(str(write_gguf(tmp_path / "b.gguf", "llama", ours | {"blk.0.attn_sinks.weight": random_weight(4)})))
    bad = {name: tensor.copy() for name, tensor in ours.items()}
    bad["blk.1.ffn_up.weight"][3, 3] = np.nan
    source = open_source(str(write_gguf(tmp_path / "c.gguf", "llama", bad)))
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* holds 1 NaN or Inf"):
        source.read("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(InputError, match=r"has no tensor model\.layers\.7\.x"):
        source.read("model.layers.7.x")


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    _, ours = tensors("llama", dense, False)
    path = write_gguf(tmp_path / "m.gguf", "llama", ours)
    data = path.read_bytes()
    draw = random.Random(0)
    for length in (0, 3, 20, 300, 2000, len(data) // 2, len(data) - 500):
        path.write_bytes(data[:length])
        with pytest.raises((InputError, UnsupportedError)) as caught:
            open_source(str(path))
        assert str(path) in caught.value.what
        assert "\n" not in caught.value.what
    for place in [draw.randrange(1500) for _ in range(150)]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            source = open_source(str(path))
            for name in source.names():
                source.read(name)
        except (InputError, UnsupportedError):
            continue
