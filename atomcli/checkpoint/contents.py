"""What is inside a checkpoint, layer by layer, counted from its manifest."""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomcli.checkpoint.directory import CONFIG, read_json
from atomcli.checkpoint.manifest import JOURNAL, read_manifest, read_report
from atomcli.checkpoint.tensorfile import DTYPES
from atomcli.checkpoint.writer import unfinished
from atomcli.errors import InputError


@dataclass(frozen=True)
class Layer:
    """A quantized linear: scheme, parameters, stored bytes (all its tensors), and the error the report gives."""

    name: str
    scheme: str
    parameters: int
    bytes: int
    error: float | None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters


@dataclass(frozen=True)
class Contents:
    """A checkpoint: its quantized layers, the other tensors, the cache's format and the report of the run."""

    layers: list[Layer]
    kept: dict[str, int]  # tensor name -> bytes
    kv_cache: dict[str, Any]
    report: dict[str, Any]

    @property
    def quantized_bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def quantized_parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def bytes(self) -> int:
        return self.quantized_bytes + sum(self.kept.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter of the quantized layers."""
        return 8 * self.quantized_bytes / max(1, self.quantized_parameters)


def is_checkpoint(path: Path) -> bool:
    """Whether a directory calls itself a checkpoint of atom."""
    return path.is_dir() and _quantization(path).get("quant_method") == "atom"


def read_contents(directory: Path) -> Contents:
    """The contents of a checkpoint from config.json, manifest and report; InputError when it is no checkpoint."""
    refuse_unfinished(directory)
    if not directory.is_dir():
        raise InputError(f"There is no checkpoint at {directory}", "Give the directory that `atom quantize` wrote")
    if not is_checkpoint(directory):
        raise InputError(f"{directory} is no checkpoint of atom", "Make one with `atom quantize`")
    quantization, report = _quantization(directory), read_report(directory)
    linears: dict[str, dict[str, Any]] = quantization["linears"]
    errors = {entry.get("linear"): entry.get("error") for entry in report.get("layers", [])}
    stored: dict[str, int] = defaultdict(int)
    kept: dict[str, int] = {}
    for shard in read_manifest(directory).shards.values():
        for tensor, record in shard.tensors.items():
            size = math.prod(record.shape) * DTYPES[record.dtype].itemsize
            linear = tensor.rpartition(".")[0]
            if linear in linears:
                stored[linear] += size
            else:
                kept[tensor] = size
    layers = [
        Layer(name, entry["scheme"], entry["in_features"] * entry["out_features"], stored[name], errors.get(name))
        for name, entry in sorted(linears.items(), key=lambda item: _natural(item[0]))
    ]
    return Contents(layers, kept, quantization["kv_cache"], report)


def refuse_unfinished(directory: Path) -> None:
    """InputError for a checkpoint that is still being made, by its own name or by the one that it will have."""
    if directory.name and not directory.exists():
        directory = unfinished(directory)
    if (directory / JOURNAL).is_file():
        raise InputError(
            f"{directory} is an unfinished checkpoint", "Type the `atom quantize` command again: it continues"
        )


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 9 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _quantization(directory: Path) -> dict[str, Any]:
    found = read_json(directory / CONFIG, missing_ok=True).get("quantization_config")
    return found if isinstance(found, dict) else {}
