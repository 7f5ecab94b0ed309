"""From a checkpoint to a directory in compressed-tensors, block by block; each is read back before the next is made."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from atomcli.checkpoint.card import CARD, card
from atomcli.checkpoint.directory import COMPANIONS, CONFIG
from atomcli.checkpoint.files import copy_file, read_json, write_json, write_text
from atomcli.checkpoint.manifest import ShardRecord
from atomcli.checkpoint.tensorfile import TensorFile
from atomcli.checkpoint.verify import verify_files
from atomcli.checkpoint.writer import finish, publish, refuse_occupied, shard_file, unfinished, write_shard
from atomcli.errors import InputError, RunError
from atomcli.formats.scheme import Scheme
from atomcli.integrations.comparison import Comparison, Cost
from atomcli.integrations.compressed_tensors.schema import NVFP4, PACKED, TARGET, format_of, quantization_config
from atomcli.integrations.compressed_tensors.tensors import from_tensors, to_tensors
from atomcli.integrations.portable import Passage, What, natural_weight, restate
from atomcli.integrations.reading import Linear, Reading
from atomcli.integrations.route import Route, find_route, fresh
from atomcli.pipeline.progress import Progress, Silent
from atomcli.runtime.linear import QuantLinear, input_layout
from atomcli.units import byte_count
from atomcli.version import __version__

if TYPE_CHECKING:
    from atomcli.checkpoint.source import Source

_SERVE = """
## Use

```sh
pip install vllm
vllm serve THIS_MODEL
```
"""
_LOAD = """
```python
from transformers import AutoModelForCausalLM  # pip install compressed-tensors

model = AutoModelForCausalLM.from_pretrained("THIS_MODEL")  # unpacks the weights: for accuracy, not for speed
```
"""


def plan_route(reading: Reading, trades: Mapping[What, str]) -> Route:
    """The route of a checkpoint under these trades.

    Raises UsageError naming what the format can't hold and no trade covers, InputError where NVFP4 activations lack
    the range of their inputs.
    """
    route, ranges = find_route(reading, TARGET, trades), reading.ranges()
    for linear, way in route.passages.items():
        if _needs_range(way.scheme) and linear.full not in ranges:
            raise InputError(
                f"atom_report.json has no input_absmax for {linear.full}, which NVFP4 activations need",
                "Quantize again with this version of atom, or add --trade activations=16bit.",
            )
    return route


def name_of(scheme: Scheme) -> str:
    """What the format calls a plain scheme, beside atom's name for it."""
    return f"{format_of(scheme)} ({scheme.name})"


def next_commands(out: Path, reading: Reading, route: Route) -> list[str]:
    """What one wants to type next."""
    serve = ["vllm", "serve", str(out)]
    if any(scheme.activations.element == "int4" for scheme in route.schemes().values()):
        # Other backends take the weights and leave the activations in 16 bits, without a word.
        serve += ["--linear-backend", "humming"]
    if reading.plan.kv_cache.element != "float":
        # Engines quantize the cache themselves, by their own rule.
        serve += ["--kv-cache-dtype", f"{reading.plan.kv_cache.element}_per_token_head"]
    load = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(out)!r})"
    return [shlex.join(serve)] + ([f'python -c "{load}"'] if transformers_reads(route) else [])


def transformers_reads(route: Route) -> bool:
    """Whether transformers can run the export: of experts it unpacks one format and trips over others."""
    return all(".experts." not in name or format_of(scheme) == PACKED for name, scheme in route.schemes().items())


def export(
    reading: Reading,
    route: Route,
    out: Path,
    *,
    windows: Tensor | None = None,
    parent: "Source | None" = None,
    progress: Progress | None = None,
) -> Cost | None:
    """Write the directory `out`; returns what it costs on `windows` (n, length) of token ids, if those are given.

    Every linear is read back from disk and must be the weight of the checkpoint, or the requantized one. `out` appears
    whole or not at all. Raises UsageError when it is occupied, RunError when a linear reads back as something else.
    """
    refuse_occupied(out)
    directory = fresh(unfinished(out))
    progress = progress or Silent()
    comparison = None if windows is None else Comparison(reading, windows, parent)
    shards = [write_shard(directory, shard_file(None), reading.outer())]
    ranges = reading.ranges()
    progress.begin("export", reading.blocks)
    for index in range(reading.blocks):
        shards.append(_write_block(reading, route, index, directory, ranges, comparison))
        progress.advance(index + 1)
    progress.end()
    for file in COMPANIONS:
        if (reading.checkpoint.path / file).is_file():
            copy_file(reading.checkpoint.path / file, directory / file)
    config = read_json(reading.checkpoint.path / CONFIG)
    kept = [*reading.kept(), *route.dense()]
    config["quantization_config"] = quantization_config(route.schemes(), kept, __version__)
    write_json(directory / CONFIG, config)
    cost = None if comparison is None else comparison.cost()
    write_text(directory / CARD, _card(reading, route, sum(shard.bytes for shard in shards), cost))
    finish(directory, shards)
    verify_files(directory)
    publish(directory, out)
    return cost


