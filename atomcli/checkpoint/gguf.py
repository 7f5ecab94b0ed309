"""A GGUF file as a source: Hugging Face names, one tensor dequantized at a time, in bfloat16.

The `gguf` package parses the metadata and knows the quantized formats; the bytes of a tensor are read when it is
asked for and dequantized a few rows at a time, so that no fp32 copy of an embedding is ever held. llama.cpp stores
the rows of Llama's q and k interleaved for its own rotary embedding; that is undone here.
"""

import json
import logging
import math
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from atomcli.checkpoint.digests import combined_digest
from atomcli.checkpoint.directory import COMPANIONS, CONFIG, load_tokenizer
from atomcli.checkpoint.files import copy_file, one_line, unreadable, write_json
from atomcli.checkpoint.gguf_config import build_config
from atomcli.checkpoint.gguf_names import ROPE_FACTORS, Placed, place_tensors
from atomcli.checkpoint.source import Source
from atomcli.checkpoint.tensorfile import read_range
from atomcli.errors import InputError, UnsupportedError
from atomcli.resources import cache_directory

if TYPE_CHECKING:
    from gguf import ReaderTensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger("atomcli")

# Rows are dequantized in pieces of about this many elements (fp32: 64 MB).
_PIECE = 1 << 24

# Files of one model: NAME-00001-of-00003.gguf, NAME-00002-of-00003.gguf, ...
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GGUFSource(Source):
    """A GGUF file (or its parts `-00001-of-000NN.gguf`) of Llama, Mistral, Mixtral, Qwen2, Qwen3 or Qwen3-MoE.

    `dtype` is bfloat16 whatever the file stores. Raises InputError for a damaged file and UnsupportedError for an
    architecture, tensor or format that can't be read.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or str(path)
        self.dtype = torch.bfloat16
        self._files = _parts(path)
        self._tensors: dict[str, tuple[Path, ReaderTensor]] = {}
        metadata: dict[str, Any] = {}
        for file in self._files:
            found, stored = _open(file)
            metadata |= found
            self._tensors |= {tensor.name: (file, tensor) for tensor in stored}
        self._metadata = metadata
        self.config = config = self._build_config()
        experts = int(getattr(config, "num_local_experts", 0) or getattr(config, "num_experts", 0) or 0)
        self._placed = place_tensors(
            self._tensors, config.model_type, config.num_attention_heads, config.num_key_value_heads, experts
        )
        for placed in self._placed.values():
            self._check_shape(placed, experts)

    def _build_config(self) -> "PreTrainedConfig":
        from huggingface_hub.errors import StrictDataclassError

        try:
            return build_config(self._metadata, self._tensors, self._rotary_factors, str(self.path), self._vocabulary())
        except (StrictDataclassError, TypeError, ValueError, KeyError, ZeroDivisionError, OverflowError) as error:
            raise InputError(
                f"The metadata of {self.path} describes no model: {one_line(error)}", "Download the file again."
            ) from error

    def _check_shape(self, placed: Placed, experts: int) -> None:
        """What the metadata says about heads and experts must divide the tensors as it claims."""
        file, stored = self._tensors[placed.tensor]
        shape = [int(size) for size in reversed(stored.shape)]
        heads_fit = not placed.heads or shape[0] % (2 * placed.heads) == 0
        experts_fit = placed.expert is None or (len(shape) > 1 and shape[0] == experts)
        if not (shape and all(shape) and heads_fit and experts_fit):
            raise InputError(
                f"Tensor {placed.tensor} in {file} has shape {shape}, which contradicts the file's own metadata",
                "Download the file again.",
            )

    def names(self) -> frozenset[str]:
        return frozenset(self._placed)

    def shape(self, name: str) -> tuple[int, ...]:
        placed = self._place(name)
        dimensions = self._tensors[placed.tensor][1].shape
        # GGUF lists the fastest dimension first.
        shape = tuple(int(size) for size in reversed(dimensions))
        return shape if placed.expert is None else shape[1:]

    def _place(self, name: str) -> Placed:
        if name not in self._placed:
            raise self.absent(name)
        return self._placed[name]

    def _read(self, name: str) -> Tensor:
        placed = self._place(name)
        file, stored = self._tensors[placed.tensor]
        shape = self.shape(name)
        start, length = int(stored.data_offset), int(stored.n_bytes)
        if placed.expert is not None:
            length //= int(stored.shape[-1])
            start += placed.expert * length
        raw = np.frombuffer(read_range(file, start, length, f"tensor {placed.tensor}"), dtype=np.uint8)
        tensor = _dequantize(raw, stored, shape, file)
        return _deinterleave(tensor, placed.heads) if placed.heads else tensor

    def _vocabulary(self) -> int:
        """Rows of the embedding; 0 for a file without one, which is refused when the tensors are placed."""
        stored = self._tensors.get("token_embd.weight")
        return int(stored[1].shape[-1]) if stored is not None else 0

    def _rotary_factors(self) -> np.ndarray:
        file, stored = self._tensors[ROPE_FACTORS]
        raw = read_range(file, int(stored.data_offset), int(stored.n_bytes), f"tensor {ROPE_FACTORS}")
        return np.frombuffer(raw, dtype=np.float32)

    def fingerprint(self) -> str:
        return combined_digest({file.name: file for file in self._files})

    def save_companions(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / CONFIG, _clean_config(self.config))
        ids = {key: getattr(self.config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(
            directory / "generation_config.json", {key: value for key, value in ids.items() if value is not None}
        )
        converted = self._converted_tokenizer()
        for file in COMPANIONS:
            if (converted / file).is_file():
                copy_file(converted / file, directory / file)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(self._converted_tokenizer())

    def _converted_tokenizer(self) -> Path:
        """The tokenizer as Hugging Face files, converted once per file content and kept in the user's cache."""
        directory = cache_directory() / "tokenizers" / f"{self.fingerprint()[:16]}-v2"
        if not (directory / "tokenizer.json").is_file():
            directory.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".convert-") as scratch:
                finished = Path(scratch) / "tokenizer"
                _convert_tokenizer(self._files[0], self._metadata, self.config).save_pretrained(str(finished))
                try:
                    finished.rename(directory)
                except OSError:
                    # Another process converted the same file first; its result is the same.
                    if not (directory / "tokenizer.json").is_file():
                        raise
        return directory


