"""Where a parent model comes from: a directory, a Hub id, a GGUF file or the alias `demo`, behind one interface.

A source never holds more than the tensor it is asked for. Pickled weights are refused because unpickling runs
whatever code the file contains; models that bring their own Python are refused for the same reason.
"""

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atomcli.checkpoint.files import unreadable
from atomcli.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

DEMO = "demo"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Source(ABC):
    """A parent model, read one tensor at a time under the names that Hugging Face checkpoints use.

    `name` is what the user typed, `path` the directory or file it resolved to, `dtype` the model's own
    (bfloat16, float16 or float32; bfloat16 for GGUF), in which floating tensors are returned.
    """

    name: str
    path: Path
    config: "PreTrainedConfig"
    dtype: torch.dtype

    @abstractmethod
    def names(self) -> frozenset[str]:
        """All tensor names."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it; InputError when there is no such tensor."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the contents of all files that make up the model; cheap after the first call."""

    @abstractmethod
    def save_companions(self, directory: Path) -> None:
        """Write config.json (without quantization), tokenizer and generation config into a directory."""

    @abstractmethod
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The parent's tokenizer; InputError when it has none."""

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """The tensor as stored."""

    def _read_pinned(self, name: str) -> Tensor:
        """The tensor as stored, in pinned memory where that saves a copy."""
        return self._read(name)

    def read(self, name: str, pinned: bool = False) -> Tensor:
        """One tensor in `dtype` (integer tensors as stored); InputError naming it when it holds NaN or Inf.

        `pinned` memory is what a GPU copies from beside its work.
        """
        tensor = self._checked(self._read_pinned(name) if pinned else self._read(name), name)
        return tensor.pin_memory() if pinned else tensor

    def _checked(self, tensor: Tensor, name: str) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        _check_finite(tensor, name, self.path)
        if tensor.dtype != self.dtype:
            tensor = tensor.to(self.dtype)
            _check_finite(tensor, name, self.path, f" in {str(self.dtype).removeprefix('torch.')}")
        return tensor

    def absent(self, name: str) -> InputError:
        """The error for a tensor that the model doesn't have."""
        return InputError(
            f"{self.path} has no tensor {name}", "The files are incomplete, or config.json belongs to another model."
        )


def open_source(model: str, cache: Path | None = None) -> Source:
    """Open a parent: local directory, GGUF file, alias `demo`, or Hub id (in this order of precedence).

    `cache` replaces the Hub's cache directory for Hub ids. Raises InputError in one sentence when MODEL can't be
    found, is damaged, pickled, already quantized or needs remote code; UnsupportedError for what atom can't read.
    """
    from atomcli.checkpoint import assets, directory, gguf, hub

    path = Path(model).expanduser()
    try:
        is_directory, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise unreadable(path, error) from error
    if is_directory:
        return directory.DirectorySource(path, name=model)
    if is_file:
        return _open_file(path, model)
    if model == DEMO:
        return gguf.GGUFSource(assets.demo_model(), name=model)
    if _HUB_ID.fullmatch(model) and path.suffix not in {".gguf", ".safetensors"}:
        return directory.DirectorySource(hub.fetch(model, cache), name=model)
    raise InputError(
        f"There is no model at {model!r}: MODEL is a directory, a GGUF file, a Hub id (owner/name) or {DEMO!r}",
        "Check the path, or try `atom quantize demo`.",
    )


def _open_file(path: Path, model: str) -> Source:
    from atomcli.checkpoint import directory, gguf

    if path.suffix == ".gguf":
        return gguf.GGUFSource(path, name=model)
    if path.suffix == ".safetensors":
        raise InputError(
            f"{path} is a single safetensors file, which has no config.json",
            f"Pass the directory that holds it: {path.parent}",
        )
    if path.suffix in directory.PICKLED:
        raise directory.refuse_pickled(path)
    raise InputError(f"{path} is not a model: expected a directory or a .gguf file", "Check the path.")


def _check_finite(tensor: Tensor, name: str, path: Path, where: str = "") -> None:
    if not tensor.numel():
        return
    # aminmax carries NaN and Inf through without a mask as large as the tensor.
    if all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor)):
        return
    count = int((~torch.isfinite(tensor)).sum())
    raise InputError(
        f"Tensor {name} in {path} holds {count} NaN or Inf of {tensor.numel()} values{where}",
        "The weights are damaged or overflowed when they were saved; get the model again.",
    )
