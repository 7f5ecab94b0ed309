"""The whole compress road on tiny models: every family, every format, and what the files then compute."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import atomcli.pipeline.finish as ending
from atomcli.checkpoint.source import open_source
from atomcli.checkpoint.verify import verify_checkpoint
from atomcli.errors import InputError, RunError, UnsupportedError, UsageError
from atomcli.formats.scheme import KVFormat
from atomcli.pipeline import check
from atomcli.pipeline.calibrate import calibrate
from atomcli.pipeline.compress import compress
from atomcli.recipe import load_recipe
from atomcli.runtime.decoder import load_checkpoint, load_parent
from atomcli.runtime.linear import QuantLinear
from tests.helpers.tiny import NAMES
from tests.pipeline.conftest import files_of, small_recipe


def kld_of(parent: torch.nn.Module, checkpoint: torch.nn.Module, tokens: torch.Tensor) -> float:
    total = 0.0
    with torch.inference_mode():
        for sequence in check.check_tokens(tokens):
            p = parent(sequence[None]).logits.double().log_softmax(-1)
            q = checkpoint(sequence[None]).logits.double().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(check.check_tokens(tokens))


@pytest.mark.parametrize("family", NAMES)
def test_every_family_ends_as_a_checkpoint_that_runs_as_the_road_did(family, parent, tokens, tmp_path):
    source = parent(family)
    report = compress(source, small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    verify_checkpoint(tmp_path / "out")
    assert not (tmp_path / "out.unfinished").exists()
    model = load_checkpoint(tmp_path / "out")
    linears = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert sorted(linears) == sorted(row["linear"] for row in report["layers"])
    assert kld_of(load_parent(source), model, tokens) == pytest.approx(report["proof"]["kld"], rel=1e-6)
    assert all(0 < row["error"] < 0.2 for row in report["layers"])


RECIPES = ["atom-paper", "atom-best", "atom-w4a8", "atom-w4a8-o0", "rtn-w4a4", "w8a8", "w4a16", "fp4", "mxfp4", "nvfp4"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_compresses(name, parent, tokens, tmp_path):
    data = load_recipe(name).resolved()
    for section in ("weights", "activations"):
        if data[section]["group"] == 128:
            data[section]["group"] = 16
    data["outliers"]["channels"] = min(16, data["outliers"]["channels"])
    report = compress(parent(), small_recipe(**data), tmp_path / "out", tokens=tokens, device="cpu")
    assert report["recipe"]["name"] == name
    assert report["proof"]["kld"] > 0
    assert verify_checkpoint(tmp_path / "out")


def test_more_bits_are_closer_to_the_parent(parent, tokens, tmp_path):
    eight = {"format": "int8", "group": None, "clip": 1.0}
    recipes = {
        "w4a4": small_recipe(),
        "w4a16": small_recipe(activations={"format": "none", "group": None}, kv_cache={"format": "none"}),
        "w8a8": small_recipe(
            weights=eight, activations=eight, outliers={"channels": 0}, kv_cache={"format": "none", "hadamard": False}
        ),
    }
    kld = {
        name: compress(parent(), recipe, tmp_path / name, tokens=tokens, device="cpu")["proof"]["kld"]
        for name, recipe in recipes.items()
    }
    assert kld["w8a8"] < kld["w4a16"] < kld["w4a4"]


def test_gptq_on_the_quantized_stream_beats_rounding(parent, tmp_path):
    tokens = torch.randint(2, 97, (24, 48), generator=torch.Generator().manual_seed(3))
    errors = {}
    for rounding in ("gptq", "rtn"):
        recipe = small_recipe(weights={"rounding": rounding}, outliers={"channels": 8})
        report = compress(parent(), recipe, tmp_path / rounding, tokens=tokens, device="cpu")
        errors[rounding] = report["proof"]["kld"]
    assert errors["gptq"] < errors["rtn"]


def test_the_report_and_the_config_agree(parent, tokens, tmp_path):
    report = compress(parent(), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    assert json.loads((tmp_path / "out" / "atom_report.json").read_text()) == json.loads(json.dumps(report))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache"] == KVFormat("int4", "after_rope", True, True).to_dict()
    for row in report["layers"]:
        assert config["linears"][row["linear"]]["scheme"] == row["scheme"]
    assert report["parent"]["fingerprint"] == parent().fingerprint()
    assert "lm_head" in report["kept"]


def test_down_needs_no_gather(parent, tokens, tmp_path):
    compress(parent(), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["linears"]
    assert config["model.layers.0.self_attn.q_proj"]["permutation"]
    assert "permutation" not in config["model.layers.0.mlp.down_proj"]


def test_rules_keep_and_mix_schemes(parent, tokens, tmp_path):
    rules = [{"match": "model.layers.0.mlp.*", "keep": True}, {"match": "o_proj", "scheme": "w8a8"}]
    report = compress(parent(), small_recipe(rules=rules), tmp_path / "out", tokens=tokens, device="cpu")
    schemes = {row["linear"]: row["scheme"] for row in report["layers"]}
    assert "model.layers.0.mlp.up_proj" not in schemes
    assert schemes["model.layers.0.self_attn.o_proj"] == "w8a8"
    assert "model.layers.0.mlp.up_proj" in report["kept"]
    model = load_checkpoint(tmp_path / "out")
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ([{"match": "q_proj", "keep": True}], UsageError, "self_attn.q_proj 16 bits and .*k_proj the scheme w4a4"),
        ([{"match": "qproj", "keep": True}], UsageError, "matches 'qproj', which is no linear"),
        ([{"match": "lm_head", "scheme": "w8a8"}], UnsupportedError, "lm_head stays in 16 bits"),
    ],
)
def test_rules_that_can_not_be_are_refused_before_anything_is_spent(rules, error, message, parent, tokens, tmp_path):
    with pytest.raises(error, match=message):
        compress(parent(), small_recipe(rules=rules), tmp_path / "out", tokens=tokens, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_rule_that_splits_experts_is_refused(parent, tokens, tmp_path):
    rules = [{"match": "*.experts.2.*", "keep": True}]
    with pytest.raises(UsageError, match=r"experts\.0\.gate_proj .* and .*experts\.2\.gate_proj"):
        compress(parent("mixtral"), small_recipe(rules=rules), tmp_path / "out", tokens=tokens, device="cpu")


def test_more_outliers_than_channels_is_refused(parent, tokens, tmp_path):
    with pytest.raises(UsageError, match=r"has 128 outliers, but model\.layers\.0\.self_attn\.q_proj"):
        compress(parent(), small_recipe(outliers={"channels": 128}), tmp_path / "out", tokens=tokens, device="cpu")


def test_an_output_that_is_not_empty_is_refused_or_replaced(parent, tokens, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is not empty"):
            compress(parent(), small_recipe(), out, tokens=tokens, device="cpu", overwrite=overwrite)
    (out / "thesis.txt").unlink()
    compress(parent(), small_recipe(), out, tokens=tokens, device="cpu")
    with pytest.raises(UsageError, match="is not empty"):
        compress(parent(), small_recipe(), out, tokens=tokens, device="cpu")
    other = small_recipe(outliers={"channels": 8})
    report = compress(parent(), other, out, tokens=tokens, device="cpu", overwrite=True)
    assert report["recipe"]["outliers"]["channels"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert verify_checkpoint(out)


def test_an_artifact_gives_the_same_checkpoint_as_calibrating_oneself(parent, tokens, tmp_path, caplog):
    source = parent("mixtral")
    compress(source, small_recipe(), tmp_path / "alone", tokens=tokens, device="cpu")
    calibrate(source, small_recipe(), tmp_path / "artifact", tokens=tokens, device="cpu")
    compress(source, small_recipe(), tmp_path / "reused", calibration=tmp_path / "artifact", device="cpu")
    assert files_of(tmp_path / "alone") == files_of(tmp_path / "reused")
    with caplog.at_level(logging.WARNING, "atomcli"):
        recipe = small_recipe(calibration={"samples": 3})
        report = compress(source, recipe, tmp_path / "third", calibration=tmp_path / "artifact", device="cpu")
    assert "the calibration in" in caplog.text
    assert report["recipe"]["calibration"]["samples"] == 128


def test_an_artifact_of_another_model_is_refused(parent, tokens, tmp_path):
    calibrate(parent("qwen3"), small_recipe(), tmp_path / "artifact", tokens=tokens, device="cpu")
    with pytest.raises(InputError, match="was calibrated on another model"):
        compress(parent(), small_recipe(), tmp_path / "out", calibration=tmp_path / "artifact", device="cpu")
    with pytest.raises(InputError, match="is no calibration"):
        compress(parent(), small_recipe(), tmp_path / "out", calibration=tmp_path, device="cpu")


def test_a_hadamard_over_a_key_bias_is_refused_first(parent, tokens, tmp_path):
    recipe = small_recipe(kv_cache={"bias_free": False})
    with pytest.raises(UnsupportedError, match="hadamard"):
        compress(parent("qwen2"), recipe, tmp_path / "out", tokens=tokens, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_name_their_tensor(parent, tokens, tmp_path):
    source = parent()
    broken = tmp_path / "broken"
    source.save_companions(broken)
    tensors = load_file(source.path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        compress(open_source(str(broken)), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    assert not (tmp_path / "out").exists()


def test_hidden_states_that_overflow_name_the_block(parent, tokens, tmp_path):
    source = parent()
    hot = tmp_path / "hot"
    source.save_companions(hot)
    tensors = load_file(source.path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e38
    save_file(tensors, hot / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"model\.layers\.1 put out \d+ NaN or Inf"):
        compress(open_source(str(hot)), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")


def test_a_shard_that_changed_after_writing_is_not_published(parent, tokens, tmp_path, monkeypatch):
    """The proof reads the files, not the memory: a bit that flips on the disk is found."""
    original = ending.finish

    def finish_and_flip(directory, shards):
        manifest = original(directory, shards)
        path = directory / "model-00001.safetensors"
        data = bytearray(path.read_bytes())
        data[-3] ^= 4
        path.write_bytes(data)
        return manifest

    monkeypatch.setattr(ending, "finish", finish_and_flip)
    with pytest.raises((RunError, InputError)):
        compress(parent(), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_computes_something_else_is_not_published(parent, tokens, tmp_path, monkeypatch):
    """Even when every file is what was written: here the cache format in the config is wrong."""
    original = ending.pack.quantization_config

    def lie(*arguments):
        config = original(*arguments)
        config["kv_cache"]["element"] = "float"
        return config

    monkeypatch.setattr(ending.pack, "quantization_config", lie)
    with pytest.raises(RunError, match="computes something else"):
        compress(parent(), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), "shape"),
        (torch.zeros(1, 1, dtype=torch.int64), "shape"),
        (torch.full((2, 8), 97), "token 97"),
        (torch.tensor([[3, -1, 5]]), "token -1"),
    ],
)
def test_bad_tokens_are_refused(bad, message, parent, tmp_path):
    with pytest.raises(InputError, match=message):
        compress(parent(), small_recipe(), tmp_path / "out", tokens=bad, device="cpu")
    assert list(tmp_path.iterdir()) == []
