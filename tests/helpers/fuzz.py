"""Damaged input by the hundred thousand: `python -m tests.helpers.fuzz TARGET RUNS` (guided by coverage, with atheris).

A target takes bytes, makes of them a file that atom reads, and lets atom read it. It may succeed or raise an AtomError:
nothing else, within a second, without a file outside of its directory. Half of the inputs are raw bytes; the others are
a valid document in which the bytes choose what is replaced by what.
"""

import atexit
import copy
import inspect
import json
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.utils import logging

from atomcli.checkpoint.source import open_source
from atomcli.checkpoint.tensorfile import TensorFile
from atomcli.checkpoint.verify import read_checkpoint, verify_checkpoint
from atomcli.errors import AtomError
from atomcli.pipeline.calibrate import open_calibration
from atomcli.pipeline.model import start_walk
from atomcli.pipeline.select import load_plan, save_plan, select
from atomcli.recipe import load_recipe
from atomcli.runtime.decoder import empty_block
from tests.helpers import checkpoints
from tests.helpers.tiny import random_parent
from tests.pipeline.conftest import small_recipe

SECONDS = 5.0  # a shared machine may stop a process for a while

_ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.0, -0.5, 1e308, float("nan"),
    float("inf"), "", "x", "0", "../../outside", "/etc/passwd", "a/b", "\x00", "\ud800", "ключ", "x" * 5000, "null",
    [], {}, [0], [[]], {"": ""}, [1, 2], [None], {"a": {"b": {}}}, "__class__", "!!python/object/apply:os.system [id]",
    "model-00001-of-00002.safetensors", "llama", "mixtral", "float32", "int4", "gptq", "w4a8", "F32", "U8", 16, 24, 128,
)  # fmt: skip


