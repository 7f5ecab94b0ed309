"""A model walked block by block: what the stages share about it."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from atomcli.models.block import Family
from atomcli.models.registry import describe
from atomcli.models.tensors import account, block_name, block_shapes, block_tensors
from atomcli.pipeline.stream import chunk_sequences
from atomcli.runtime.decoder import block_arguments, empty_model
from atomcli.runtime.device import choose_device

if TYPE_CHECKING:
    from atomcli.checkpoint.source import Source


# Bytes of a tensor that costs next to nothing to read.
_SMALL = 1 << 17
# Tensors that are read at once, so that a block is there before two GPUs are done with the last one. A CPU has other
# work for its cores.
_READERS = {"cpu": 1, "cuda": 4}


@dataclass(frozen=True)
class Walk:
    """A source, its family, and the device its blocks are brought to one after the other."""

    source: Source
    family: Family
    frame: PreTrainedModel
    device: torch.device

    @property
    def config(self) -> PreTrainedConfig:
        """The parent's config."""
        return self.source.config

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return int(self.config.num_hidden_layers)

    def read(self, index: int) -> dict[str, Tensor]:
        """The tensors of one block on the device, by their names in the block."""
        return self.place(self.load(index))

    def load(self, index: int) -> dict[str, Tensor]:
        """The tensors of one block in the host's memory, by their names in the block; pinned where a GPU takes them."""
        names = self._names(index)
        with ThreadPoolExecutor(_READERS.get(self.device.type, 1), "atom") as pool:
            return dict(zip(names, pool.map(self._fetch, names.values()), strict=True))

    def _fetch(self, disk: str) -> Tensor:
        # Into pages that torch keeps from block to block, which are filled three times as fast as fresh ones (x86).
        return self.source.read(disk, pinned=self.device.type == "cuda")

    def place(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the host on the device; `tensors` is emptied, so that none is held twice."""
        # The copy is aligned as torch aligns: products may differ in the last bit by where their operands lie.
        return {name: tensors.pop(name).to(self.device, copy=True, non_blocking=True) for name in list(tensors)}

    def check_small_tensors(self) -> None:
        """Read the norms, biases and routers of all blocks; InputError naming one that holds NaN or Inf.

        They are a thousandth of a model, and a damaged model mostly shows it there, before anything is spent.
        """
        for index in range(self.blocks):
            for disk in self._names(index).values():
                if math.prod(self.source.shape(disk)) * self.source.dtype.itemsize <= _SMALL:
                    self.source.read(disk)

    def _names(self, index: int) -> dict[str, str]:
        return block_tensors(self.family, self.config, index)

    def forward(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Block `index` on hidden (sequences, tokens, hidden); the result stays on the device."""
        hidden = hidden.to(self.device)
        output = block(hidden, **block_arguments(self.frame, self.family, index, hidden))
        return output[0] if isinstance(output, tuple) else output

    def in_features(self, index: int, linear: str) -> int:
        """Input channels of a linear, named relative to its block."""
        return block_shapes(self.family, self.config, index)[f"{linear}.weight"][1]

    def sequences_at_once(self, tokens: int) -> int:
        """How many sequences of `tokens` go through a block at a time; depends on model and device only."""
        shapes = block_shapes(self.family, self.config, 0).values()
        return chunk_sequences(tokens, max(max(shape) for shape in shapes), self.device)


def start_walk(source: Source, device: torch.device | str | None = None) -> Walk:
    """Begin a walk: the architecture is known and every tensor of the source is accounted for, or an error says why.

    `device` None takes a GPU where there is one. Raises UsageError, UnsupportedError and InputError.
    """
    target = choose_device(device)
    family = describe(source.config)
    account(family, source.config, source.names(), source.shape)
    frame = empty_model(family, source.config)
    frame.model.rotary_emb.to(target)
    return Walk(source, family, frame, target)


def full_name(index: int, linear: str) -> str:
    """A linear's name in the model, from its name in block `index`."""
    return f"{block_name(index)}.{linear}"
