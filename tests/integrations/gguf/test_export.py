"""Exports to GGUF: what the gguf package and atom's own reader of parents make of them."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from atomcli.checkpoint.source import open_source
from atomcli.errors import InputError, RunError, UnsupportedError, UsageError
from atomcli.evaluation.divergence import divergence
from atomcli.integrations.gguf import export as target
from atomcli.integrations.gguf.tensors import to_rows
from atomcli.integrations.gguf.tokenizer import tokenizer_keys
from atomcli.integrations.portable import natural_weight, parse_trades
from atomcli.integrations.reading import Reading
from atomcli.runtime.decoder import load_checkpoint, load_parent
from tests.helpers.tiny import VOCABULARY, random_tokens
from tests.integrations.conftest import small

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEXT = "The channels with the most energy stay in eight bits, and 2048 others don't."


def byte_level(directory: Path, *before: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """A byte-level BPE of as many tokens as the tiny models have, trained on nothing but a sentence."""
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not before)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    return tokenizer


@pytest.fixture
def checkpoint(quantized, tmp_path):
    """A checkpoint with a tokenizer beside it."""

    def make(recipe, family: str = "llama", **options) -> Path:
        directory = shutil.copytree(quantized(recipe, family, dtype=torch.bfloat16, **options), tmp_path / family)
        byte_level(directory)
        return directory

    return make


def exported(checkpoint: Path, out: Path, *trades: str, windows: torch.Tensor | None = None):
    reading = Reading(checkpoint)
    return target.export(reading, target.plan_route(reading, parse_trades(trades)), out, windows=windows)


EIGHT = {"weights": {"format": "int8", "group": 32}, "order": "natural"}


@pytest.mark.parametrize(
    ("family", "recipe", "options"),
    [
        ("llama", small("w4a16-plain"), {}),
        ("llama_biased", small("w8a8", activations={"format": "none"}), {}),
        ("qwen2", small("w4a16-plain"), {"use_sliding_window": False}),
        ("qwen3", small("w4a16-plain", weights={"scale": "two_level"}), {}),
        ("mixtral", small("w4a16-plain"), {}),
        ("llama", small("w4a16-plain", weights={"format": "int8"}), {"tie_word_embeddings": False}),
    ],
    ids=["llama", "biases, one scale per row", "qwen2", "qwen3, two-level", "experts", "int8 groups, untied"],
)
def test_our_own_reader_gets_the_same_weights(family, recipe, options, checkpoint, tmp_path):
    directory = checkpoint(recipe, family, **options)
    assert exported(directory, tmp_path / "out.gguf") is None
    source, reading = open_source(str(tmp_path / "out.gguf")), Reading(directory)
    for linear in reading.linears:
        weight, layout, _ = reading.read(linear)
        wanted = natural_weight(weight, layout)
        # fp16 scales of what had fp32 ones, then bfloat16
        assert torch.allclose(source.read(f"{linear.disk}.weight").float(), wanted, rtol=2**-7, atol=1e-6), linear.disk
    tokens = random_tokens(2, 40)
    found = divergence(load_checkpoint(directory), load_parent(source), tokens)
    # bfloat16 weights, in which a router may send a token elsewhere
    assert found.mean_kld < (0.05 if family == "mixtral" else 1e-3)
    assert found.top1_agreement > 0.9


@pytest.mark.parametrize(("element", "bits"), [("int4", 4), ("int8", 8)])
def test_the_gguf_package_reads_the_rows_exactly(element, bits):
    from atomcli.formats.scheme import ActivationFormat, Scheme, WeightFormat
    from atomcli.formats.weights import QuantizedWeight

    generator = torch.Generator().manual_seed(0)
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    codes = torch.randint(low, high, (5, 96), generator=generator).to(torch.int8)
    scales = torch.randn(5, 3, generator=generator).half()
    scheme = Scheme(WeightFormat(element, 32, "fp16"), ActivationFormat("float"))
    weight = QuantizedWeight.from_codes(scheme, codes, scales)
    kind = gguf.GGMLQuantizationType.Q4_0 if bits == 4 else gguf.GGMLQuantizationType.Q8_0
    assert torch.equal(torch.from_numpy(gguf.dequantize(to_rows(weight), kind)), weight.dequantize())


def test_the_gguf_package_reads_types_and_keys(checkpoint, tmp_path):
    directory = checkpoint(small("w4a16-plain"))
    exported(directory, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == types["blk.1.ffn_down.weight"] == "Q4_0"
    assert types["token_embd.weight"] == "BF16"
    assert types["output_norm.weight"] == "F32"
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.architecture"] == "llama"
    assert keys["general.file_type"] == 2
    assert keys["llama.embedding_length"] == 96
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.ggml.bos_token_id"] == 0
    assert len(keys["tokenizer.ggml.tokens"]) == VOCABULARY


def test_llama_3_s_rotary_factors_come_back(checkpoint, tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    directory = checkpoint(small("w4a16-plain"), rope_parameters=rope)
    exported(directory, tmp_path / "out.gguf")
    found = open_source(str(tmp_path / "out.gguf")).config.rope_parameters
    assert {key: found[key] for key in rope} == rope


def test_the_tokenizer_comes_back(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("ATOM_CACHE", str(tmp_path / "cache"))
    directory = checkpoint(small("w4a16-plain"))
    exported(directory, tmp_path / "out.gguf")
    ours = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(TEXT).ids
    assert open_source(str(tmp_path / "out.gguf")).tokenizer()(TEXT, add_special_tokens=False)["input_ids"] == ours


def test_ways_to_cut_text_that_llama_cpp_has_a_name_for(tmp_path):
    from tokenizers import Regex

    for before, name in (
        ([], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True)], "smollm"),
        ([pre_tokenizers.Split(Regex(SPLIT), "isolated")], "llama-bpe"),
        ([pre_tokenizers.Split(Regex(SPLIT.replace("{1,3}", "")), "isolated")], "qwen2"),
    ):
        byte_level(tmp_path, *before)
        assert tokenizer_keys(tmp_path, 100)["tokenizer.ggml.pre"] == name
    assert tokenizer_keys(tmp_path, 100)["tokenizer.ggml.tokens"][-1] == "[PAD99]"
    byte_level(tmp_path, pre_tokenizers.Whitespace())
    with pytest.raises(UnsupportedError, match="no name"):
        tokenizer_keys(tmp_path, 100)


def test_sentencepiece_scores_follow_the_merges(tmp_path):
    vocabulary = {name: index for index, name in enumerate(["<unk>", "<0x41>", "a", "b", "ab", "abab"])}
    data = {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": ["a b", "ab ab"], "byte_fallback": True},
        "pre_tokenizer": None,
        "added_tokens": [{"id": 0, "content": "<unk>", "special": True}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    keys = tokenizer_keys(tmp_path, 6)
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.scores"] == [-2.0, -2.0, -2.0, -2.0, 0.0, -1.0]
    assert keys["tokenizer.ggml.token_type"] == [3, 6, 1, 1, 1, 1]


def test_what_llama_cpp_can_not_hold_is_refused_by_name(checkpoint, quantized, tmp_path):
    reading = Reading(quantized(small("nvfp4-plain"), dtype=torch.bfloat16))
    with pytest.raises(UsageError) as caught:
        target.plan_route(reading, {})
    assert "e2m1 in groups of 16" in caught.value.what
    assert "--trade activations=16bit" in caught.value.hint
    no_tokenizer = Reading(quantized(small("w4a16-plain"), dtype=torch.bfloat16))
    with pytest.raises(InputError, match="tokenizer"):
        target.export(no_tokenizer, target.plan_route(no_tokenizer, {}), tmp_path / "out.gguf")
    window = Reading(checkpoint(small("w4a16-plain"), "mistral"))
    with pytest.raises(UnsupportedError, match="window of 6 tokens"):
        target.export(window, target.plan_route(window, {}), tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["mistral"]


def test_a_trade_is_measured(checkpoint, tmp_path):
    directory = checkpoint(small("mxfp4-plain"))
    trades = ("format=requantize", "activations=16bit")
    cost = exported(directory, tmp_path / "out.gguf", *trades, windows=random_tokens(2, 40))
    assert cost.tokens == 80
    assert cost.export_from_checkpoint > 1e-3


def test_a_tensor_that_reads_back_otherwise_is_not_published(checkpoint, tmp_path, monkeypatch):
    def damaged(weight):
        rows = to_rows(weight)
        rows[0, 2] ^= 0x80
        return rows

    directory = checkpoint(small("w4a16-plain"))
    monkeypatch.setattr(target, "to_rows", damaged)
    with pytest.raises(RunError, match="reads back"):
        exported(directory, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out*"))
