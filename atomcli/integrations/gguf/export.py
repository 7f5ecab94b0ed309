"""From a checkpoint to one GGUF file, block by block; what was written is read back as a model before it gets its name.

The `gguf` package writes the file; atom's own GGUF source, which reads parents, reads it.
"""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from atomcli.checkpoint.files import TEMPORARY, sync_directory, write_error
from atomcli.checkpoint.gguf import GGUFSource
from atomcli.checkpoint.gguf_names import ROPE_FACTORS
from atomcli.checkpoint.writer import refuse_occupied
from atomcli.errors import RunError
from atomcli.formats.scheme import Scheme
from atomcli.integrations.comparison import Comparison, Cost
from atomcli.integrations.gguf.names import Entry, entries
from atomcli.integrations.gguf.schema import ARCHITECTURES, TARGET, metadata, rotary_factors, type_of
from atomcli.integrations.gguf.tensors import dense_rows, interleave, row_bytes, to_rows
from atomcli.integrations.gguf.tokenizer import tokenizer_keys
from atomcli.integrations.portable import What, natural_weight, restate
from atomcli.integrations.reading import Linear, Reading
from atomcli.integrations.route import Route, find_route
from atomcli.pipeline.progress import Progress, Silent
from atomcli.runtime.linear import QuantLinear, input_layout

if TYPE_CHECKING:
    from atomcli.checkpoint.source import Source

_DENSE = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_FILE_TYPES = {"Q4_0": 2, "Q8_0": 7}  # llama.cpp's enum llama_ftype


def plan_route(reading: Reading, trades: Mapping[What, str]) -> Route:
    """The route of a checkpoint under these trades; UsageError naming what GGUF can't hold and no trade covers."""
    return find_route(reading, TARGET, trades)


def name_of(scheme: Scheme) -> str:
    """llama.cpp's type for a plain scheme."""
    return type_of(scheme)


def next_commands(out: Path, reading: Reading, route: Route) -> list[str]:
    """What one wants to type next."""
    return [shlex.join(["llama-cli", "-m", str(out)]), shlex.join(["llama-server", "-m", str(out)])]


def export(
    reading: Reading,
    route: Route,
    out: Path,
    *,
    windows: Tensor | None = None,
    parent: "Source | None" = None,
    progress: Progress | None = None,
) -> Cost | None:
    """Write the file `out`; returns what it costs on `windows` (n, length) of token ids, if those are given.

    Raises UsageError when `out` is there, UnsupportedError for a model or tokenizer that llama.cpp has no words for,
    RunError when a tensor reads back as something else.
    """
    refuse_occupied(out)
    progress = progress or Silent()
    temporary = out.with_name(out.name + TEMPORARY)
    comparison = None if windows is None else Comparison(reading, windows, parent)
    try:
        progress.begin("export", reading.blocks)
        _write(reading, route, temporary, progress)
        progress.begin("verify", reading.blocks)
        _verify(reading, route, GGUFSource(temporary), comparison, progress)
        progress.end()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(out)
        sync_directory(out.resolve().parent)
    except OSError as error:
        raise write_error(out, error, 0, 0) from error
    finally:
        temporary.unlink(missing_ok=True)
    return None if comparison is None else comparison.cost()


