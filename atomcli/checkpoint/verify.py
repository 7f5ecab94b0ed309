"""Reading a finished checkpoint back, and proving that it is what was written."""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atomcli.checkpoint.digests import HASHING, sha256_file
from atomcli.checkpoint.directory import CONFIG, INDEX, MODEL_DTYPES, load_config_json, parse_config
from atomcli.checkpoint.files import is_file_name, one_line, read_json
from atomcli.checkpoint.manifest import JOURNAL, Manifest, ShardRecord, read_manifest, read_report
from atomcli.checkpoint.tensorfile import DTYPE_NAMES, TensorFile
from atomcli.errors import AtomError, InputError, UnsupportedError
from atomcli.formats.scheme import KVFormat, Scheme
from atomcli.formats.weights import tensor_layout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger("atomcli")

FORMAT_VERSION = 1
_AGAIN = "Copy the checkpoint again, or make it again with `atom quantize`."
# What a linear may hold beside its weight: how its input is ordered, and its bias.
_PERMUTATION = (torch.int16, torch.int32)


class Checkpoint:
    """A finished checkpoint, its tensors read one at a time.

    `config` is the transformers config, `quantization` the quantization_config as plain data, `report` what
    atom_report.json holds, `shards` the bytes of each shard file. Raises InputError when something is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.name.endswith(".unfinished") or (path / JOURNAL).exists():
            raise InputError(
                f"{path} is an unfinished checkpoint", "Type the `atom quantize` command again; it continues."
            )
        raw = load_config_json(path)
        self.quantization: dict[str, Any] = _quantization(path, raw)
        self.config: PreTrainedConfig = parse_config(path, raw)
        self.report: dict[str, Any] = read_report(path)
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(is_file_name(file) for file in weight_map.values()):
            raise InputError(f"{path / INDEX} has no weight_map of tensor to a file beside it", _AGAIN)
        self._files: dict[str, TensorFile] = {}
        for file in sorted(set(weight_map.values())):
            if not (path / file).is_file():
                raise InputError(f"Shard {path / file} is missing", _AGAIN)
            self._files[file] = TensorFile(path / file)
        for name, file in weight_map.items():
            if name not in self._files[file].entries:
                raise InputError(f"{path / INDEX} names tensor {name}, which {file} doesn't hold", _AGAIN)
        self._where: dict[str, TensorFile] = {name: self._files[file] for name, file in weight_map.items()}
        self.shards: dict[str, int] = {file: opened.size for file, opened in self._files.items()}

    def names(self) -> frozenset[str]:
        """All tensor names."""
        return frozenset(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._file(name).entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a tensor, without reading it."""
        return self._file(name).entries[name].dtype

    def read(self, name: str) -> Tensor:
        """One tensor as stored."""
        return self._file(name).read(name)

    def nbytes(self, name: str) -> int:
        """The bytes of a tensor on disk, without reading it."""
        entry = self._file(name).entries[name]
        return entry.end - entry.start

    def linear_names(self, linear: str) -> dict[str, str]:
        """Suffix -> tensor name for every tensor of one linear ("model.layers.0.self_attn.q_proj")."""
        prefix = linear + "."
        return {name.removeprefix(prefix): name for name in self._where if name.startswith(prefix)}

    def linear_tensors(self, linear: str) -> dict[str, Tensor]:
        """Suffix -> tensor of one linear, read: weight, scales, outliers, permutation, signs, bias."""
        return {suffix: self.read(name) for suffix, name in self.linear_names(linear).items()}

    def _file(self, name: str) -> TensorFile:
        if name not in self._where:
            raise InputError(f"{self.path} has no tensor {name}", _AGAIN)
        return self._where[name]


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint for reading; InputError when it isn't a finished one or a file is missing or truncated."""
    return Checkpoint(Path(path))


def verify_checkpoint(path: Path | str) -> Manifest:
    """Re-read a directory and check every file, shard and tensor against the manifest and the configuration.

    Works on a directory that hasn't been published yet, too. Raises InputError naming the first file or tensor that
    isn't what was written: missing, truncated, swapped, altered, or not what its scheme says.
    """
    path = Path(path)
    manifest = verify_files(path)
    tensors = {name: record for shard in manifest.shards.values() for name, record in shard.tensors.items()}
    found = {name: (record.dtype, record.shape) for name, record in tensors.items()}
    _verify_linears(path, _quantization(path, load_config_json(path)), found)
    return manifest


def verify_files(path: Path) -> Manifest:
    """Re-read a directory and check every file, shard and tensor against the manifest, whatever they mean."""
    manifest = read_manifest(path)
    for name, file in sorted(manifest.files.items()):
        if not (path / name).is_file():
            raise InputError(f"{path / name} is missing", _AGAIN)
        if sha256_file(path / name) != file.sha256:
            raise InputError(f"{path / name} is not the file that was written: its SHA-256 differs", _AGAIN)
    with ThreadPoolExecutor(HASHING) as pool:
        shards = list(manifest.shards.values())
        tensors = [pool.submit(_verify_tensors, path, shard, manifest) for shard in shards]
        files = [pool.submit(_verify_file, path / shard.file, shard.sha256) for shard in shards]
        for checked in (*tensors, *files):
            checked.result()
    return manifest


