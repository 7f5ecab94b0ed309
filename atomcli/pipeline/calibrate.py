"""Stage 1, calibration: what the parent's inputs look like, as an artifact that many recipes can use.

The parent runs over the calibration tokens block by block. Per site (linears that share an input) the energy and range
of every channel are kept, and how many tokens each expert got. An artifact is a directory: calibration.json (whose
statistics these are, and of what text), tokens.safetensors, and one statistics-00001.safetensors per block.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp

from atomcli.checkpoint.digests import sha256_file
from atomcli.checkpoint.files import read_json, write_json
from atomcli.checkpoint.tensorfile import TensorFile
from atomcli.checkpoint.writer import publish, unfinished, write_shard
from atomcli.errors import InputError, RunError, UsageError
from atomcli.models.tensors import block_name
from atomcli.pipeline.ahead import Ahead, Behind
from atomcli.pipeline.held import Held, held_on
from atomcli.pipeline.journal import LOCK, Journal, differences, opened
from atomcli.pipeline.model import Walk, start_walk
from atomcli.pipeline.passes import drop, pass_through, write_embedded
from atomcli.pipeline.progress import Progress, Silent
from atomcli.pipeline.ranks import ALONE, Ranks
from atomcli.pipeline.routing import Once, Routing, routing_of
from atomcli.pipeline.stream import AtOnce, Stream, enough_memory, run
from atomcli.recipe import Recipe
from atomcli.runtime.attention import Attention
from atomcli.runtime.decoder import build_block
from atomcli.text import calibration_windows
from atomcli.version import __version__

if TYPE_CHECKING:
    from atomcli.checkpoint.source import Source

SETTINGS = "calibration.json"
TOKENS = "tokens.safetensors"
KEYS = "keys"
_AGAIN = "Calibrate again"
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
    files: dict[str, str]

    def statistics(self, index: int) -> dict[str, Statistics]:
        """The statistics of block `index` by the name of the site; InputError when they are not what was written."""
        name, wanted = _statistics_file(index), self.files.get(_statistics_file(index))
        if wanted is not None and sha256_file(self.directory / name) != wanted:
            raise InputError(f"{self.directory / name} is damaged: its SHA-256 differs from what was written", _AGAIN)
        file = TensorFile(self.directory / _statistics_file(index))
        sites = sorted({name.split(".")[0] for name in file.entries} - {KEYS})
        fields = ("energy", "minimum", "maximum", "tokens")
        if lacking := sorted({f"{site}.{field}" for site in sites for field in fields} - file.entries.keys()):
            raise InputError(f"{file.path} lacks {lacking[0]}", "Calibrate again")
        return {site: Statistics(*(file.read(f"{site}.{field}") for field in fields)) for site in sites}

    def key_mean(self, index: int) -> Tensor:
        """The mean key of each head of block `index` after RoPE, without bias, (kv_heads, head_dim) fp32."""
        file = TensorFile(self.directory / _statistics_file(index))
        if f"{KEYS}.mean" not in file.entries:
            raise InputError(f"{file.path} lacks {KEYS}.mean, which a centered cache needs", "Calibrate again")
        return file.read(f"{KEYS}.mean")


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
    ranks: Ranks = ALONE,
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
            f"{out} holds another calibration: {'; '.join(differences(found, identity))}", "Choose another -o"
        )
    with opened(unfinished(out), identity, ranks) as journal:
        directory = journal.directory
        walk.check_small_tensors()
        if ranks.first:
            write_shard(directory, TOKENS, {"tokens": tokens})
        stream = _stream(walk, tokens, directory, len(journal.steps), held_on(walk.device))
        progress.begin("calibrate", walk.blocks)
        progress.advance(len(journal.steps))
        with ThreadPoolExecutor(2, "atom") as pool, journal.same_threads():
            ahead, behind = Ahead(walk, pool, stream.held), Behind(pool)
            try:
                done = len(journal.steps)
                if done == 0 or (journal.restarted and done < walk.blocks):
                    stream = _again(walk, tokens, stream, done, ranks)
                for index in range(done, walk.blocks):
                    with enough_memory(f"calibrate {block_name(index)}"):
                        after, found = _calibrate_block(walk, index, ahead.take(index), stream, ranks)
                    behind.write(partial(_publish_block, source, journal, index, (stream, after), found, ranks))
                    stream = after
                    progress.advance(index + 1)
                behind.settle()
            except BaseException:
                ranks.stopping.set()
                raise
        progress.end()
        if ranks.first:
            files = {step["file"]: step["sha256"] for step in journal.steps}
            write_json(directory / SETTINGS, {"identity": identity, "model": source.name, "files": files})
            for path in directory.iterdir():
                if path.suffix in (".stream", ".tmp") or path.name == LOCK:
                    path.unlink()
            with journal.aside():
                publish(directory, out)
        ranks.wait()
    return open_calibration(out, source)


def open_calibration(directory: Path, source: Source) -> Calibration:
    """A finished artifact for `source`; InputError when it is none, is damaged, or belongs to another model."""
    if not (directory / SETTINGS).is_file():
        unfinished_one = unfinished(directory).is_dir()
        raise InputError(
            f"{directory} is no {'finished ' if unfinished_one else ''}calibration: it holds no {SETTINGS}",
            "Make one with `atom calibrate MODEL -o DIR`",
        )
    settings = read_json(directory / SETTINGS)
    identity = settings.get("identity")
    if not isinstance(identity, dict) or not isinstance(identity.get("calibration"), dict):
        raise InputError(f"{directory / SETTINGS} is damaged: it doesn't say what was calibrated", "Calibrate again")
    if identity.get("model") != source.fingerprint():
        raise InputError(
            f"{directory} was calibrated on another model ({settings.get('model')}), not on {source.name}",
            f"Make one with `atom calibrate {source.name} -o DIR`",
        )
    tokens = TensorFile(directory / TOKENS).read("tokens")
    if tokens_digest(tokens) != identity.get("tokens"):
        raise InputError(f"{directory / TOKENS} is damaged", "Calibrate again")
    files = settings.get("files")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{directory / SETTINGS} is damaged: it has no digests of the statistics", _AGAIN)
    return Calibration(directory, identity, tokens, files)


def _stream(walk: Walk, tokens: Tensor, directory: Path, index: int, held: Held | None) -> Stream:
    """The generation of the parent's stream that goes into block `index`."""
    shape = (tokens.shape[0], tokens.shape[1], walk.config.hidden_size)
    return Stream(directory / f"parent-{index:05d}.stream", shape, walk.source.dtype, held=held)


