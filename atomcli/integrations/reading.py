"""A checkpoint read for export: its linears, block by block, under the names that every reader of the family knows."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atomcli.checkpoint.verify import Checkpoint, read_checkpoint
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import Scheme
from atomcli.formats.weights import QuantizedWeight
from atomcli.models.block import Family
from atomcli.models.registry import describe
from atomcli.models.tensors import block_name, block_tensors, outer_tensors
from atomcli.runtime.decoder import empty_block, quantize_linear
from atomcli.runtime.linear import QuantLinear, input_layout, scheme_of
from atomcli.runtime.saved import Plan


@dataclass(frozen=True)
class Linear:
    """A quantized linear of block `index`: its name in the block, on disk, its scheme and shape (N, K)."""

    index: int
    name: str
    disk: str
    scheme: Scheme
    shape: tuple[int, int]
    permuted: bool

    @property
    def full(self) -> str:
        """Its name in the checkpoint."""
        return f"{block_name(self.index)}.{self.name}"


class Reading:
    """An open checkpoint with what its config says about it."""

    def __init__(self, path: Path) -> None:
        self.checkpoint: Checkpoint = read_checkpoint(path)
        self.config = self.checkpoint.config
        self.family: Family = describe(self.config)
        self.plan = Plan.from_dict(self.checkpoint.quantization)
        self.linears = list(self._linears())

    @property
    def dtype(self) -> torch.dtype:
        """The model's own dtype."""
        return self.config.dtype

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return int(self.config.num_hidden_layers)

    def _linears(self) -> Iterator[Linear]:
        for index in range(self.blocks):
            disk = block_tensors(self.family, self.config, index)
            for name in self.family.linears(self.config, index):
                entry = self.plan.linears.get(f"{block_name(index)}.{name}")
                if entry is not None:
                    shape = int(entry["out_features"]), int(entry["in_features"])
                    scheme, weight = scheme_of(entry, self.plan.schemes), disk[f"{name}.weight"]
                    permuted = bool(entry.get("permutation", False))
                    yield Linear(index, name, weight.removesuffix(".weight"), scheme, shape, permuted)

    def of_block(self, index: int) -> list[Linear]:
        """The quantized linears of a block."""
        return [linear for linear in self.linears if linear.index == index]

    def read(self, linear: Linear) -> tuple[QuantizedWeight, InputLayout, Tensor | None]:
        """The weight of a linear, the layout of its input, and its bias."""
        tensors = self.checkpoint.linear_tensors(linear.full)
        weight = QuantizedWeight.from_tensors(linear.scheme, linear.shape, tensors)
        layout = input_layout(linear.scheme, linear.shape[1], tensors.get("permutation"), tensors.get("signs"))
        return weight, layout, tensors.get("bias")

    def others(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block that belong to no quantized linear (norms, router, kept linears), by name in it."""
        quantized = {linear.name for linear in self.of_block(index)}
        return {
            name: self.checkpoint.read(f"{block_name(index)}.{name}")
            for name in block_tensors(self.family, self.config, index)
            if name.rpartition(".")[0] not in quantized
        }

    def disk_names(self, index: int) -> dict[str, str]:
        """Disk name of every tensor of a block by its name in it; that of an unquantized model."""
        return block_tensors(self.family, self.config, index)

    def tensor(self, disk: str) -> Tensor:
        """A tensor that belongs to no quantized weight (a norm, a bias, the embedding), by its name on disk."""
        return self.checkpoint.read(self._in_checkpoint(disk))

    def shape(self, disk: str) -> tuple[int, ...]:
        """The shape of such a tensor, without reading it."""
        return self.checkpoint.shape(self._in_checkpoint(disk))

    def _in_checkpoint(self, disk: str) -> str:
        matched = re.match(r"model\.layers\.(\d+)\.", disk)
        if matched is None:
            return disk
        index = int(matched[1])
        name = next(name for name, other in self.disk_names(index).items() if other == disk)
        return f"{block_name(index)}.{name}"

    def outer(self) -> dict[str, Tensor]:
        """The tensors outside the blocks."""
        return {name: self.checkpoint.read(name) for name in outer_tensors(self.family, self.config)}

    def kept(self) -> list[str]:
        """Disk names of the linears that are in 16 bits in the checkpoint."""
        quantized = {linear.full for linear in self.linears}
        names = []
        for index in range(self.blocks):
            disk = self.disk_names(index)
            for name in self.family.linears(self.config, index):
                if f"{block_name(index)}.{name}" not in quantized:
                    names.append(disk[f"{name}.weight"].removesuffix(".weight"))
        return names

    def block(self, index: int) -> nn.Module:
        """Block `index` as the run road has it."""
        return self.rebuilt(index, {linear.name: self._module(linear) for linear in self.of_block(index)}, self.plan)

    def rebuilt(self, index: int, linears: dict[str, nn.Module], plan: Plan | None = None) -> nn.Module:
        """Block `index` around these linears in place of its quantized ones; without a plan the cache is in 16 bits."""
        block = empty_block(self.family, self.config, index, *([] if plan is None else [plan.cache_of(index)]))
        for name, module in linears.items():
            block.set_submodule(name, module)
        own = {f"{name}.{suffix}" for name, module in linears.items() for suffix in module.state_dict()}
        others = self.others(index)
        if "self_attn.key_center" in block.state_dict():
            others["self_attn.key_center"] = self.checkpoint.read(f"{block_name(index)}.self_attn.key_center")
        missing = block.load_state_dict(others, strict=False, assign=True).missing_keys
        assert set(missing) <= own, f"a block lacks {sorted(set(missing) - own)}"
        for name, module in linears.items():
            if isinstance(module, QuantLinear):
                quantize_linear(block, name, module)  # the linears of a site quantize their input together
        return block.requires_grad_(False)

    def _module(self, linear: Linear) -> QuantLinear:
        return QuantLinear.from_weight(*self.read(linear))

    def ranges(self) -> dict[str, float]:
        """The largest input that calibration saw, by the linear's name in the checkpoint; from its report."""
        rows: list[dict[str, Any]] = self.checkpoint.report.get("layers", [])
        return {row["linear"]: float(row["input_absmax"]) for row in rows if "input_absmax" in row}
