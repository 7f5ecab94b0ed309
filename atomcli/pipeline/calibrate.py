"""Stage 1, calibration: what the parent's inputs look like, as an artifact that many recipes can use.

The parent runs over the calibration tokens block by block. Per site (linears that share an input) the energy and range
of every channel are kept, and how many tokens each expert got. An artifact is a directory: calibration.json (whose
statistics these are, and of what text), tokens.safetensors, and one statistics-00001.safetensors per block.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from atomcli.checkpoint.files import read_json, write_json
from atomcli.checkpoint.tensorfile import TensorFile
from atomcli.checkpoint.writer import publish, unfinished, write_shard
from atomcli.errors import InputError, RunError, UsageError
from atomcli.pipeline.journal import LOCK, Journal, differences, locked
from atomcli.pipeline.model import Walk, full_name, start_walk
from atomcli.pipeline.progress import Progress, Silent
from atomcli.pipeline.stream import Stream, run
from atomcli.recipe import Recipe
from atomcli.runtime.decoder import build_block, embed, read_outer
from atomcli.text import calibration_windows
from atomcli.version import __version__

if TYPE_CHECKING:
    from atomcli.checkpoint.source import Source

SETTINGS = "calibration.json"
TOKENS = "tokens.safetensors"
_LOG = logging.getLogger("atomcli")


@dataclass(frozen=True)
class Statistics:
    """What one site's input looks like: per channel (K,) the energy (sum of squares, fp64), minimum and maximum.

    tokens int64: (1,), or how many each expert got. Channels of experts are taken over all of them, for they share
    one order.
    """

    energy: Tensor
    minimum: Tensor
    maximum: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Calibration:
    """An artifact: its identity, its tokens (samples, sequence_length) and its statistics on disk."""

    directory: Path
    identity: dict[str, Any]
    tokens: Tensor

    def statistics(self, index: int) -> dict[str, Statistics]:
        """The statistics of block `index` by the name of the site."""
        file = TensorFile(self.directory / _statistics_file(index))
        sites = sorted({name.split(".")[0] for name in file.entries})
        fields = ("energy", "minimum", "maximum", "tokens")
        if lacking := sorted({f"{site}.{field}" for site in sites for field in fields} - file.entries.keys()):
            raise InputError(f"{file.path} lacks {lacking[0]}", "calibrate again")
        return {site: Statistics(*(file.read(f"{site}.{field}") for field in fields)) for site in sites}


def tokens_for(source: Source, recipe: Recipe) -> Tensor:
    """The calibration tokens that a recipe asks for, int64 (samples, sequence_length)."""
    settings = recipe.calibration
    return calibration_windows(
        settings.dataset, source.tokenizer(), settings.samples, settings.sequence_length, settings.seed
    )


def tokens_digest(tokens: Tensor) -> str:
    """SHA-256 (hex) of tokens (samples, sequence_length)."""
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(tokens.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def identity_of(source: Source, recipe: Recipe, tokens: Tensor) -> dict[str, Any]:
    """What the statistics depend on."""
    return {
        "atom": __version__,
        "model": source.fingerprint(),
        "calibration": recipe.calibration.model_dump(mode="json"),
        "tokens": tokens_digest(tokens),
    }


def calibrate(
    source: Source,
    recipe: Recipe,
    out: Path,
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    tokens: Tensor | None = None,
) -> Calibration:
    """Make the artifact `out`, or continue one that was interrupted; a finished one of the same identity is reused.

    `tokens` (samples, sequence_length) take the place of the recipe's text. Raises UsageError when `out` holds
    anything else, InputError for text or model, RunError when the run fails.
    """
    walk, progress = start_walk(source, device), progress or Silent()
    tokens = tokens_for(source, recipe) if tokens is None else tokens
    check_calibration_tokens(tokens, walk)
    identity = identity_of(source, recipe, tokens)
    if (out / SETTINGS).is_file():
        found = read_json(out / SETTINGS).get("identity")
        if found == identity:
            _LOG.info("%s is finished already", out)
            return open_calibration(out, source)
        raise UsageError(
            f"{out} holds another calibration: {'; '.join(differences(found, identity))}", "choose another -o"
        )
    directory = unfinished(out)
    with locked(directory):
        journal = Journal.open(directory, identity)
        write_shard(directory, TOKENS, {"tokens": tokens})
        stream = _stream(walk, tokens, directory, len(journal.steps))
        progress.begin("calibrate", walk.blocks)
        progress.advance(len(journal.steps))
        for index in range(len(journal.steps), walk.blocks):
            if index == 0:
                stream.write(embedded(walk, tokens), "the embedding")
            with journal.same_threads():
                stream = _calibrate_block(walk, index, stream, directory)
            journal.publish({"block": index})
            _stream(walk, tokens, directory, index).path.unlink(missing_ok=True)
            progress.advance(index + 1)
        progress.end()
        write_json(directory / SETTINGS, {"identity": identity, "model": source.name})
        for path in directory.iterdir():
            if path.suffix in (".stream", ".tmp") or path.name == LOCK:
                path.unlink()
        with journal.aside():
            publish(directory, out)
    return open_calibration(out, source)


def open_calibration(directory: Path, source: Source) -> Calibration:
    """A finished artifact for `source`; InputError when it is none, is damaged, or belongs to another model."""
    if not (directory / SETTINGS).is_file():
        unfinished_one = unfinished(directory).is_dir()
        raise InputError(
            f"{directory} is no {'finished ' if unfinished_one else ''}calibration: it holds no {SETTINGS}",
            "make one with `atom calibrate MODEL -o DIR`",
        )
    settings = read_json(directory / SETTINGS)
    identity = settings.get("identity")
    if not isinstance(identity, dict) or not isinstance(identity.get("calibration"), dict):
        raise InputError(f"{directory / SETTINGS} is damaged: it doesn't say what was calibrated", "calibrate again")
    if identity.get("model") != source.fingerprint():
        raise InputError(
            f"{directory} was calibrated on another model ({settings.get('model')}), not on {source.name}",
            f"make one with `atom calibrate {source.name} -o DIR`",
        )
    tokens = TensorFile(directory / TOKENS).read("tokens")
    if tokens_digest(tokens) != identity.get("tokens"):
        raise InputError(f"{directory / TOKENS} is damaged", "calibrate again")
    return Calibration(directory, identity, tokens)


def embedded(walk: Walk, tokens: Tensor) -> Iterator[Tensor]:
    """The first block's input, one sequence at a time."""
    model = read_outer(walk.family, walk.source)
    with torch.inference_mode():
        for sequence in tokens:
            yield embed(model, sequence[None])