def _write(reading: Reading, route: Route, path: Path, progress: Progress) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    config, all_entries = reading.config, entries(reading)
    architecture = ARCHITECTURES[config.model_type]
    writer = GGUFWriter(path, architecture)
    _add_keys(writer, {f"{architecture}.{key}": value for key, value in metadata(config).items()})
    types = {type_of(scheme) for scheme in route.schemes().values()}
    general = {"general.name": reading.checkpoint.path.resolve().name, "general.quantization_version": 2}
    if len(types) == 1:
        general["general.file_type"] = _FILE_TYPES[types.pop()]
    _add_keys(writer, general | tokenizer_keys(reading.checkpoint.path, int(config.vocab_size)))
    factors = rotary_factors(config)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    linears = {linear.disk: linear for linear in reading.linears}
    for entry in all_entries:
        kind, shape = _form(reading, route, linears, entry)
        stored = np.dtype(np.float32) if kind == "F32" else np.dtype(np.uint8)
        size = int(np.prod(shape)) * stored.itemsize
        writer.add_tensor_info(entry.name, shape, stored, size, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    done = 0
    for entry in all_entries:
        writer.write_tensor_data(_bytes(reading, route, linears, entry))
        if entry.block is not None and entry.block > done:
            done = entry.block
            progress.advance(done)
    writer.close()
    progress.advance(reading.blocks)


def _add_keys(writer: Any, keys: Mapping[str, Any]) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in keys.items():
        (writer.add_array if isinstance(value, list) else adders[type(value)])(key, value)


def _is_float(entry: Entry, shape: tuple[int, ...]) -> bool:
    """Vectors and routers are fp32 in llama.cpp, whatever the model is in."""
    return len(shape) == 1 or "ffn_gate_inp" in entry.name


def _form(reading: Reading, route: Route, linears: Mapping[str, Linear], entry: Entry) -> tuple[str, tuple[int, ...]]:
    """llama.cpp's type of a tensor, and its shape with the last dimension in bytes unless that type is F32."""
    linear = linears.get(entry.disk[0].removesuffix(".weight"))
    way = None if linear is None else route.passages[linear]
    leading = (len(entry.disk),) if entry.stacked else ()
    if linear is not None and way is not None and way.scheme is not None:
        return type_of(way.scheme), (*leading, linear.shape[0], row_bytes(way.scheme, linear.shape[1]))
    shape = reading.shape(entry.disk[0])
    if _is_float(entry, shape) or reading.dtype == torch.float32:
        return "F32", (*leading, *shape)
    return _DENSE[reading.dtype], (*leading, *shape[:-1], shape[-1] * reading.dtype.itemsize)


def _bytes(reading: Reading, route: Route, linears: Mapping[str, Linear], entry: Entry) -> np.ndarray:
    parts = []
    for disk in entry.disk:
        linear = linears.get(disk.removesuffix(".weight"))
        if linear is not None:
            weight, layout, _ = reading.read(linear)
            way = route.passages[linear]
            if way.scheme is not None:
                rows = to_rows(restate(weight, layout, way))
            else:
                rows = dense_rows(natural_weight(weight, layout).to(reading.dtype))
        else:
            tensor = reading.tensor(disk)
            rows = tensor.float().numpy() if _is_float(entry, tuple(tensor.shape)) else dense_rows(tensor)
        parts.append(interleave(rows, entry.heads))
    return np.stack(parts) if entry.stacked else parts[0]


def _verify(
    reading: Reading, route: Route, written: GGUFSource, comparison: Comparison | None, progress: Progress
) -> None:
    """Read every tensor back as a parent's; RunError naming one that isn't the checkpoint's."""
    for index in range(reading.blocks):
        modules: dict[str, nn.Module] = {}
        for linear in reading.of_block(index):
            way = route.passages[linear]
            weight, layout, bias = reading.read(linear)
            wanted = natural_weight(weight, layout)
            if way.scheme is not None:
                stated = restate(weight, layout, way)
                wanted = stated.dequantize() if way.rounded_again else wanted
                modules[linear.name] = QuantLinear.from_weight(stated, input_layout(way.scheme, linear.shape[1]), bias)
            else:
                modules[linear.name] = _dense_linear(wanted.to(reading.dtype), bias)
            _check(written, f"{linear.disk}.weight", wanted)
        for name, tensor in reading.others(index).items():
            _check(written, reading.disk_names(index)[name], tensor.float())
        if comparison is not None:
            comparison.advance(index, reading.rebuilt(index, modules))
        progress.advance(index + 1)
    for name, tensor in reading.outer().items():
        _check(written, name, tensor.float())


def _check(written: GGUFSource, name: str, wanted: Tensor) -> None:
    found = written.read(name).float()
    step = torch.finfo(torch.bfloat16).eps  # the source gives bfloat16
    if found.shape != wanted.shape or not torch.allclose(
        found, wanted, rtol=step, atol=step * float(wanted.abs().amax())
    ):
        raise RunError(
            f"{name} reads back from {written.path} as another tensor than the checkpoint's",
            "It is not published. Check the disk and the memory of this machine, then export again.",
        )


def _dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}), assign=True)
    return linear
