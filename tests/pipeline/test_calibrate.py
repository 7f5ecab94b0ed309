"""Stage 1: the statistics are those of the parent's inputs."""

import pytest
import torch
from safetensors.torch import save_file

from atomcli.errors import InputError
from atomcli.pipeline.calibrate import TOKENS, calibrate, open_calibration
from atomcli.runtime.decoder import load_parent
from tests.pipeline.conftest import small_recipe


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_energies_and_ranges_are_those_of_transformers_own_model(family, parent, tokens, tmp_path):
    source = parent(family)
    artifact = calibrate(source, small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    model = load_parent(source)
    sites = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_proj", "down": "mlp.down_proj"}
    inputs: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        for site, name in sites.items():
            key = f"{index}.{site}"
            layer.get_submodule(name).register_forward_pre_hook(
                lambda module, arguments, key=key: inputs.__setitem__(key, arguments[0].flatten(0, 1))
            )
    with torch.inference_mode():
        model(tokens)
    for key, x in inputs.items():
        index, site = key.split(".")
        found = artifact.statistics(int(index))[site]
        assert torch.allclose(found.energy, x.double().square().sum(0), rtol=1e-4)
        assert torch.allclose(found.minimum, x.amin(0), rtol=1e-3, atol=1e-5)
        assert torch.allclose(found.maximum, x.amax(0), rtol=1e-3, atol=1e-5)
        assert found.tokens.tolist() == [tokens.numel()]


def test_every_token_reaches_its_experts(parent, tokens, tmp_path):
    source = parent("qwen3_moe")
    artifact = calibrate(source, small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    sparse = artifact.statistics(1)
    assert sparse["gate_up"].tokens.shape == (source.config.num_experts,)
    assert int(sparse["gate_up"].tokens.sum()) == tokens.numel() * source.config.num_experts_per_tok
    assert sparse["down"].tokens.equal(sparse["gate_up"].tokens)
    assert artifact.statistics(0)["down"].tokens.tolist() == [tokens.numel()]


def test_an_artifact_holds_nothing_of_the_run(parent, tokens, tmp_path):
    calibrate(parent(), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "calibration.json",
        "statistics-00001.safetensors",
        "statistics-00002.safetensors",
        "tokens.safetensors",
    ]


def test_damaged_tokens_are_noticed(parent, tokens, tmp_path):
    calibrate(parent(), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    path = tmp_path / "out" / TOKENS
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="is damaged"):
        open_calibration(tmp_path / "out", parent())


def test_a_damaged_artifact_is_named(parent, tokens, tmp_path):
    artifact = calibrate(parent(), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    for damage in ("[]", "3", '{"model": "x"}'):
        (tmp_path / "out" / "calibration.json").write_text(f'{{"identity": {damage}}}')
        with pytest.raises(InputError, match=r"calibration\.json is damaged"):
            open_calibration(tmp_path / "out", parent())
    save_file({"qkv.energy": torch.ones(80)}, tmp_path / "out" / "statistics-00001.safetensors")
    with pytest.raises(InputError, match=r"statistics-00001\.safetensors is damaged: its SHA-256 differs"):
        artifact.statistics(0)