def _stream(walk: Walk, tokens: Tensor, directory: Path, index: int) -> Stream:
    """The generation of the parent's stream that goes into block `index`."""
    shape = (tokens.shape[0], tokens.shape[1], walk.config.hidden_size)
    return Stream(directory / f"parent-{index:05d}.stream", shape, walk.source.dtype)


def _calibrate_block(walk: Walk, index: int, stream: Stream, directory: Path) -> Stream:
    """Run one block of the parent and save its statistics; returns the stream after it."""
    block = build_block(walk.family, walk.config, index, walk.read(index))
    after = Stream(stream.path.with_name(f"parent-{index + 1:05d}.stream"), stream.shape, stream.dtype)
    with _collecting(walk, block, index) as collectors:
        outputs = run(stream, walk.sequences_at_once(stream.shape[1]), lambda chunk: walk.forward(block, index, chunk))
        after.write(outputs, full_name(index, "").rstrip("."))
    tensors = {}
    for site, collector in collectors.items():
        for field, value in collector.result().items():
            tensors[f"{site}.{field}"] = value
    write_shard(directory, _statistics_file(index), tensors)
    return after


class _Collector:
    """Accumulates the statistics of one site over chunks, and over the experts that share it."""

    def __init__(self, channels: int, experts: int, device: torch.device) -> None:
        self.energy = torch.zeros(channels, dtype=torch.float64, device=device)
        self.minimum = torch.full((channels,), torch.inf, device=device)
        self.maximum = torch.full((channels,), -torch.inf, device=device)
        self.tokens = torch.zeros(experts, dtype=torch.int64)

    def add(self, x: Tensor, expert: int) -> None:
        """Inputs (..., channels) of one expert, or of the only linears there are (expert 0)."""
        x = x.reshape(-1, x.shape[-1]).float()
        if not x.shape[0]:
            return
        self.energy += x.square().sum(dim=0, dtype=torch.float64)
        self.minimum = torch.minimum(self.minimum, x.amin(dim=0))
        self.maximum = torch.maximum(self.maximum, x.amax(dim=0))
        self.tokens[expert] += x.shape[0]

    def result(self) -> dict[str, Tensor]:
        if not bool(torch.isfinite(self.energy).all()):
            raise RunError(
                "the energy of a layer's input is not finite", "The model overflows on the calibration text."
            )
        seen = self.tokens.sum() > 0
        return {
            "energy": self.energy.cpu(),
            "minimum": (self.minimum if seen else torch.zeros_like(self.minimum)).cpu(),
            "maximum": (self.maximum if seen else torch.zeros_like(self.maximum)).cpu(),
            "tokens": self.tokens,
        }


@contextmanager
def _collecting(walk: Walk, block: nn.Module, index: int) -> Iterator[dict[str, _Collector]]:
    """Watch the input of each site's first linear, which all linears of the site read."""
    collectors: dict[str, _Collector] = {}
    handles = []
    for site in walk.family.sites(walk.config, index):
        experts = walk.family.expert_count(walk.config, index) if site.expert else 1
        channels = walk.in_features(index, site.of_expert(0)[0])
        collectors[site.name] = _Collector(channels, experts, walk.device)
        for expert in range(experts):
            linear = block.get_submodule(site.of_expert(expert)[0])
            handles.append(linear.register_forward_pre_hook(_hook(collectors[site.name], expert)))
    try:
        yield collectors
    finally:
        for handle in handles:
            handle.remove()


def _hook(collector: _Collector, expert: int) -> Any:
    def watch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        collector.add(arguments[0], expert)

    return watch


def _statistics_file(index: int) -> str:
    return f"statistics-{index + 1:05d}.safetensors"


def check_calibration_tokens(tokens: Tensor, walk: Walk) -> None:
    """Refuse tokens that are misshapen or that the model does not know."""
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise InputError(f"calibration tokens have shape {list(tokens.shape)}; expected (samples, at least 2 tokens)")
    lowest, highest = (int(bound) for bound in torch.aminmax(tokens))
    if lowest < 0 or highest >= walk.config.vocab_size:
        token = min(lowest, 0) or highest
        raise InputError(
            f"the calibration text has token {token}, but {walk.source.name} knows {walk.config.vocab_size} tokens",
            "The tokenizer belongs to another model.",
        )
