"""What a checkpoint says about itself: the quantization plan in its config, and the tensors in its files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from atomcli.errors import AtomError, InputError
from atomcli.formats.scheme import KVFormat, Scheme
from atomcli.runtime.linear import QuantLinear, scheme_of

VERSION = 1
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class Plan:
    """quantization_config of a checkpoint: schemes by name, one entry per quantized linear, the KV cache's format.

    `kv_blocks` has the cache's format of the blocks where it is another.
    """

    schemes: Mapping[str, Scheme]
    linears: Mapping[str, Mapping[str, Any]]
    kv_cache: KVFormat
    kv_blocks: Mapping[int, KVFormat] = field(default_factory=dict)

    def cache_of(self, index: int) -> KVFormat:
        """The cache's format in block `index`."""
        return self.kv_blocks.get(index, self.kv_cache)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """The plan that config.json holds; InputError when this version of atom can't read it."""
        if data.get("version") != VERSION:
            raise InputError(
                f"The checkpoint is of format version {data.get('version')}; this atom reads version {VERSION}",
                "Use the version of atom that wrote it, or compress the model again.",
            )
        try:
            schemes = {name: Scheme.from_dict(scheme) for name, scheme in data["schemes"].items()}
            linears = {name: dict(entry) for name, entry in data["linears"].items()}
            for name, entry in linears.items():
                if entry["scheme"] not in schemes:
                    raise ValueError(f"it gives {name} the scheme {entry['scheme']!r}, which it lacks")
                int(entry["out_features"])
                scheme_of(entry, schemes).body(int(entry["in_features"]))  # raises when the outliers leave no body
            blocks = {int(index): KVFormat(**kv) for index, kv in data.get("kv_cache_blocks", {}).items()}
            return cls(schemes, linears, KVFormat(**data["kv_cache"]), blocks)
        except (KeyError, TypeError, ValueError, AttributeError, AtomError) as error:
            why = str(error) if isinstance(error, ValueError | AtomError) else repr(error)
            raise InputError(
                f"quantization_config in config.json can't be read: {why}", "config.json was edited or is damaged."
            ) from error

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Plan":
        """The plan of a checkpoint's config; InputError for a model that atom didn't compress."""
        data = getattr(config, "quantization_config", None)
        if data is not None and not isinstance(data, Mapping):
            data = data.to_dict()
        if data is None or data.get("quant_method") != "atom":
            raise InputError(
                "The model is not an atom checkpoint: config.json has no quantization_config of quant_method atom",
                "Compress it with `atom quantize`.",
            )
        return cls.from_dict(data)


def read_config(directory: Path) -> PreTrainedConfig:
    """The config of a checkpoint directory; InputError when there is none or it can't be read."""
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} holds no config.json", "Pass the directory that `atom quantize` wrote.")
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{directory / 'config.json'} can't be read: {error}", "The file is damaged.") from error


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, by its index if it has one; InputError if one is missing."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted({Path(name).as_posix() for name in json.loads(index.read_text())["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{index} can't be read: {error!r}", "The file is damaged.") from error
    else:
        names = ["model.safetensors"]
    for name in names:
        if Path(name).name != name or len(name) > 255 or not (directory / name).is_file():
            raise InputError(f"{directory} lacks the file {name}", "The checkpoint is incomplete.")
    return [directory / name for name in names]


def read_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """Every tensor of the files."""
    tensors = {}
    for file in files:
        with _open(file) as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return tensors


def check_tensors(model: PreTrainedModel, files: Sequence[Path | str]) -> None:
    """Compare the tensors of a checkpoint with those of the model it is to be loaded into, by their headers alone.

    Raises InputError naming a tensor that is missing, left over, misshapen or of the wrong dtype.
    """
    expected = dict(model.state_dict())
    tied = getattr(model, "all_tied_weights_keys", {}) if model.config.tie_word_embeddings else {}
    exact = set(_exact_tensors(model))
    found = {}
    for name, shape, dtype in _headers([Path(file) for file in files]):
        found[name] = shape
        if name not in expected:
            raise InputError(
                f"The checkpoint holds the tensor {name}, for which the model has no place",
                "config.json and the tensors belong to different checkpoints.",
            )
        wanted = expected[name]
        fits = dtype == wanted.dtype if name in exact else dtype.is_floating_point
        if shape != tuple(wanted.shape) or not fits:
            raise InputError(
                f"Tensor {name} is {dtype} {list(shape)}; the config says {wanted.dtype} {list(wanted.shape)}",
                "config.json and the tensors belong to different checkpoints.",
            )
    missing = sorted(expected.keys() - found.keys() - set(tied))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"The checkpoint lacks {', '.join(missing[:3])}{more}", "The checkpoint is incomplete.")


def _exact_tensors(model: nn.Module) -> Iterator[str]:
    """Tensors whose dtype is part of the format; the others are in the dtype the model is loaded in."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield from (f"{name}.{suffix}" for suffix, _ in module.named_buffers() if suffix not in ("weight", "bias"))


def _headers(files: Sequence[Path]) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    for file in files:
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                view = opened.get_slice(name)
                dtype = _DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise InputError(f"Tensor {name} in {file} is of dtype {view.get_dtype()}, which atom never writes")
                yield name, tuple(view.get_shape()), dtype


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} can't be read: {error}", "The file is damaged or incomplete.") from error
