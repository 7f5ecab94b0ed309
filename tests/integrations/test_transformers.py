"""transformers loads atom checkpoints after `import atomcli`, in either order of imports."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import atomcli
from atomcli.errors import InputError, UnsupportedError
from atomcli.formats.scheme import ActivationFormat, KVFormat, Scheme, WeightFormat
from atomcli.runtime import decoder
from atomcli.runtime.cache import QuantizedKVLayer
from atomcli.runtime.linear import QuantLinear
from tests.helpers.tiny import NAMES, random_parent, random_tokens, write_checkpoint

assert atomcli.__version__

SCHEME = Scheme(
    WeightFormat("int4", 32, "two_level"), ActivationFormat("int4", 32, "two_level", False, 0.95), 16, "hadamard"
)
KV = KVFormat("int4", "after_rope", True, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_from_pretrained_is_bit_equal(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    _, source = random_parent(name, dtype=dtype)
    skip = ("mlp.experts.1.up_proj", "self_attn.o_proj")
    written = write_checkpoint(tmp_path / "out", source, SCHEME, KV, skip)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = random_tokens()
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.equal(logits, written(tokens).logits)
        assert torch.equal(logits, decoder.load_checkpoint(tmp_path / "out")(tokens).logits)
    assert logits.dtype == dtype
    assert model.is_quantized
    state, expected = model.state_dict(), written.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    options: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "do_sample": False}
    out = model.generate(tokens, return_dict_in_generate=True, **options)
    assert all(isinstance(layer, QuantizedKVLayer) for layer in out.past_key_values.layers)
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len({id(linear.shared_input) for linear in linears}) < len(linears)


@pytest.mark.parametrize(
    "load", [AutoModelForCausalLM.from_pretrained, decoder.load_checkpoint], ids=["from_pretrained", "load_checkpoint"]
)
def test_save_pretrained_writes_the_checkpoint_again(tmp_path: Path, load: Any) -> None:
    _, source = random_parent("mixtral", dtype=torch.bfloat16)
    write_checkpoint(tmp_path / "out", source, SCHEME, KV)
    model = load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    tokens = random_tokens()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_another_dtype_may_be_asked_for(tmp_path: Path) -> None:
    _, source = random_parent("llama_biased", dtype=torch.bfloat16)
    write_checkpoint(tmp_path / "out", source, SCHEME, KV)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert model(random_tokens()).logits.dtype == torch.float32
    linear = model.model.layers[0].mlp.up_proj
    assert linear.bias.dtype == torch.float32
    assert linear.weight_multiplier.dtype == torch.int8


def test_damage_is_an_error_not_a_warning(tmp_path: Path) -> None:
    _, source = random_parent("llama")
    write_checkpoint(tmp_path / "out", source, SCHEME, KV)
    file = tmp_path / "out" / "model-00001.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight_packed"
    file_of = file if name in tensors else tmp_path / "out" / "model-00002.safetensors"
    tensors = load_file(file_of)
    removed = {key: tensor for key, tensor in tensors.items() if key != name}
    for damaged, message in (
        (removed, f"lacks {name}"),
        (tensors | {"model.layers.0.mlp.up_proj.weight": torch.zeros(112, 80)}, "has no place"),
        (tensors | {name: tensors[name][:, :-1].contiguous()}, f"{name} is"),
    ):
        save_file(damaged, file_of, metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_atom_cannot_load_is_said(tmp_path: Path) -> None:
    _, source = random_parent("llama")
    write_checkpoint(tmp_path / "out", source, SCHEME, KV)
    with pytest.raises(UnsupportedError, match="can't be loaded as LlamaModel"):
        AutoModel.from_pretrained(tmp_path / "out")
    with pytest.raises(UnsupportedError, match="attn_implementation='eager'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")


def test_a_device_map_is_obeyed(tmp_path: Path) -> None:
    _, source = random_parent("llama")
    written = write_checkpoint(tmp_path / "out", source, SCHEME, KV)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    with torch.no_grad():
        assert torch.equal(model(random_tokens()).logits, written(random_tokens()).logits)


@pytest.mark.parametrize(
    "order",
    [
        "import importlib.util, atomcli; importlib.util.find_spec('transformers.quantizers.auto')",
        "import transformers.quantizers.auto, atomcli",
    ],
    ids=["atomcli first, the module looked up but not loaded", "transformers first"],
)
def test_registration_in_either_order(order: str) -> None:
    check = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as t; assert 'atom' in t"
    subprocess.run([sys.executable, "-c", f"{order}; {check}"], check=True, timeout=120)


def test_importing_atomcli_loads_neither_torch_nor_transformers() -> None:
    check = "import sys, atomcli; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
