"""Models made of our blocks compute what transformers' own do, and checkpoints what the pipeline's blocks do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from atomcli.errors import InputError
from atomcli.formats.scheme import SCHEMES, ActivationFormat, KVFormat, Scheme, WeightFormat
from atomcli.models.registry import describe
from atomcli.runtime import decoder
from atomcli.runtime.linear import QuantLinear
from tests.helpers.tiny import NAMES, quantized_block, random_parent, random_tokens, write_checkpoint

# Groups of 32 and 16 outliers leave ragged groups in layers of 80, 112 and 48 channels.
PAPER = Scheme(WeightFormat("int4", 32, "fp16"), ActivationFormat("int4", 32, "fp16", True, 0.9), 16)
TWO_LEVEL = Scheme(
    WeightFormat("int4", 32, "two_level"), ActivationFormat("int4", 32, "two_level", False, 0.95), 16, "hadamard"
)
KV4 = KVFormat("int4", "after_rope", True, True)


def run_blocks(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits by the pipeline's road: block by block, without a cache."""
    family = describe(model.config)
    hidden = decoder.embed(model, tokens)
    for index, block in enumerate(model.model.layers):
        hidden = block(hidden, **decoder.block_arguments(model, family, index, hidden))
    return decoder.logits(model, hidden)


@pytest.mark.parametrize("name", NAMES)
def test_parent_computes_what_transformers_computes(name: str) -> None:
    own, source = random_parent(name)
    parent = decoder.load_parent(source)
    tokens = random_tokens()
    with torch.no_grad():
        expected, logits = own(tokens).logits, parent(tokens).logits
        assert torch.equal(logits, run_blocks(parent, tokens))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1
    mask = torch.ones_like(tokens)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(own.generate(tokens, **options), parent.generate(tokens, **options))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rope(tmp_path: Path, rope: dict[str, Any]) -> None:
    own, source = random_parent("llama", rope_parameters={"rope_theta": 10000.0} | rope)
    plain, _ = random_parent("llama")
    tokens = random_tokens()
    write_checkpoint(tmp_path / "out", source, SCHEMES["w16a16"], KVFormat("float"))
    with torch.no_grad():
        expected = own(tokens).logits
        assert torch.equal(decoder.load_parent(source)(tokens).logits, expected)
        torch.testing.assert_close(decoder.load_checkpoint(tmp_path / "out")(tokens).logits, expected)
        assert not torch.allclose(plain(tokens).logits, expected, atol=1e-3)


def test_parent_shares_the_memory_of_its_source() -> None:
    _, source = random_parent("llama")
    parent = decoder.load_parent(source)
    addresses = {tensor.data_ptr() for tensor in source.tensors.values()}
    assert {parameter.data_ptr() for parameter in parent.parameters()} == addresses
    assert parent.lm_head.weight is parent.model.embed_tokens.weight


def test_block_tensors_must_fit() -> None:
    _, source = random_parent("llama")
    family = describe(source.config)
    state = decoder.read_block(family, 0, source).state_dict()
    for change, message in (
        ({"self_attn.q_proj.weight": None}, r"model\.layers\.0 lacks self_attn\.q_proj\.weight"),
        ({"extra.weight": torch.zeros(1)}, "has no place for extra.weight"),
        ({"mlp.up_proj.weight": torch.zeros(2, 2)}, "another shape for mlp.up_proj.weight"),
    ):
        tensors = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
        with pytest.raises(InputError, match=message):
            decoder.build_block(family, source.config, 0, tensors)


