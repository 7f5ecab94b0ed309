"""Model directories of published shapes with made-up weights, so that a size can be tried without its download.

The weights are random but behave as trained ones do where quantization is hurt: a few channels of the residual stream
carry far more energy than the others, norms spread the channels apart, weights have heavy tails, and the first token
of a text is massive in two channels (Sun et al., "Massive activations in large language models", 2024). Numbers depend
on the seed and the tensor's name only, and a block is written and let go before the next one is made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atomcli.checkpoint.directory import CONFIG, INDEX
from atomcli.checkpoint.files import write_json
from atomcli.checkpoint.manifest import ShardRecord
from atomcli.checkpoint.writer import publish, refuse_occupied, unfinished, write_shard
from atomcli.errors import UsageError
from atomcli.models.registry import describe
from atomcli.models.tensors import EMBEDDING, FINAL_NORM, HEAD, block_shapes, block_tensors, outer_shapes

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-5}
_QWEN = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936, "head_dim": 128}


def _shape(base: dict[str, Any], hidden: int, width: int, blocks: int, heads: int, keys: int, **more: Any) -> Any:
    return {
        **base,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


# The published config.json of each, as far as it gives shapes.
PARENTS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _shape(_LLAMA, 4096, 11008, 32, 32, 32),
    "llama-2-13b": _shape(_LLAMA, 5120, 13824, 40, 40, 40),
    "llama-2-70b": _shape(_LLAMA, 8192, 28672, 80, 64, 8),
    "mixtral-8x7b": _shape(
        {**_LLAMA, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
        4096,
        14336,
        32,
        32,
        8,
        num_local_experts=8,
        num_experts_per_tok=2,
        rope_theta=1e6,
    ),
    "qwen3-30b-a3b": _shape(
        _QWEN,
        2048,
        6144,
        48,
        32,
        4,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    ),
    "qwen3-235b-a22b": _shape(
        _QWEN,
        4096,
        12288,
        94,
        64,
        4,
        moe_intermediate_size=1536,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    ),
}
_DIVIDED = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads")
_BYTES = 256  # a token each, after three special ones
_SPECIAL = ("<unk>", "<s>", "</s>")
_OUTLIERS = 0.01  # share of the residual stream's channels that stand out, at least two
_MASSIVE = 40.0  # first token's size in two channels, beside other tokens' standard deviation of about 1
_SLICE = 1 << 22


def parent_config(shape: str, blocks: int | None = None, divide: int = 1, **changes: Any) -> dict[str, Any]:
    """config.json of a published shape with another depth, its widths and heads divided, or single keys changed.

    Heads keep their size and stay at least one; UsageError for an unknown shape or one that doesn't divide.
    """
    if shape not in PARENTS:
        raise UsageError(f"{shape} is no shape that can be made", f"Choose one of {', '.join(PARENTS)}")
    config = dict(PARENTS[shape])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if divide < 1 or config["hidden_size"] % divide:
        raise UsageError(f"hidden_size {config['hidden_size']} can't be divided by {divide}")
    for key in _DIVIDED:
        if key in config:
            config[key] = max(1, config[key] // divide)
    if divide > 1:
        config["vocab_size"] = max(512, config["vocab_size"] // divide)
    if blocks is not None:
        config["num_hidden_layers"] = blocks
    return config | {"dtype": "bfloat16"} | changes


def write_parent(
    config: dict[str, Any], out: Path, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write a model directory of `config` (as in config.json) to `out`, a shard for each block; returns `out`.

    Deterministic in config and seed. Raises UsageError when `out` is occupied, RunError when the disk is full.
    """
    from transformers import CONFIG_MAPPING

    refuse_occupied(out)
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    family, dtype = describe(parsed), getattr(torch, config.get("dtype", "bfloat16"))
    directory = unfinished(out)
    directory.mkdir(parents=True, exist_ok=True)
    blocks = int(parsed.num_hidden_layers)
    weights = _Weights(parsed, dtype, seed)
    weight_map: dict[str, str] = {}
    writing: list[Future[ShardRecord]] = []
    with ThreadPoolExecutor(1) as pool:
        for number in range(blocks + 1):
            file = f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"
            if number < blocks:
                shapes = block_shapes(family, parsed, number)
                names = block_tensors(family, parsed, number)
                wanted = {names[name]: shape for name, shape in shapes.items()}
            else:
                wanted = outer_shapes(family, parsed)
            tensors = weights.made(wanted)
            if writing:  # one block is written while the next is made, and no more are in memory
                writing[-1].result()
            writing.append(pool.submit(write_shard, directory, file, tensors))
            weight_map |= dict.fromkeys(wanted, file)
            del tensors
            if progress is not None:
                progress(number + 1, blocks + 1)
    total = sum(written.result().bytes for written in writing)
    write_json(directory / CONFIG, config)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_tokenizer(directory)
    publish(directory, out)
    return out


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of bytes: 256 of them and three special tokens, with <s> before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*_SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=_SPECIAL[0]))
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    document = json.loads(tokenizer.to_str())
    write_json(directory / "tokenizer.json", document)
    special = dict(zip(("unk_token", "bos_token", "eos_token"), _SPECIAL, strict=True))
    write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096} | special,
    )