def _verify_tensors(path: Path, shard: ShardRecord, manifest: Manifest) -> None:
    file = path / shard.file
    if not file.is_file():
        raise InputError(f"Shard {file} is missing", _AGAIN)
    opened = TensorFile(file)
    if opened.entries.keys() != shard.tensors.keys():
        for other in manifest.shards.values():
            if opened.entries.keys() == other.tensors.keys():
                raise InputError(f"{file} holds the tensors of {other.file}: the shards were swapped", _AGAIN)
        odd = sorted(opened.entries.keys() ^ shard.tensors.keys())[0]
        verb = "lacks" if odd in shard.tensors else "holds the unknown"
        raise InputError(f"{file} {verb} tensor {odd}", _AGAIN)
    for name, record in shard.tensors.items():
        entry = opened.entries[name]
        if (DTYPE_NAMES[entry.dtype], entry.shape) != (record.dtype, record.shape):
            raise InputError(
                f"Tensor {name} in {file} is {DTYPE_NAMES[entry.dtype]} {list(entry.shape)}, "
                f"but {record.dtype} {list(record.shape)} was written",
                _AGAIN,
            )
        if opened.digest(name) != record.sha256:
            raise InputError(f"Tensor {name} in {file} is damaged: its SHA-256 differs from what was written", _AGAIN)


def _verify_file(file: Path, sha256: str) -> None:
    # Said only where all tensors are right: what is left is the header.
    if file.is_file() and sha256_file(file) != sha256:
        raise InputError(f"The header of {file} is damaged: the file's SHA-256 differs from what was written", _AGAIN)


def _verify_linears(path: Path, quantization: dict[str, Any], found: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Every linear of the configuration has exactly the tensors that its scheme needs, in its shapes."""
    for linear, (spec, scheme, rows, columns) in _parsed(path, quantization).items():
        weight = found.get(f"{linear}.weight")
        for tensor in tensor_layout(scheme, rows, columns):
            name = f"{linear}.{tensor.suffix}"
            # An unquantized weight stays in the parent's dtype, whichever that is.
            dtype = weight[0] if weight and tensor.suffix == "weight" else DTYPE_NAMES[tensor.dtype]
            if found.get(name) != (dtype, tensor.shape):
                state = "is missing" if name not in found else f"is {found[name][0]} {list(found[name][1])}"
                raise InputError(
                    f"Tensor {name} {state}; scheme {spec['scheme']} needs {dtype} {list(tensor.shape)}", _AGAIN
                )
        for suffix, dtypes, size in (
            ("permutation", _PERMUTATION, columns),
            ("signs", (torch.int8,), columns),
            ("bias", MODEL_DTYPES, rows),
        ):
            name = f"{linear}.{suffix}"
            if bool(spec.get(suffix, False)) != (name in found):
                state, said = ("is there", "lacks") if name in found else ("is missing", "names")
                raise InputError(f"Tensor {name} {state}, but its entry in quantization_config {said} it", _AGAIN)
            allowed = [DTYPE_NAMES[dtype] for dtype in dtypes]
            if name in found and (found[name][0] not in allowed or found[name][1] != (size,)):
                is_now = f"{found[name][0]} {list(found[name][1])}"
                raise InputError(f"Tensor {name} is {is_now}; needed is {' or '.join(allowed)} [{size}]", _AGAIN)


def _parsed(path: Path, quantization: dict[str, Any]) -> dict[str, tuple[dict[str, Any], Scheme, int, int]]:
    """Every linear's entry with its scheme, rows and columns; InputError when the configuration can't be read."""
    parsed = {}
    try:
        schemes = {name: Scheme.from_dict(scheme) for name, scheme in quantization["schemes"].items()}
        for linear, spec in quantization["linears"].items():
            name = spec["scheme"]
            if name not in schemes:
                raise ValueError(f"it gives {linear} the scheme {name!r}, which it doesn't define")
            rows, columns = int(spec["out_features"]), int(spec["in_features"])
            schemes[name].body(columns)  # raises when the outliers leave no body
            parsed[linear] = (spec, schemes[name], rows, columns)
        for kv in (quantization["kv_cache"], *quantization.get("kv_cache_blocks", {}).values()):
            KVFormat(**kv)
    except (KeyError, TypeError, ValueError, AttributeError, AtomError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
        raise InputError(f"quantization_config in {path / CONFIG} can't be read: {why}", _AGAIN) from error
    return parsed


def _quantization(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The quantization_config of an atom checkpoint, checked for method, version and the parts every reader needs."""
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "atom" or not isinstance(quantization, dict):
        what = f"quantized by {method}" if method else "not quantized"
        raise InputError(f"{path} is not an atom checkpoint: it is {what}", "Make one with `atom quantize`.")
    if quantization.get("version") != FORMAT_VERSION:
        raise UnsupportedError(
            f"{path} is an atom checkpoint of version {quantization.get('version')!r}, "
            f"and this atom reads version {FORMAT_VERSION}",
            "Update atomcli.",
        )
    for key in ("schemes", "linears", "kv_cache", "kept"):
        if key not in quantization:
            raise InputError(f"quantization_config in {path / CONFIG} has no {key}", _AGAIN)
    return quantization