def _wanted(key: str) -> bool:
    """Whether a metadata value is needed: the long lists of the vocabulary are transformers' to read."""
    return not key.startswith("tokenizer.ggml.") or key.endswith(
        ("_token_id", ".model", "add_bos_token", "add_eos_token")
    )


def _parts(path: Path) -> list[Path]:
    match = _SPLIT.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise InputError(f"Part {part} of the GGUF model is missing", f"Put all {count} parts beside each other.")
    return parts


def _open(path: Path) -> "tuple[dict[str, Any], list[ReaderTensor]]":
    """The metadata that is needed, and where the tensors lie."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items() if _wanted(key)}
    except OSError as error:
        raise unreadable(path, error) from error
    # The parser trusts the file; what damage makes it stumble over depends on where the damage is.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise InputError(
            f"{path} is not a GGUF file, or it is truncated or damaged ({type(error).__name__}: {one_line(error)})",
            "Download the file again.",
        ) from error
    if reader.byte_order != "I":
        raise UnsupportedError(f"{path} is of the other byte order", "Use a file for this machine.")
    return metadata, reader.tensors


def _dequantize(raw: np.ndarray, stored: "ReaderTensor", shape: tuple[int, ...], file: Path) -> Tensor:
    """Bytes of one tensor -> bfloat16 of `shape`, a few rows at a time."""
    from gguf import dequantize

    rows = raw.reshape(math.prod(shape[:-1]), -1)
    out = torch.empty((rows.shape[0], shape[-1]), dtype=torch.bfloat16)
    step = max(1, _PIECE // max(1, shape[-1]))
    try:
        for first in range(0, rows.shape[0], step):
            piece = dequantize(rows[first : first + step], stored.tensor_type)
            out[first : first + step] = torch.from_numpy(np.ascontiguousarray(piece))
    except NotImplementedError as error:
        raise UnsupportedError(
            f"{file} stores tensor {stored.name} as {stored.tensor_type.name}, which the gguf package can't dequantize",
            "Use another GGUF of this model, for example Q8_0.",
        ) from error
    return out.reshape(shape)


def _deinterleave(tensor: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of q and k rows: per head, pairs (2i, 2i+1) go back to (i, i + head_dim / 2)."""
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, half, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _clean_config(config: "PreTrainedConfig") -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    values.pop("_name_or_path", None)
    values.pop("quantization_config", None)
    return values


def _convert_tokenizer(file: Path, metadata: dict[str, Any], config: "PreTrainedConfig") -> "PreTrainedTokenizerBase":
    """transformers' own conversion, with the special tokens that the metadata names put right.

    (It takes the eos token of byte-level tokenizers for the bos token.)
    """
    from transformers import AutoTokenizer

    log.info("Converting the tokenizer of %s", file.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except (ValueError, KeyError, OSError, NotImplementedError, TypeError) as error:
        raise InputError(
            f"The tokenizer in {file} can't be converted: {one_line(error)}", "Use the model's safetensors."
        ) from error
    for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(int(token)))
    # llama.cpp writes every space that was decoded; transformers' conversion would drop some before punctuation.
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer
