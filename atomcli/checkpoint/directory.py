"""A Hugging Face model directory as a source: config.json and one or more safetensors files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atomcli.checkpoint.digests import combined_digest
from atomcli.checkpoint.files import copy_file, is_file_name, one_line, read_json, unreadable, write_json
from atomcli.checkpoint.source import Source
from atomcli.checkpoint.tensorfile import TensorFile
from atomcli.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json")
_MOST_BLOCKS = 100_000
MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class DirectorySource(Source):
    """A directory with config.json and safetensors in bf16, fp16 or fp32, single or sharded by an index.

    Everything that can be known without reading a tensor is checked when the source is opened.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or str(path)
        self._raw_config = load_config_json(path)
        refuse_quantized(path, self._raw_config)
        self.config = parse_config(path, self._raw_config)
        self._shards = _open_shards(path)
        self._where = {tensor: shard for shard in self._shards.values() for tensor in shard.entries}
        self.dtype = self._model_dtype()

    def names(self) -> frozenset[str]:
        return frozenset(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shard_of(name).entries[name].shape

    def _read(self, name: str) -> Tensor:
        return self._shard_of(name).read(name)

    def _read_pinned(self, name: str) -> Tensor:
        return self._shard_of(name).read(name, pinned=True)

    def _shard_of(self, name: str) -> TensorFile:
        if name not in self._where:
            raise self.absent(name)
        return self._where[name]

    def _model_dtype(self) -> torch.dtype:
        """What config.json says, else what most of the weights are stored in."""
        elements: dict[torch.dtype, int] = {}
        for name, shard in self._where.items():
            entry = shard.entries[name]
            if entry.dtype.is_floating_point:
                if entry.dtype not in MODEL_DTYPES:
                    raise UnsupportedError(
                        f"{shard.path} stores tensor {name} as {str(entry.dtype).removeprefix('torch.')}; "
                        "a parent must be in bfloat16, float16 or float32",
                        "Get the unquantized model.",
                    )
                elements[entry.dtype] = elements.get(entry.dtype, 0) + (entry.end - entry.start)
        declared = getattr(self.config, "dtype", None)
        if declared in MODEL_DTYPES:
            return declared
        if not elements:
            raise InputError(f"{self.path} holds no floating-point weights", "Check that the directory is a model.")
        return max(elements, key=lambda dtype: elements[dtype])

    def fingerprint(self) -> str:
        files = {file: self.path / file for file in (CONFIG, *self._shards)}
        files |= {file: self.path / file for file in COMPANIONS if (self.path / file).is_file()}
        return combined_digest(files)

    def save_companions(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        config = dict(self._raw_config)
        config.setdefault("dtype", str(self.dtype).removeprefix("torch."))
        write_json(directory / CONFIG, config)
        for file in COMPANIONS:
            if (self.path / file).is_file():
                copy_file(self.path / file, directory / file)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(self.path)


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a directory, without running code from it; InputError when there is none."""
    from transformers import AutoTokenizer

    if not any((path / file).is_file() for file in TOKENIZER_FILES):
        raise InputError(
            f"{path} holds no tokenizer", "Copy tokenizer.json and tokenizer_config.json beside the weights."
        )
    if "auto_map" in read_json(path / "tokenizer_config.json", missing_ok=True):
        raise InputError(
            f"{path / 'tokenizer_config.json'} asks for code from its repository (auto_map), which atom never runs",
            "Use a tokenizer that transformers supports natively.",
        )
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    # Damaged files make transformers stumble anywhere, and the tokenizers library raises Exception itself.
    except Exception as error:
        raise InputError(
            f"The tokenizer in {path} can't be loaded: {one_line(error)}", "Copy the tokenizer files again."
        ) from error


def load_config_json(path: Path) -> dict[str, Any]:
    """config.json as a dict; InputError when it is absent, damaged or asks for remote code."""
    try:
        listing = sorted(file.name for file in path.iterdir())
    except OSError as error:
        raise unreadable(path, error) from error
    if CONFIG not in listing:
        gguf = [file for file in listing if file.endswith(".gguf")]
        hint = f"Pass the file itself: {path / gguf[0]}" if gguf else "Pass the directory that holds the model."
        raise InputError(f"{path} holds no {CONFIG}", hint)
    config = read_json(path / CONFIG)
    if "auto_map" in config:
        raise InputError(
            f"{path / CONFIG} asks for code from the model's repository (auto_map), which atom never runs",
            "If transformers knows this model_type natively, remove auto_map from config.json.",
        )
    return config


def refuse_quantized(path: Path, config: dict[str, Any]) -> None:
    """InputError when the directory holds a quantized model, which can't be a parent."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
    if method == "atom":
        raise InputError(f"{path} is already an atom checkpoint", f"Look into it with `atom inspect {path}`.")
    raise InputError(
        f"{path} is already quantized ({method}); atom compresses bf16, fp16 or fp32 weights",
        "Get the unquantized model.",
    )


def parse_config(path: Path, raw: dict[str, Any]) -> "PreTrainedConfig":
    """The transformers config of a directory; UnsupportedError when transformers doesn't know the model type."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{path / CONFIG} has no model_type", "Copy config.json again.")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"{path / CONFIG} says model_type {model_type!r}, which this transformers doesn't know",
            "Update transformers within 5.17 to 6, or choose another model.",
        )
    blocks = raw.get("num_hidden_layers")
    if isinstance(blocks, int) and blocks > _MOST_BLOCKS:  # transformers makes a list of their kinds
        raise InputError(f"{path / CONFIG} says num_hidden_layers {blocks}", "Copy config.json again")
    try:
        config = CONFIG_MAPPING[model_type].from_dict(raw)
    except (StrictDataclassError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"{path / CONFIG} is not a valid {model_type} config: {one_line(error)}", "Copy config.json again."
        ) from error
    config._name_or_path = str(path)
    return config


def _open_shards(path: Path) -> dict[str, TensorFile]:
    """The safetensors files by name, checked against the index where there is one."""
    if (path / INDEX).is_file():
        return _open_indexed(path)
    if (path / SINGLE).is_file():
        return {SINGLE: TensorFile(path / SINGLE)}
    found = sorted(file.name for file in path.iterdir())
    if stray := [name for name in found if name.endswith(".safetensors")]:
        raise InputError(
            f"{path} holds {stray[0]} but neither {SINGLE} nor {INDEX}", "Copy the index of the shards beside them."
        )
    for name in found:
        if name.endswith(PICKLED):
            raise refuse_pickled(path / name)
    raise InputError(f"{path} holds no safetensors weights", "Pass the directory that holds the model's weights.")


def _open_indexed(path: Path) -> dict[str, TensorFile]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{path / INDEX} has no weight_map of tensor to file", "Copy the index again.")
    shards: dict[str, TensorFile] = {}
    for file in sorted(set(weight_map.values())):
        # A shard lies beside its index; a path that leads elsewhere is not a name.
        if not is_file_name(file):
            raise InputError(f"{path / INDEX} names {file!r}, which is not a file beside it", "Copy the index again.")
        if not (path / file).is_file():
            tensors = sum(value == file for value in weight_map.values())
            raise InputError(
                f"Shard {path / file} is missing; the index places {tensors} tensors in it",
                "Copy or download the shard.",
            )
        shards[file] = TensorFile(path / file)
    for tensor, file in weight_map.items():
        if tensor not in shards[file].entries:
            raise InputError(
                f"{path / INDEX} names tensor {tensor}, which {file} doesn't hold",
                "Index and shards are of different models or versions; copy both again.",
            )
    for file, shard in shards.items():
        for tensor in shard.entries:
            if weight_map.get(tensor) != file:
                place = weight_map.get(tensor, "no file")
                raise InputError(
                    f"{path / file} holds tensor {tensor}, which the index places in {place}",
                    "Index and shards are of different models or versions; copy both again.",
                )
    return shards


def refuse_pickled(path: Path) -> InputError:
    """The error for weights that only unpickling could read."""
    return InputError(
        f"{path} is pickled, and reading a pickle runs whatever code is in it; atom reads safetensors and GGUF only",
        "Convert it where you trust it: `AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)`.",
    )