def _again(walk: Walk, tokens: Tensor, stream: Stream, done: int, ranks: Ranks) -> Stream:
    """The stream into block `done`, from the embedding on, for the file may be lost."""
    stream = stream.at(stream.path.with_name("parent-00000.stream"))
    write_embedded(walk, tokens, stream, [rows for rows, _ in ranks.rounds(tokens.shape[0])])
    for index in range(done):
        after = stream.at(stream.path.with_name(f"parent-{index + 1:05d}.stream"))
        block = build_block(walk.family, walk.config, index, walk.read(index))
        pass_through(walk, block, index, stream, after, AtOnce(walk.sequences_at_once(stream.shape[1])), ranks)
        drop(stream, ranks)
        stream = after
    return stream


def _calibrate_block(
    walk: Walk, index: int, tensors: dict[str, Tensor], stream: Stream, ranks: Ranks
) -> tuple[Stream, dict[str, Tensor]]:
    """Run one block of the parent; returns the stream after it and its statistics, whole on the first process."""
    block = build_block(walk.family, walk.config, index, tensors)
    after = stream.at(stream.path.with_name(f"parent-{index + 1:05d}.stream"))
    at_once = AtOnce(walk.sequences_at_once(stream.shape[1]))
    attention = block.self_attn
    assert isinstance(attention, Attention)
    keys = _KeyMean(walk.config.num_key_value_heads, attention.head_dim, walk.device)
    with _collecting(walk, block, index) as (collectors, routing):
        attention.key_observer = _counted(keys, Once(routing, None))
        for rows, active in ranks.rounds(stream.shape[0]):
            routing.again(rows.start)
            outputs = run(stream.part(rows), at_once, lambda chunk: walk.forward(block, index, chunk), routing.again)
            after.part(rows).write(outputs, block_name(index), sync=False)
            for collector in collectors.values():
                collector.fold(ranks, active)
            keys.fold(ranks, active)
    found = {f"{KEYS}.mean": keys.result(stream.shape[0] * stream.shape[1])}
    for site, collector in collectors.items():
        found |= {f"{site}.{field}": value for field, value in collector.result(ranks).items()}
    return after, found


def _publish_block(
    source: Source,
    journal: Journal,
    index: int,
    streams: tuple[Stream, Stream],
    statistics: dict[str, Tensor],
    ranks: Ranks,
) -> None:
    """Put a block's statistics and the stream after it on disk and into the journal."""
    before, after = streams
    before.settle()
    after.settle()
    ranks.arrive(f"calibrated-{index}")
    if not ranks.first:
        return
    record = write_shard(journal.directory, _statistics_file(index), statistics)
    ranks.await_all(f"calibrated-{index}")
    if source.fingerprint() != journal.identity["model"]:
        raise InputError(f"{source.name} changed while it was read", f"Delete {journal.directory} and run again")
    journal.publish({"block": index, "file": record.file, "sha256": record.sha256})
    before.remove()