@pytest.mark.parametrize(
    "scheme", [PAPER, TWO_LEVEL, SCHEMES["mxfp4"], SCHEMES["nvfp4"], SCHEMES["w8a8"]], ids=lambda s: s.name
)
def test_checkpoint_is_bit_equal_to_the_blocks_it_was_written_from(tmp_path: Path, scheme: Scheme) -> None:
    _, source = random_parent("llama", dtype=torch.bfloat16)
    blocks = write_checkpoint(tmp_path / "out", source, scheme, KV4)
    model = decoder.load_checkpoint(tmp_path / "out")
    tokens = random_tokens()
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.equal(logits, run_blocks(blocks, tokens))
        assert torch.equal(logits, run_blocks(model, tokens))
    assert logits.dtype == torch.bfloat16
    assert any(isinstance(module, QuantLinear) for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_of_every_family(tmp_path: Path, name: str) -> None:
    own, source = random_parent(name)
    kept = ("mlp.down_proj", "mlp.experts.1.up_proj")
    blocks = write_checkpoint(tmp_path / "out", source, SCHEMES["w8a8"], KVFormat("int8", "before_rope"), kept)
    model = decoder.load_checkpoint(tmp_path / "out")
    tokens = random_tokens()
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.equal(logits, run_blocks(blocks, tokens))
        # 8 bits stay close to the parent; wrong experts, heads or rotations would not. Experts may be routed otherwise.
        error = (logits - own(tokens).logits).norm() / own(tokens).logits.norm()
    assert error < (0.3 if "mix" in name or "moe" in name else 0.1)


def test_generation_with_left_padding_is_that_of_each_prompt_alone(tmp_path: Path) -> None:
    _, source = random_parent("qwen2", use_sliding_window=False)
    write_checkpoint(tmp_path / "out", source, PAPER, KV4)
    model = decoder.load_checkpoint(tmp_path / "out")
    short, long = random_tokens(1, 5, seed=1), random_tokens(1, 9, seed=2)
    batch = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1), long])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    together = model.generate(batch, attention_mask=mask, **options)[:, 9:]
    for row, prompt in zip(together, (short, long), strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
        assert torch.equal(row, alone)


def test_float_weights_with_quantized_activations() -> None:
    own, source = random_parent("llama")
    scheme = Scheme(WeightFormat("float"), ActivationFormat("int8"), 16, "hadamard")
    block = quantized_block(source, 0, scheme, decoder.FLOAT_CACHE)
    hidden = own.model.embed_tokens(random_tokens())
    model = decoder.read_outer(describe(source.config), source)
    arguments = decoder.block_arguments(model, describe(source.config), 0, hidden)
    with torch.no_grad():
        expected, out = own.model.layers[0](hidden, **arguments), block(hidden, **arguments)
    assert 0 < (out - expected).norm() / expected.norm() < 0.05


def edit_config(directory: Path, change: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    _, source = random_parent("llama")
    directory = tmp_path / "out"
    write_checkpoint(directory, source, PAPER, KV4)
    file = directory / "model-00002.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight_packed"))
    original = tensors[name]
    for changed, message in (
        (tensors | {name: original.to(torch.int8)}, f"{name} is torch.int8"),
        (tensors | {name: original[:-1].clone()}, f"{name} is torch.uint8"),
        ({key: tensor for key, tensor in tensors.items() if key != name}, f"lacks {name}"),
        (tensors | {"stray": torch.zeros(1)}, "the tensor stray, for which"),
    ):
        save_file(changed, file)
        with pytest.raises(InputError, match=message):
            decoder.load_checkpoint(directory)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="can't be read"):
        decoder.load_checkpoint(directory)
    file.unlink()
    with pytest.raises(InputError, match="lacks the file model-00002"):
        decoder.load_checkpoint(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("quantization_config"), "not an atom checkpoint"),
        (lambda c: c["quantization_config"].update(version=7), "format version 7"),
        (lambda c: c["quantization_config"]["kv_cache"].update(element="int3", colour="red"), "can't be read"),
        (lambda c: c["quantization_config"]["schemes"].clear(), "the scheme 'all'"),
        (lambda c: c["quantization_config"]["schemes"]["all"].update(outliers=1000), "leave no body"),
        (lambda c: c["quantization_config"]["schemes"]["all"]["weights"].update(element="int3"), "int3"),
        (lambda c: first_entry(c).update(activation_clip="a"), "can't be read"),
        (lambda c: c["quantization_config"]["kv_cache"].update(element="int3"), "not int3"),
        (lambda c: next(iter(c["quantization_config"]["linears"].values())).update(in_features=40), "80"),
        (lambda c: c["quantization_config"]["linears"].update(nowhere={**_ENTRY}), "names the linear nowhere"),
    ],
)
def test_edited_configs_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    _, source = random_parent("llama")
    write_checkpoint(tmp_path / "out", source, PAPER, KV4)
    edit_config(tmp_path / "out", change)
    with pytest.raises(InputError, match=message):
        decoder.load_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("change", [{"hidden_act": "nonsense"}, {"rope_parameters": {"rope_type": "nonsense"}}])
def test_a_config_that_no_module_can_be_made_of_is_refused(change: dict[str, Any]) -> None:
    _, source = random_parent("llama")
    for key, value in change.items():
        setattr(source.config, key, value)
    with pytest.raises(InputError, match=r"describes no Llama model .*nonsense"):
        decoder.empty_model(describe(source.config), source.config)
    if "hidden_act" in change:
        with pytest.raises(InputError, match=r"describes no Llama model .*nonsense"):
            decoder.empty_block(describe(source.config), source.config, 0)


def test_unreadable_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        decoder.load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json can't be read"):
        decoder.load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "martian"}')
    with pytest.raises(InputError, match="martian"):
        decoder.load_checkpoint(tmp_path)


@pytest.mark.parametrize("file", [5, ["model-00001.safetensors"], "../out/model-00001.safetensors"])
def test_an_index_that_names_no_file_beside_it_is_refused(tmp_path: Path, file: Any) -> None:
    _, source = random_parent("llama")
    write_checkpoint(tmp_path / "out", source, PAPER, KV4)
    index = tmp_path / "out" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"can't be read|lacks the file"):
        decoder.load_checkpoint(tmp_path / "out")


def first_entry(config: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(iter(config["quantization_config"]["linears"].values()))
    return entry


_ENTRY = {"scheme": "all", "in_features": 80, "out_features": 80}