class _Weights:
    """Every tensor of one model, by its name on disk and its shape."""

    def __init__(self, config: Any, dtype: torch.dtype, seed: int) -> None:
        self.config, self.dtype, self.seed = config, dtype, seed
        hidden = int(config.hidden_size)
        random = self._random("channels")
        standing_out = max(2, round(_OUTLIERS * hidden))
        self.outliers = random.permutation(hidden)[:standing_out]
        self.massive = self.outliers[:2]
        # Log-normal energies, as a trained stream has; the outliers are about ten times as large as the rest.
        self.channels = np.exp(0.3 * random.standard_normal(hidden)).astype(np.float32)
        self.channels[self.outliers] *= 10

    def made(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The tensors of these names and shapes, in the model's dtype."""
        tensors: dict[str, Tensor] = {}
        # numpy draws outside the interpreter lock.
        with ThreadPoolExecutor() as pool:
            drawing: list[Future[None]] = []
            for name, shape in shapes.items():
                tensors[name] = self._vector(name, shape) if len(shape) == 1 else torch.empty(shape, dtype=self.dtype)
                drawing += [pool.submit(part) for part in self._parts(name, tensors[name])]
            for part in drawing:
                part.result()
        return tensors

    def _vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        random = self._random(name)
        if name.endswith(("norm.weight", "layernorm.weight")):
            values = np.abs(1 + 0.1 * random.standard_normal(shape)).astype(np.float32)
            # Norms damp the channels that stand out, but not to what the others have.
            if shape == self.channels.shape and name != FINAL_NORM:
                values[self.outliers] *= 0.4
            return torch.from_numpy(values).to(self.dtype)
        return torch.from_numpy(0.1 * random.standard_normal(shape, dtype=np.float32)).to(self.dtype)

    def _parts(self, name: str, weight: Tensor) -> Iterator[Callable[[], None]]:
        """What fills a weight, a few rows each."""
        if weight.ndim == 1:
            return
        random, (rows, columns) = self._random(name), weight.shape
        rows_scale = self._rows(name, (rows, columns), random)
        spread = np.exp(0.15 * random.standard_normal(columns)).astype(np.float32)
        step = max(1, _SLICE // columns)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield partial(self._fill, name, weight, part, rows_scale[part, None], spread)

    def _fill(
        self, name: str, weight: Tensor, part: slice, rows: np.ndarray[Any, Any], columns: np.ndarray[Any, Any]
    ) -> None:
        values = self._random(f"{name}.{part.start}").standard_normal(weight[part].shape, dtype=np.float32)
        values *= 1 + 0.1 * values * values  # heavier tails than a normal distribution's
        values *= rows * columns
        weight[part] = torch.from_numpy(values)
        if name == EMBEDDING and part.start <= 1 < part.stop:
            weight[1, torch.from_numpy(self.massive)] = _MASSIVE * 10

    def _rows(self, name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray[Any, Any]:
        """The scale of each row: what adds to the stream has the stream's channels and shrinks with the depth."""
        plain = np.exp(0.15 * random.standard_normal(shape[0])).astype(np.float32)
        if name == EMBEDDING:
            return plain
        scale = 1 / np.sqrt(shape[1])
        adds = name.endswith(("o_proj.weight", "down_proj.weight", ".w2.weight"))
        if adds:
            scale /= np.sqrt(2 * self.config.num_hidden_layers)
            return (scale * self.channels).astype(np.float32)
        return (scale * (1 if name == HEAD else 0.7) * plain).astype(np.float32)

    def _random(self, name: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.seed}.{name}".encode()).digest()
        return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