class _Collector:
    """Accumulates the statistics of one site over chunks, and over the experts that share it."""

    def __init__(self, channels: int, experts: int, device: torch.device) -> None:
        self.energy = torch.zeros(channels, dtype=torch.float64, device=device)
        self._part = torch.zeros_like(self.energy)  # of the sequences since the last fold
        self.minimum = torch.full((channels,), torch.inf, device=device)
        self.maximum = torch.full((channels,), -torch.inf, device=device)
        self.tokens = torch.zeros(experts, dtype=torch.int64)

    def add(self, x: Tensor, expert: int) -> None:
        """Inputs (n, channels) of one expert, or of the only linears there are (expert 0)."""
        x = x.float()
        energy = x.square().sum(dim=0, dtype=torch.float64)
        low, high = x.amin(dim=0), x.amax(dim=0)  # torch.aminmax is ten times slower along the rows of a CPU
        self._part += energy
        torch.minimum(self.minimum, low, out=self.minimum)
        torch.maximum(self.maximum, high, out=self.maximum)
        self.tokens[expert] += x.shape[0]

    def fold(self, ranks: Ranks, active: int) -> None:
        """Add the energies of a round to those of the rounds before, on the first process."""
        ranks.fold(self.energy if ranks.first else None, self._part, 0, active)
        self._part.zero_()

    def result(self, ranks: Ranks) -> dict[str, Tensor]:
        """The statistics over all processes; those of the first process are whole."""
        if not bool(torch.isfinite(self.energy).all()):
            raise RunError("The energy of a layer's input is not finite", "The model overflows on the calibration text")
        tokens = ranks.reduce(self.tokens)
        minimum, maximum = ranks.reduce(self.minimum, ReduceOp.MIN), ranks.reduce(self.maximum, ReduceOp.MAX)
        seen = bool(tokens.sum() > 0)
        return {
            "energy": self.energy.cpu(),
            "minimum": (minimum if seen else torch.zeros_like(minimum)).cpu(),
            "maximum": (maximum if seen else torch.zeros_like(maximum)).cpu(),
            "tokens": tokens,
        }


class _KeyMean:
    """Accumulates the mean key of each head over chunks."""

    def __init__(self, kv_heads: int, head_dim: int, device: torch.device) -> None:
        self.total = torch.zeros(kv_heads, head_dim, dtype=torch.float64, device=device)
        self._part = torch.zeros_like(self.total)  # of the sequences since the last fold

    def add(self, keys: Tensor) -> None:
        """Keys (batch, kv_heads, tokens, head_dim)."""
        # One sequence at a time, so that the sum doesn't depend on how many go through a block at once.
        for sequence in keys:
            self._part += sequence.double().sum(dim=1)

    def fold(self, ranks: Ranks, active: int) -> None:
        """Add the sums of a round to those of the rounds before, on the first process."""
        ranks.fold(self.total if ranks.first else None, self._part, 0, active)
        self._part.zero_()

    def result(self, tokens: int) -> Tensor:
        """The mean (kv_heads, head_dim) fp32 over all `tokens`; that of the first process is whole."""
        return (self.total / tokens).float().cpu()


def _counted(keys: _KeyMean, once: Once) -> Callable[[Tensor], None]:
    """The observer of the keys (batch, kv_heads, tokens, head_dim), each sequence of which counts once."""

    def observe(seen: Tensor) -> None:
        for sequences in once.rows(seen):
            keys.add(seen[sequences])

    return observe


@contextmanager
def _collecting(walk: Walk, block: nn.Module, index: int) -> Iterator[tuple[dict[str, _Collector], Routing]]:
    """Watch the input of each site's first linear, which all linears of the site read."""
    collectors: dict[str, _Collector] = {}
    handles = []
    with routing_of(block) as routing:
        for site in walk.family.sites(walk.config, index):
            experts = walk.family.expert_count(walk.config, index) if site.expert else 1
            channels = walk.in_features(index, site.of_expert(0)[0])
            collectors[site.name] = _Collector(channels, experts, walk.device)
            for expert in range(experts):
                linear = block.get_submodule(site.of_expert(expert)[0])
                once = Once(routing, expert if site.expert else None)
                handles.append(linear.register_forward_pre_hook(_hook(collectors[site.name], expert, once)))
        try:
            yield collectors, routing
        finally:
            for handle in handles:
                handle.remove()


def _hook(collector: _Collector, expert: int, once: Once) -> Any:
    def watch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].reshape(-1, arguments[0].shape[-1])
        for rows in once.rows(x):
            collector.add(x[rows], expert)

    return watch


def _statistics_file(index: int) -> str:
    return f"statistics-{index + 1:05d}.safetensors"


def check_calibration_tokens(tokens: Tensor, walk: Walk) -> None:
    """Refuse tokens that are misshapen or that the model does not know."""
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise InputError(f"Calibration tokens have shape {list(tokens.shape)}; expected (samples, at least 2 tokens)")
    lowest, highest = (int(bound) for bound in torch.aminmax(tokens))
    if lowest < 0 or highest >= walk.config.vocab_size:
        token = min(lowest, 0) or highest
        raise InputError(
            f"The calibration text has token {token}, but {walk.source.name} knows {walk.config.vocab_size} tokens",
            "The tokenizer belongs to another model.",
        )
