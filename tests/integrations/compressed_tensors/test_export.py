"""Exports to compressed-tensors: what its own library, transformers and vLLM make of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from atomcli.checkpoint.verify import verify_files
from atomcli.errors import InputError, RunError, UsageError
from atomcli.evaluation.divergence import divergence
from atomcli.integrations.compressed_tensors import export as ct
from atomcli.integrations.portable import natural_weight, parse_trades
from atomcli.integrations.reading import Reading
from atomcli.runtime.decoder import load_checkpoint
from tests.helpers.tiny import random_tokens
from tests.integrations.conftest import small

PLAIN = ("w4a16-plain", "w4a8-plain", "w4a4-plain", "nvfp4-plain", "mxfp4-plain", "w8a8")
WINDOWS = random_tokens(16, 120, seed=5)

# What a reader that never heard of atom does, in a process of its own.
READER = """
import functools, json, sys, torch
from transformers import AutoModelForCausalLM
tokens_file, *directories = sys.argv[1:]
tokens = torch.load(tokens_file)
@functools.cache
def log_p(directory):
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    with torch.inference_mode():
        return model(tokens).logits.double().log_softmax(-1)
found = {}
for parent, export in zip(directories[::2], directories[1::2]):
    p, q = log_p(parent), log_p(export)
    found[export] = float((p.exp() * (p - q)).sum(-1)[:, :-1].mean())