class Choices:
    """Numbers that bytes choose; 0 when there are no more."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, bound: int) -> int:
        piece = self._data[self._at : self._at + 2]
        self._at += 2
        return int.from_bytes(piece, "little") % bound if bound > 0 else 0

    @property
    def over(self) -> bool:
        return self._at >= len(self._data)


def damaged(document: Any, choices: Choices) -> Any:
    """The document with some values replaced, removed, doubled or moved, as the choices say."""
    document = json.loads(json.dumps(document))
    for _ in range(1 + choices.below(3)):
        places = list(_places(document))
        if not places:
            return _odd(choices)
        holder, key = places[choices.below(len(places))]
        other, other_key = places[choices.below(len(places))]
        match choices.below(6):
            case 0:
                del holder[key]
            case 1:
                holder[key] = json.loads(json.dumps(other[other_key]))
            case 2 if isinstance(holder, dict):
                holder[str(_odd(choices))] = holder[key]
            case 3 if isinstance(holder[key], int):
                holder[key] = holder[key] + (-1) ** choices.below(2) * choices.below(300)
            case _:
                holder[key] = _odd(choices)
        if choices.over:
            break
    return document


def _odd(choices: Choices) -> Any:
    return copy.deepcopy(_ODD[choices.below(len(_ODD))])


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in _keys(value):
        yield value, key
        yield from _places(value[key])


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []


def _text(document: Any) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")


@cache
def _scratch() -> Path:
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    directory = Path(tempfile.mkdtemp(prefix="atom-fuzz-", dir=base))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    logging.get_logger("transformers").setLevel("CRITICAL")  # what it thinks of odd configs
    os.environ["ATOM_CACHE"] = str(directory / "cache")
    return directory


@cache
def _model() -> Path:
    directory = _scratch() / "model"
    random_parent("llama", torch.float32)[0].save_pretrained(directory)
    return directory


@cache
def _checkpoint() -> Path:
    return checkpoints.write_checkpoint(_scratch() / "checkpoint")


@cache
def _sharded() -> Path:
    return checkpoints.write_model(_scratch() / "sharded", sharded=True)


def recipe(data: bytes) -> None:
    """A recipe in YAML."""
    path = _scratch() / "recipe.yaml"
    path.write_bytes(
        _raw_or(data, lambda choices: yaml.safe_dump(damaged(_recipe(), choices)).encode("utf-8", "replace"))
    )
    load_recipe(str(path)).resolved()


@cache
def _recipe() -> Any:
    shipped = load_recipe("atom-w4a4").resolved()
    shipped["rules"] = [{"match": "*.o_proj", "scheme": "w4a8"}, {"match": "lm_head", "keep": True}]
    shipped["select"] = {"bits_per_weight": 4.5, "candidates": ["w4a4", "w4a8"]}
    return {key: value for key, value in shipped.items() if value is not None}


def header(data: bytes) -> None:
    """A safetensors file, its tensors read."""
    path = _scratch() / "x.safetensors"

    def made(choices: Choices) -> bytes:
        entries = {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "U8", "shape": [8], "data_offsets": [24, 32]},
            "c": {"dtype": "F8_E4M3", "shape": [0], "data_offsets": [32, 32]},
        }
        text = _text(damaged(entries, choices))
        length = len(text) if choices.below(8) else choices.below(70000)
        return struct.pack("<Q", length) + text + bytes(32)

    path.write_bytes(_raw_or(data, made))
    file = TensorFile(path)
    for name in file.entries:
        tensor = file.read(name)
        assert tensor.shape == file.entries[name].shape


def config(data: bytes) -> None:
    """config.json beside the weights of a small Llama."""
    path = _model() / "config.json"
    valid = _valid(path)
    path.write_bytes(_raw_or(data, lambda choices: _text(damaged(valid, choices))))
    source = open_source(str(_model()))
    walk = start_walk(source, "cpu")
    for index in range(min(walk.blocks, 4)):
        empty_block(walk.family, walk.config, index)


def index(data: bytes) -> None:
    """The index of a sharded model."""
    path = _sharded() / "model.safetensors.index.json"
    valid = _valid(path)
    path.write_bytes(_raw_or(data, lambda choices: _text(damaged(valid, choices))))
    source = open_source(str(_sharded()))
    for name in source.names():
        source.read(name)


def gguf(data: bytes) -> None:
    """A GGUF file: the demo's layout in small, with bytes of its header replaced."""
    path = _scratch() / "x.gguf"

    def made(choices: Choices) -> bytes:
        file = bytearray(_gguf())
        for _ in range(1 + choices.below(4)):
            at = choices.below(len(file))
            match choices.below(4):
                case 0:
                    file[at] = choices.below(256)
                case 1:
                    file[at : at + 8] = struct.pack("<Q", (0, 1, 2**31, 2**40, 2**63)[choices.below(5)])
                case 2:
                    file[at : at + 4] = struct.pack("<I", choices.below(40))
                case _:
                    del file[at : at + choices.below(64)]
        return bytes(file)

    path.write_bytes(_raw_or(data, made, b"GGUF\x03\x00\x00\x00"))
    source = open_source(str(path))
    for name in sorted(source.names())[:8]:
        source.read(name)
    start_walk(source, "cpu")


