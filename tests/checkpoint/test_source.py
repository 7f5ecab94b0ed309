import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from atomcli.checkpoint import digests
from atomcli.checkpoint.source import open_source
from atomcli.errors import AtomError, InputError, UnsupportedError
from tests.helpers.checkpoints import weights, write_checkpoint, write_model

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sharded", [False, True])
def test_reads_every_tensor_in_the_model_dtype(tmp_path: Path, dtype: torch.dtype, sharded: bool) -> None:
    source = open_source(str(write_model(tmp_path / "m", dtype, sharded)))
    expected = weights(dtype)
    assert source.names() == expected.keys()
    assert source.dtype == dtype
    assert source.config.model_type == "llama"
    for name, tensor in expected.items():
        assert source.shape(name) == tuple(tensor.shape)
        read = source.read(name)
        assert read.dtype == dtype
        assert torch.equal(read, tensor)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_decides_the_dtype(tmp_path: Path, key: str) -> None:
    source = open_source(str(write_model(tmp_path / "m", torch.float32, config={key: "bfloat16"})))
    assert source.dtype == torch.bfloat16
    name = "model.norm.weight"
    assert torch.equal(source.read(name), weights(torch.float32)[name].to(torch.bfloat16))


def test_integer_tensors_are_left_alone(tmp_path: Path) -> None:
    tensors = weights() | {"steps": torch.tensor([3, 4])}
    source = open_source(str(write_model(tmp_path / "m", tensors=tensors)))
    assert source.read("steps").dtype == torch.int64


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Walking a model allocates no more than its largest tensor, whatever its size."""
    tensors = {f"model.layers.{i}.w": torch.ones(256, 1024, dtype=torch.bfloat16) for i in range(24)}
    source = open_source(str(write_model(tmp_path / "m", tensors=tensors)))
    tracemalloc.start()
    for name in sorted(source.names()):
        assert source.read(name).shape == (256, 1024)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 512 * 1024 <= peak < 2 * 512 * 1024


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number_is_named_when_it_is_read(tmp_path: Path, value: float) -> None:
    tensors = weights()
    tensors["model.layers.1.mlp.down_proj.weight"][7, 9] = value
    source = open_source(str(write_model(tmp_path / "m", tensors=tensors)))
    source.read("model.norm.weight")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj\.weight in .* holds 1 NaN or Inf of 512"):
        source.read("model.layers.1.mlp.down_proj.weight")


def test_overflow_in_the_model_dtype_is_named(tmp_path: Path) -> None:
    tensors = weights(torch.float32)
    tensors["model.norm.weight"][0] = 1e6
    source = open_source(str(write_model(tmp_path / "m", config={"dtype": "float16"}, tensors=tensors)))
    with pytest.raises(InputError, match=r"model\.norm\.weight .* in float16"):
        source.read("model.norm.weight")


def test_an_absent_tensor(model: Path) -> None:
    source = open_source(str(model))
    for ask in (source.read, source.shape):
        with pytest.raises(InputError, match=r"has no tensor lm_head\.weight"):
            ask("lm_head.weight")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def break_model(directory: Path, how: str) -> None:
    index = directory / INDEX
    shard = directory / "model-00002-of-00002.safetensors"
    match how:
        case "missing shard":
            shard.unlink()
        case "absent tensor":
            weight_map = json.loads(index.read_text())["weight_map"]
            edit_json(index, weight_map=weight_map | {"model.layers.9.w": shard.name})
        case "stray tensor":
            weight_map = json.loads(index.read_text())["weight_map"]
            weight_map.pop("model.norm.weight")
            edit_json(index, weight_map=weight_map)
        case "swapped shards":
            first = directory / "model-00001-of-00002.safetensors"
            data = first.read_bytes()
            shutil.copy(shard, first)
            shard.write_bytes(data)
        case "index elsewhere":
            edit_json(index, weight_map={"model.norm.weight": "../model.safetensors"})
        case "empty index":
            index.write_text("{}")
        case "broken index":
            index.write_text('{"weight_map": ')
        case "index is a list":
            index.write_text("[]")
        case "no index":
            index.unlink()
        case "truncated shard":
            shard.write_bytes(shard.read_bytes()[:-10])
        case "no config":
            (directory / "config.json").unlink()
        case "broken config":
            (directory / "config.json").write_text("{")
        case "no model type":
            edit_json(directory / "config.json", model_type=None)
        case "nonsense config":
            edit_json(directory / "config.json", num_attention_heads="many")
        case "remote code":
            edit_json(directory / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
        case "quantized":
            edit_json(directory / "config.json", quantization_config={"quant_method": "gptq"})
        case "pickled":
            index.unlink()
            for file in directory.glob("*.safetensors"):
                file.unlink()
            (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        case "no weights":
            index.unlink()
            for file in directory.glob("*.safetensors"):
                file.unlink()
        case _:
            raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing shard", r"Shard .*model-00002-of-00002\.safetensors is missing; the index places 3 tensors in it"),
        ("absent tensor", r"names tensor model\.layers\.9\.w, which model-00002-of-00002\.safetensors doesn't hold"),
        ("stray tensor", r"holds tensor model\.norm\.weight, which the index places in no file"),
        ("swapped shards", r"names tensor .*, which model-0000\d-of-00002\.safetensors doesn't hold"),
        ("index elsewhere", r"names '\.\./model\.safetensors', which is not a file beside it"),
        ("empty index", "has no weight_map"),
        ("broken index", r"index\.json is not valid JSON"),
        ("index is a list", "holds list, not a JSON object"),
        ("no index", r"holds model-00001-of-00002\.safetensors but neither"),
        ("truncated shard", r"model-00002-of-00002\.safetensors is truncated"),
        ("no config", r"holds no config\.json"),
        ("broken config", r"config\.json is not valid JSON"),
        ("no model type", r"config\.json has no model_type"),
        ("nonsense config", r"config\.json is not a valid llama config"),
        ("remote code", r"asks for code from the model's repository \(auto_map\), which atom never runs"),
        ("quantized", r"is already quantized \(gptq\)"),
        ("pickled", r"pytorch_model\.bin is pickled, and reading a pickle runs whatever code is in it"),
        ("no weights", "holds no safetensors weights"),
    ],
)
def test_a_broken_directory_is_one_sentence(sharded: Path, how: str, message: str) -> None:
    break_model(sharded, how)
    with pytest.raises(InputError, match=message) as caught:
        open_source(str(sharded))
    assert "\n" not in caught.value.what
    assert caught.value.hint


def test_an_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="model_type 'nonesuch'"):
        open_source(str(write_model(tmp_path / "m", config={"model_type": "nonesuch"})))


def test_weights_in_eight_bits_are_no_parent(tmp_path: Path) -> None:
    tensors = weights() | {"model.norm.weight": torch.ones(16).to(torch.float8_e4m3fn)}
    with pytest.raises(UnsupportedError, match=r"stores tensor model\.norm\.weight as float8_e4m3fn"):
        open_source(str(write_model(tmp_path / "m", tensors=tensors)))


def test_a_checkpoint_is_no_parent(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is already an atom checkpoint"):
        open_source(str(write_checkpoint(tmp_path / "out")))


def test_what_is_no_model(tmp_path: Path, model: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "weights.pt").write_bytes(b"\x80")
    for name, message in {
        "nowhere": "There is no model at 'nowhere'",
        "./owner/name/": "There is no model at",
        "missing/file.gguf": "There is no model at",
        str(tmp_path / "notes.txt"): "is not a model",
        str(tmp_path / "weights.pt"): "is pickled",
        str(model / "model.safetensors"): "is a single safetensors file.*config.json",
    }.items():
        with pytest.raises(InputError, match=message):
            open_source(name)


def test_a_directory_with_only_a_gguf_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError) as caught:
        open_source(str(tmp_path))
    assert str(tmp_path / "x.gguf") in str(caught.value.hint)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_directory_for_a_plain_user(model: Path) -> None:
    model.chmod(0)
    try:
        with pytest.raises(InputError, match="can't be read: Permission denied"):
            open_source(str(model))
    finally:
        model.chmod(0o755)


def test_an_unreadable_directory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="can't be read: Permission denied"):
        open_source(str(model))


def test_an_unreadable_shard(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(model))

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"model\.safetensors can't be read: Input/output error"):
        source.read("model.norm.weight")


def test_fingerprint_follows_content_and_nothing_else(tmp_path: Path, model: Path) -> None:
    first = open_source(str(model)).fingerprint()
    moved = tmp_path / "elsewhere"
    shutil.copytree(model, moved)
    assert open_source(str(moved)).fingerprint() == first
    shard = moved / "model.safetensors"
    times = shard.stat()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_source(str(moved)).fingerprint() != first
    edit_json(model / "config.json", rope_theta=5e5)
    assert open_source(str(model)).fingerprint() != first


def test_the_second_fingerprint_reads_no_weights(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_source(str(model)).fingerprint()

    def fail(path: Path) -> str:
        raise AssertionError(f"{path} was hashed again")

    monkeypatch.setattr(digests, "sha256_file", fail)
    assert open_source(str(model)).fingerprint() == first


def test_a_cache_that_cant_be_written_costs_only_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_source(str(model)).fingerprint()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATOM_CACHE", str(tmp_path / "file"))
    assert open_source(str(model)).fingerprint() == first


def test_companions(model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": 2}')
    (model / "tokenizer_config.json").write_text("{}")
    (model / "modeling_x.py").write_text("raise SystemExit")
    edit_json(model / "config.json", rope_theta=12345.0)
    open_source(str(model)).save_companions(tmp_path / "new")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
    ]
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["rope_theta"] == 12345.0
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("content", ["{", "[]", "{}", "null"])
def test_a_damaged_tokenizer_is_named(model: Path, content: str) -> None:
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"The tokenizer in .* can't be loaded"):
        open_source(str(model)).tokenizer()


def test_a_tokenizer_that_needs_code_is_refused(model: Path) -> None:
    source = open_source(str(model))
    with pytest.raises(InputError, match="holds no tokenizer"):
        source.tokenizer()
    (model / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.X", null]}}')
    with pytest.raises(InputError, match="which atom never runs"):
        source.tokenizer()


class FakeHub:
    """snapshot_download of a repository made of `files`, that remembers what it was asked for."""

    def __init__(self, root: Path, files: dict[str, bytes]) -> None:
        self.root, self.files = root, files
        self.downloaded: list[str] = []
        self.revisions: list[str | None] = []

    def __call__(self, repository: str, allow_patterns: list[str], revision: str | None, cache_dir: Any) -> str:
        snapshot = self.root / "abc123"
        snapshot.mkdir(exist_ok=True)
        self.revisions.append(revision)
        for name in allow_patterns:
            if name in self.files:
                self.downloaded.append(name)
                (snapshot / name).write_bytes(self.files[name])
        return str(snapshot)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_hub_id_brings_weights_config_and_tokenizer_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    directory = write_model(tmp_path / "m", sharded=layout == "sharded")
    files = {file.name: file.read_bytes() for file in directory.iterdir()}
    extra = {"tokenizer.json": b"{}", "pytorch_model.bin": b"", "modeling.py": b"", "consolidated.safetensors": b""}
    hub = FakeHub(tmp_path, files | extra)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    source = open_source("owner/name")
    assert source.name == "owner/name"
    assert torch.equal(source.read("model.norm.weight"), weights()["model.norm.weight"])
    assert set(hub.downloaded) == files.keys() | {"tokenizer.json"}
    assert hub.revisions == [None, "abc123"]


def test_a_hub_id_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", FakeHub(tmp_path, {"config.json": b"{}"}))
    listing = ["config.json", "pytorch_model.bin"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repository: listing)
    with pytest.raises(InputError, match="owner/name on the Hub has only pickled weights"):
        open_source("owner/name")


def test_weights_that_are_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(self: Any, repository: str) -> list[str]:
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", FakeHub(tmp_path, {"config.json": b"{}"}))
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", offline)
    with pytest.raises(
        InputError, match=r"The weights of owner/name are not in the cache, and the Hub can't be reached"
    ):
        open_source("owner/name")


def test_a_path_that_cant_even_be_looked_at() -> None:
    with pytest.raises(InputError, match="can't be read: File name too long"):
        open_source("x" * 5000)


def test_the_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AtomError, match="'owner/name'") as caught:
        open_source("owner/name", cache=tmp_path)
    assert "\n" not in caught.value.what


def test_no_floating_point_weights(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m")
    save_file({"a": torch.ones(2, dtype=torch.int32)}, directory / "model.safetensors")
    with pytest.raises(InputError, match="holds no floating-point weights"):
        open_source(str(directory))