assert not any(name.split(".")[0] == "atomcli" for name in sys.modules)
print(json.dumps(found))
"""


def exported(checkpoint: Path, out: Path, *trades: str, windows: torch.Tensor | None = None):
    reading = Reading(checkpoint)
    return ct.export(reading, ct.plan_route(reading, parse_trades(trades)), out, windows=windows)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def read_by_a_stranger(parents: dict[Path, Path], tmp_path: Path) -> dict[str, float]:
    """KL(parent ‖ export) by export, each with its parent, as transformers computes it in a process without atom."""
    torch.save(WINDOWS, tmp_path / "tokens.pt")
    directories = [str(directory) for export, parent in parents.items() for directory in (parent, export)]
    words = [sys.executable, "-c", READER, str(tmp_path / "tokens.pt"), *directories]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# How far the KLD may be from atom's: 1 %, but where the library rounds activations by other rules than atom. It doesn't
# round INT4's group scales to fp16; NVFP4's are in units of one scale fixed beforehand, not one per token; MXFP4's go
# to the next higher power of two from 1.75 on.
TOLERANCE = {"w4a4-plain": 0.03, "w8a8": 0.05, "nvfp4-plain": 0.02, "mxfp4-plain": 0.04}


def with_activation_clip(checkpoint: Path, out: Path, clip: float) -> Path:
    """The checkpoint with another clip ratio of its activations."""
    shutil.copytree(checkpoint, out)
    config = json.loads((out / "config.json").read_text())
    for entry in config["quantization_config"]["linears"].values():
        entry["activation_clip"] = clip
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["integers", "fp4"])
def test_transformers_without_atom_computes_what_atom_does(dtype, parent, quantized, tmp_path):
    # The library makes bfloat16 of FP4 whatever the model is in.
    names = [name for name in PLAIN if ("fp4" in name) == (dtype == torch.bfloat16)]
    checkpoints = {name: quantized(small(name), dtype=dtype) for name in names}
    exports = {name: tmp_path / name for name in names}
    for name, checkpoint in checkpoints.items():
        assert exported(checkpoint, exports[name]) is None
    found = read_by_a_stranger(dict.fromkeys(exports.values(), parent(dtype=dtype)), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(parent(dtype=dtype))
    for name, checkpoint in checkpoints.items():
        if "a8" in name:  # the library maps the largest INT8 to 127.5, as it does with INT4; engines to 127
            checkpoint = with_activation_clip(checkpoint, tmp_path / f"{name}-clipped", 127 / 127.5)
        ours = divergence(model, load_checkpoint(checkpoint), WINDOWS).mean_kld
        assert found[str(exports[name])] == pytest.approx(ours, rel=TOLERANCE.get(name, 0.01)), name


def own_tensors(directory: Path, linear: str) -> dict[str, torch.Tensor]:
    prefix = linear + "."
    return {name.removeprefix(prefix): t for name, t in tensors_of(directory).items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", PLAIN)
def test_the_library_reads_the_same_weights_and_writes_the_same_bytes(name, quantized, tmp_path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    checkpoint = quantized(small(name), dtype=torch.bfloat16)
    exported(checkpoint, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(raw).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    reading, everything = Reading(checkpoint), tensors_of(tmp_path / "out")
    for linear in reading.linears:
        prefix = linear.disk + "."
        stored = {key.removeprefix(prefix): t for key, t in everything.items() if key.startswith(prefix)}
        weight, layout, _ = reading.read(linear)
        decompressed = compressor.decompress(dict(stored), scheme)["weight"]
        # bfloat16 twice: of the scale, and of the product
        assert torch.allclose(decompressed.float(), natural_weight(weight, layout), rtol=2**-7, atol=1e-5)
        parameters = dict(stored) | {"weight": natural_weight(weight, layout)}
        if name == "nvfp4-plain":
            parameters["weight_scale"] = stored["weight_scale"].float()
        if name == "mxfp4-plain":
            parameters["weight_scale"] = torch.exp2(stored["weight_scale"].float() - 127)
        again = compressor.compress({k: v for k, v in parameters.items() if k != "weight_packed"}, scheme)
        packed = "weight" if name == "w8a8" else "weight_packed"
        same = (again[packed].view(torch.uint8) == stored[packed].view(torch.uint8)).float().mean()
        assert same == 1 if "fp4" not in name else same > 0.8  # its zeros may be negative ones


@pytest.mark.parametrize("name", PLAIN)
def test_the_export_weighs_what_the_checkpoint_weighs(name, quantized, tmp_path):
    checkpoint = quantized(small(name), dtype=torch.bfloat16)
    exported(checkpoint, tmp_path / "out")
    ours, theirs = (sum(t.nbytes for t in tensors_of(each).values()) for each in (checkpoint, tmp_path / "out"))
    assert theirs == pytest.approx(ours, rel=0.01)


MIXED = {
    "rules": [
        {"match": "down_proj", "scheme": "w8a8"},
        {"match": "model.layers.1.self_attn.o_proj", "keep": True},
        {"match": "lm_head", "keep": True},
    ]
}


@pytest.mark.slow
def test_every_family_and_mixed_precision_load_elsewhere(parent, quantized, tmp_path):
    recipe, mixed = small("w4a16-plain"), small("w4a16-plain", **MIXED)
    cases = {
        "llama_biased": quantized(recipe, "llama_biased"),
        "qwen2": quantized(recipe, "qwen2", use_sliding_window=False),
        "qwen3": quantized(mixed, "qwen3"),
        "mixtral": quantized(recipe, "mixtral"),
    }
    for family, checkpoint in cases.items():
        exported(checkpoint, tmp_path / family)
    groups = json.loads((tmp_path / "qwen3" / "config.json").read_text())["quantization_config"]
    assert groups["format"] == "mixed-precision"
    assert {group["format"] for group in groups["config_groups"].values()} == {"pack-quantized", "int-quantized"}
    assert "model.layers.1.self_attn.o_proj" in groups["ignore"]
    options = {"qwen2": {"use_sliding_window": False}}
    parents = {family: parent(family, **options.get(family, {})) for family in cases}
    found = read_by_a_stranger({tmp_path / family: directory for family, directory in parents.items()}, tmp_path)
    for family, checkpoint in cases.items():
        model = AutoModelForCausalLM.from_pretrained(parents[family])
        ours = divergence(model, load_checkpoint(checkpoint), WINDOWS).mean_kld
        assert found[str(tmp_path / family)] == pytest.approx(ours, rel=0.01), family


@pytest.mark.parametrize(
    ("sections", "bits"),
    [
        ({"weights": {"group": 64}}, "16, 32, 64"),
        ({"weights": {"scale": "two_level", "group": 32}}, "signed scales"),
    ],
    ids=["a ragged group", "two-level scales"],
)
def test_what_is_the_same_number_in_other_words_is_written_without_loss(sections, bits, quantized, tmp_path):
    checkpoint = quantized(small("w4a16-plain", **sections), dtype=torch.bfloat16)
    assert exported(checkpoint, tmp_path / "out") is None
    raw = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if "scale" not in sections["weights"]:  # 96 channels in groups of 64 are groups of 32
        assert {group["weights"]["group_size"] for group in raw["config_groups"].values()} == {32, 64}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")(WINDOWS[:1])


def test_the_order_of_channels_under_one_scale_is_put_back(tmp_path):
    from atomcli.formats.scheme import SCHEMES
    from tests.helpers.tiny import random_parent, write_checkpoint

    _, source = random_parent("llama", torch.bfloat16)
    write_checkpoint(tmp_path / "checkpoint", source, SCHEMES["w8a8"])
    reading = Reading(tmp_path / "checkpoint")
    assert all(linear.permuted for linear in reading.linears)
    assert exported(tmp_path / "checkpoint", tmp_path / "out") is None
    stored = own_tensors(tmp_path / "out", "model.layers.0.mlp.up_proj")
    parent = source.tensors["model.layers.0.mlp.up_proj.weight"].float()
    error = stored["weight"].float() * stored["weight_scale"] - parent
    assert error.abs().max() <= 0.51 * stored["weight_scale"].max()


def test_what_it_can_not_hold_is_refused_with_the_options_to_type(quantized, tmp_path):
    reading = Reading(quantized(small("atom-w4a8")))
    with pytest.raises(UsageError) as caught:
        ct.plan_route(reading, {})
    for part in ("16 outlier channels", "hadamard transform", "another order", "int4 KV cache"):
        assert part in caught.value.what
    trades = [word for word in caught.value.hint.split() if "=" in word]
    assert set(trades) == {"outliers=requantize", "transform=requantize", "order=requantize", "cache=16bit"}
    assert not ct.plan_route(reading, parse_trades(trades)).exact
    with pytest.raises(UsageError, match="--trade is 'outlier=drop'; there is outliers=requantize"):
        parse_trades(["outlier=drop"])


def test_a_trade_is_measured_and_sixteen_bits_cost_less(quantized, tmp_path):
    checkpoint = quantized(small("atom-w4a8"))
    rest = ["cache=16bit"]
    costs = {}
    for remedy in ("requantize", "16bit"):
        trades = [f"{what}={remedy}" for what in ("outliers", "transform", "order")]
        costs[remedy] = exported(checkpoint, tmp_path / remedy, *trades, *rest, windows=WINDOWS[:4])
    assert costs["requantize"].tokens == 4 * 120
    assert 0 < costs["16bit"].export_from_checkpoint < costs["requantize"].export_from_checkpoint
    assert "config_groups" in json.loads((tmp_path / "requantize" / "config.json").read_text())["quantization_config"]
    names = tensors_of(tmp_path / "16bit").keys()
    assert "model.layers.0.mlp.up_proj.weight" in names


def test_the_cost_of_an_exact_export_is_nothing(quantized, tmp_path):
    cost = exported(quantized(small("w4a16-plain")), tmp_path / "out", windows=WINDOWS[:2])
    assert abs(cost.export_from_checkpoint) < 1e-6


def test_nvfp4_activations_need_the_range_that_calibration_saw(quantized, tmp_path):
    checkpoint = shutil.copytree(quantized(small("nvfp4-plain"), dtype=torch.bfloat16), tmp_path / "checkpoint")
    (checkpoint / "atom_report.json").unlink()
    with pytest.raises(InputError, match="input_absmax"):
        ct.plan_route(Reading(checkpoint), {})
    exported(checkpoint, tmp_path / "out", "activations=16bit")
    assert not any("input_global_scale" in name for name in tensors_of(tmp_path / "out"))


def test_one_nvfp4_scale_for_what_engines_fuse(quantized, tmp_path):
    exported(quantized(small("nvfp4-plain"), dtype=torch.bfloat16), tmp_path / "out")
    stored = tensors_of(tmp_path / "out")
    for site in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for suffix in ("weight_global_scale", "input_global_scale"):
            assert len({float(stored[f"model.layers.0.{linear}.{suffix}"]) for linear in site}) == 1


def test_a_linear_that_reads_back_otherwise_is_not_published(quantized, tmp_path, monkeypatch):
    real = ct.to_tensors

    def damaged(*arguments):
        tensors = real(*arguments)
        tensors["weight_packed"][0, 0] ^= 1 << 7
        return tensors

    monkeypatch.setattr(ct, "to_tensors", damaged)
    with pytest.raises(RunError, match="reads back as another weight"):
        exported(quantized(small("w4a16-plain")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nobody_elses_directory_is_touched(quantized, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        exported(quantized(small("w4a16-plain")), tmp_path / "out")
    (tmp_path / "run.unfinished").mkdir()
    (tmp_path / "run.unfinished" / "journal.json").write_text("{}")
    with pytest.raises(UsageError, match="unfinished run"):
        exported(quantized(small("w4a16-plain")), tmp_path / "run")
    assert (tmp_path / "run.unfinished" / "journal.json").is_file()


def test_the_card_says_what_was_traded_and_what_it_cost(quantized, tmp_path):
    trades = [f"{what}=requantize" for what in ("outliers", "transform", "order")]
    cost = exported(quantized(small("atom-w4a8")), tmp_path / "out", *trades, "cache=16bit", windows=WINDOWS[:1])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "compressed-tensors" in card.data.tags
    assert f"{cost.export_from_checkpoint:.4f} nats" in card.text
    assert "* 16 outlier channels" in card.text
    verify_files(tmp_path / "out")
    exported(quantized(small("w4a16-plain")), tmp_path / "exact")
    assert "without loss" in (tmp_path / "exact" / "README.md").read_text()


def test_transformers_is_suggested_where_it_reads_the_experts(quantized, tmp_path):
    for name, family, reads in (("w8a8", "mixtral", False), ("w4a16-plain", "mixtral", True), ("w8a8", "llama", True)):
        reading, out = Reading(quantized(small(name), family)), tmp_path / f"{name}-{family}"
        route = ct.plan_route(reading, {})
        ct.export(reading, route, out)
        card, typed = (out / "README.md").read_text(), " ".join(ct.next_commands(out, reading, route))
        assert ("from_pretrained" in card) == ("from_pretrained" in typed) == reads
        assert "vllm serve" in card
        assert "vllm serve" in typed