def _card(reading: Reading, route: Route, size: int, cost: Cost | None) -> str:
    """The model card of an export."""
    report = reading.checkpoint.report
    architecture = (reading.config.architectures or [reading.config.model_type])[0]
    parent = report.get("parent") or {"name": reading.checkpoint.path.resolve().name, "architecture": architecture}
    summary = [(f"{count} linears", name) for name, count in route.counts(name_of).items()]
    summary += [("size of the weights", byte_count(size))]
    if proof := report.get("proof"):
        told = f"{proof['kld']:.4f} nats a token, on {proof['tokens']} tokens of the calibration text"
        summary.append(("KL divergence of atom's checkpoint from the parent", told))
    if cost is not None:
        moved = f"{cost.export_from_checkpoint:.4f} nats a token, on {cost.tokens} tokens"
        summary.append(("KL divergence of this export from atom's checkpoint", moved))
    notes = "Written from atom's checkpoint without loss." if route.exact else ""
    if route.obstacles:
        listed = "\n".join(f"* {obstacle.why}" for obstacle in route.obstacles)
        notes = f"What atom's checkpoint has and this format can't hold was traded:\n\n{listed}"
    use = _SERVE + (_LOAD if transformers_reads(route) else "")
    return card(parent, summary, ["atom", "compressed-tensors", "quantized"], use, notes)


def _write_block(
    reading: Reading,
    route: Route,
    index: int,
    directory: Path,
    ranges: Mapping[str, float],
    comparison: Comparison | None,
) -> ShardRecord:
    """The shard of a block, checked against the checkpoint."""
    disk = reading.disk_names(index)
    tensors = {disk[name]: tensor for name, tensor in reading.others(index).items()}
    wanted: dict[Linear, Tensor] = {}
    biases: dict[Linear, Tensor | None] = {}
    for linear in reading.of_block(index):
        way = route.passages[linear]
        weight, layout, bias = reading.read(linear)
        wanted[linear], biases[linear] = natural_weight(weight, layout), bias
        if bias is not None:
            tensors[f"{linear.disk}.bias"] = bias
        if way.scheme is None:
            tensors[f"{linear.disk}.weight"] = wanted[linear].to(reading.dtype)
            continue
        stated = restate(weight, layout, way)
        if way.rounded_again:
            wanted[linear] = stated.dequantize()
        found = to_tensors(stated, reading.dtype, ranges.get(linear.full))
        tensors |= {f"{linear.disk}.{suffix}": tensor for suffix, tensor in found.items()}
    record = write_shard(directory, shard_file(index), tensors)
    del tensors
    file = TensorFile(directory / shard_file(index))
    modules = {
        linear.name: _reopened(file, linear, route.passages[linear], wanted[linear], biases[linear])
        for linear in reading.of_block(index)
    }
    if comparison is not None:
        comparison.advance(index, reading.rebuilt(index, modules))
    return record


def _reopened(file: TensorFile, linear: Linear, way: Passage, wanted: Tensor, bias: Tensor | None) -> nn.Module:
    """A linear as the written file has it; RunError when that isn't the weight (N, K) that was wanted."""
    prefix = f"{linear.disk}."
    stored = {name.removeprefix(prefix): file.read(name) for name in file.entries if name.startswith(prefix)}
    module: nn.Module
    if way.scheme is None:
        module = nn.Linear(linear.shape[1], linear.shape[0], bias=bias is not None, device="meta")
        module.load_state_dict(stored, assign=True)
        found, rounding = stored["weight"].float(), stored["weight"].dtype
    else:
        weight = from_tensors(way.scheme, linear.shape, stored)
        module = QuantLinear.from_weight(weight, input_layout(way.scheme, linear.shape[1]), bias)
        found = weight.dequantize()
        scale = stored["weight_scale"].dtype
        rounding = scale if scale in (torch.bfloat16, torch.float16) else torch.float32
    # Scales and dense weights are rounded to the model's dtype, nothing else is.
    step = torch.finfo(rounding).eps
    if not torch.allclose(found, wanted, rtol=step, atol=step * float(wanted.abs().amax())):
        raise RunError(
            f"{linear.disk} in {file.path} reads back as another weight than the checkpoint's",
            "It is not published. Check the disk and the memory of this machine, then export again.",
        )
    return module


def _needs_range(scheme: Scheme | None) -> bool:
    return scheme is not None and format_of(scheme) == NVFP4 and scheme.activations.element != "float"