@cache
def _gguf() -> bytes:
    import numpy as np
    from gguf import GGUFWriter

    path = _scratch() / "valid.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(24)
    writer.add_token_list([f"t{number}" for number in range(24)])
    shapes = {"token_embd": (24, 16), "output_norm": (16,), "blk.0.attn_norm": (16,), "blk.0.ffn_norm": (16,)}
    shapes |= {
        "blk.0.attn_q": (16, 16),
        "blk.0.attn_k": (8, 16),
        "blk.0.attn_v": (8, 16),
        "blk.0.attn_output": (16, 16),
    }
    shapes |= {"blk.0.ffn_gate": (32, 16), "blk.0.ffn_up": (32, 16), "blk.0.ffn_down": (16, 32)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def checkpoint(data: bytes) -> None:
    """One of the JSON files of a finished checkpoint."""
    names = ("config.json", "atom_manifest.json", "model.safetensors.index.json")
    path = _checkpoint() / names[data[0] % 3 if data else 0]
    valid = _valid(path)
    before = path.read_bytes()
    try:
        path.write_bytes(_raw_or(data[1:], lambda choices: _text(damaged(valid, choices))))
        opened = read_checkpoint(_checkpoint())
        for name in opened.names():
            opened.nbytes(name)
        verify_checkpoint(_checkpoint())
    finally:
        path.write_bytes(before)


def calibration(data: bytes) -> None:
    """calibration.json of an artifact."""
    path = _artifact() / "calibration.json"
    valid = _valid(path)
    path.write_bytes(_raw_or(data, lambda choices: _text(damaged(valid, choices))))
    open_calibration(_artifact(), _source()).statistics(0)


@cache
def _source() -> Any:
    directory = _scratch() / "source"
    random_parent("llama", torch.float32)[0].save_pretrained(directory)
    return open_source(str(directory))


@cache
def _artifact() -> Path:
    from atomcli.pipeline.calibrate import calibrate
    from tests.helpers.tiny import random_tokens

    out = _scratch() / "artifact"
    calibrate(_source(), small_recipe(), out, tokens=random_tokens(2, 8), device="cpu")
    return out


def plan(data: bytes) -> None:
    """A saved plan."""
    walk, chosen = _walk(), small_recipe()
    path = _scratch() / "plan.json"
    if not (_scratch() / "plan.valid").exists():
        save_plan(select(chosen, walk), chosen, walk, path)
        shutil.copy(path, _scratch() / "plan.valid")
    valid = _valid(_scratch() / "plan.valid")
    path.write_bytes(_raw_or(data, lambda choices: _text(damaged(valid, choices))))
    load_plan(path, chosen, walk)


@cache
def _walk() -> Any:
    return start_walk(_source(), "cpu")


@cache
def _valid(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _raw_or(data: bytes, made: Callable[[Choices], bytes], prefix: bytes = b"") -> bytes:
    """The bytes themselves, one of them very often, or what they make of a valid document: the first one decides."""
    if data[:1] == b"\xff":
        return prefix + data[1:2] * 5000 + data[2:]
    return prefix + data[1:] if data and data[0] % 4 == 0 else made(Choices(data[1:]))


TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (recipe, header, config, index, gguf, checkpoint, calibration, plan)
}


def check(name: str, data: bytes) -> None:
    """Run one input; AssertionError, or whatever atom let through, when it is a defect."""
    outside = {path.name for path in _scratch().parent.iterdir() if not path.name.startswith("atom-fuzz-")}
    started, said = time.monotonic(), ""
    try:
        TARGETS[name](data)
    except AtomError as error:
        said = error.what
    assert "\n" not in said, f"more than a sentence: {said!r}"
    assert len(said) < 1000, f"a sentence of {len(said)} characters"
    assert time.monotonic() - started < SECONDS, "too slow"
    new = {path.name for path in _scratch().parent.iterdir() if not path.name.startswith("atom-fuzz-")} - outside
    assert not [each for each in new if "outside" in each], f"a file outside: {new}"


def _functions(holder: Any) -> Iterator[Any]:
    """The functions that a module defines, and those of its classes."""
    for value in list(vars(holder).values()):
        if inspect.isclass(value) and value.__module__ == holder.__name__:
            yield from (each for each in vars(value).values() if inspect.isfunction(each))
        elif inspect.isfunction(value) and value.__module__ == holder.__name__:
            yield value


def main(name: str, runs: int) -> None:
    """Fuzz one target, guided by coverage; stops at the first defect."""
    import atheris

    check(name, b"\x01")  # what is made once isn't part of any input
    for module in [module for key, module in sys.modules.items() if key.split(".")[0] in ("atomcli", "gguf")]:
        for function in _functions(module):
            atheris.instrument_func(function)
    count = 0

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        check(name, data)

    atheris.Setup(
        [sys.argv[0], f"-runs={runs}", "-max_len=400", "-len_control=0", "-rss_limit_mb=6000", "-timeout=60"], one
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
