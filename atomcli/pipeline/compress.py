"""The compress road: the order of the stages, block by block, from a parent to a verified checkpoint.

A block is read, run, quantized, packed, written and let go before the next one is read; memory holds one block's
weights and its quantized copy. Each finished block is published in the journal together with the streams after it, so
the same command continues after an interruption and ends with the same bytes.
"""

from __future__ import annotations

import logging
import platform
import resource
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from atomcli.checkpoint.digests import sha256_file
from atomcli.checkpoint.directory import CONFIG
from atomcli.checkpoint.files import read_json, write_json
from atomcli.checkpoint.manifest import MANIFEST, REPORT, ShardRecord, read_report
from atomcli.checkpoint.verify import verify_checkpoint
from atomcli.checkpoint.writer import finish, publish, refuse_occupied, shard_file, unfinished, write_shard
from atomcli.errors import InputError
from atomcli.models.tensors import block_name
from atomcli.pipeline import check, pack
from atomcli.pipeline.budget import refuse_out_of_reach
from atomcli.pipeline.calibrate import (
    Calibration,
    calibrate,
    check_calibration_tokens,
    embedded,
    open_calibration,
    tokens_digest,
    tokens_for,
)
from atomcli.pipeline.journal import LOCK, Journal, beside, locked
from atomcli.pipeline.model import Walk, start_walk
from atomcli.pipeline.parameters import InputsSeen, Outcome, fold, input_ranges, quantize_block, targets, watched
from atomcli.pipeline.progress import Progress, Silent
from atomcli.pipeline.select import Plan, groups_of, load_plan, select
from atomcli.pipeline.sensitivities import sensitivities_of
from atomcli.pipeline.stream import Stream, run
from atomcli.recipe import Recipe
from atomcli.runtime.decoder import build_block, empty_block, read_outer
from atomcli.version import __version__

if TYPE_CHECKING:
    from atomcli.checkpoint.source import Source

_LOG = logging.getLogger("atomcli")
_CALIBRATION = "calibration"
# Files that only the run itself needs; a finished checkpoint has none of them.
_SCRATCH = (".stream", ".tmp")


def compress(
    source: Source,
    recipe: Recipe,
    out: Path,
    *,
    calibration: Path | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    tokens: Tensor | None = None,
    plan_file: Path | None = None,
) -> dict[str, Any]:
    """Compress `source` by `recipe` into the directory `out`; returns the report (atom_report.json).

    `calibration` names an artifact of `calibrate`, whose text then counts; without one the road calibrates itself, with
    the same result. `tokens` (samples, sequence_length) take the place of the recipe's text. A plan in `plan_file`, of
    the same model and recipe, takes the place of the recipe's selection. An interrupted run is
    continued; `overwrite` lets a finished checkpoint be replaced and a run of another recipe be dropped.
    Raises UsageError, InputError, UnsupportedError before anything is spent, RunError when the run fails.
    """
    progress = progress or Silent()
    _refuse(out, overwrite)
    walk = start_walk(source, device)
    plan = _plan_in_advance(plan_file, recipe, walk)
    for index in range(walk.blocks):
        empty_block(walk.family, walk.config, index, recipe.kv_cache.to_format())  # refuses a cache it can't have
    artifact = open_calibration(calibration, source) if calibration is not None else None
    if artifact is not None:
        recipe = _with_text_of(artifact, recipe)
        tokens = artifact.tokens
    elif tokens is None:
        tokens = tokens_for(source, recipe)
    check_calibration_tokens(tokens, walk)
    directory = unfinished(out)
    with locked(directory):
        journal = Journal.open(directory, _identity(walk, recipe, tokens, plan_file), restart=overwrite)
        if (directory / REPORT).is_file():  # written last, after the proof: only the name is missing
            verify_checkpoint(directory)
            report = read_report(directory)
        else:
            report = _work(walk, recipe, plan, artifact, tokens, journal, progress)
        _publish(journal, out, overwrite)
    return report


def _work(
    walk: Walk,
    recipe: Recipe,
    plan: Plan | None,
    artifact: Calibration | None,
    tokens: Tensor,
    journal: Journal,
    progress: Progress,
) -> dict[str, Any]:
    """All stages that the journal's directory still lacks; returns the report."""
    directory = journal.directory
    if journal.steps:
        _LOG.info("continuing after block %d of %d", len(journal.steps), walk.blocks)
        _check_shards(directory, journal)
    with journal.same_threads():
        if artifact is None:
            artifact = calibrate(
                walk.source, recipe, directory / _CALIBRATION, device=walk.device, progress=progress, tokens=tokens
            )
        if plan is None:
            found = sensitivities_of(walk, recipe, artifact, groups_of(recipe, walk), progress)
            plan = select(recipe, walk, found)
        road = _Road(walk, recipe, plan, artifact, directory)
        progress.begin("quantize", walk.blocks)
        progress.advance(len(journal.steps))
        for index in range(len(journal.steps), walk.blocks):
            journal.publish(road.block(index))
            road.drop(index)
            progress.advance(index + 1, f"error {_mean_error(journal.steps[-1]):.4f}")
        progress.begin("verify", 1, "checkpoint")
        report = _finish(road, journal, directory)
        progress.advance(1)
        progress.end()
    return report


def _plan_in_advance(plan_file: Path | None, recipe: Recipe, walk: Walk) -> Plan | None:
    """The plan, where it needs no sensitivities; what can be refused without them is refused now."""
    if plan_file is not None:
        return load_plan(plan_file, recipe, walk)
    if recipe.select is None:
        return select(recipe, walk)
    refuse_out_of_reach(recipe, walk, groups_of(recipe, walk))
    return None


class _Streams:
    """The three streams between two blocks: calibration sequences on the quantized model, and the proof's two."""

    def __init__(self, walk: Walk, directory: Path, index: int, tokens: Tensor) -> None:
        proof = check.check_tokens(tokens)
        hidden = int(walk.config.hidden_size)

        def stream(name: str, like: Tensor) -> Stream:
            path = directory / f"{name}-{index:05d}.stream"
            return Stream(path, (like.shape[0], like.shape[1], hidden), walk.source.dtype)

        self.calibration = stream("calibration", tokens)
        self.parent = stream("parent", proof)
        self.checkpoint = stream("checkpoint", proof)

    def remove(self) -> None:
        for stream in (self.calibration, self.parent, self.checkpoint):
            stream.path.unlink(missing_ok=True)


class _Road:
    """What every block of one run needs."""

    def __init__(self, walk: Walk, recipe: Recipe, plan: Plan, artifact: Calibration, directory: Path) -> None:
        self.walk, self.recipe, self.plan = walk, recipe, plan
        self.artifact, self.directory, self.tokens = artifact, directory, artifact.tokens
        self.names = plan.names()
        # Rounding to nearest needs no Hessians, hence no calibration sequences on the quantized model.
        self.with_hessians = recipe.weights.rounding == "gptq"

    def streams(self, index: int) -> _Streams:
        """The streams that go into block `index`."""
        return _Streams(self.walk, self.directory, index, self.tokens)

    def block(self, index: int) -> dict[str, Any]:
        """Quantize block `index`: its shard and the streams after it are on disk when this returns its journal step."""
        started = time.monotonic()
        walk, before, after = self.walk, self.streams(index), self.streams(index + 1)
        if index == 0:
            self._embed(before)
        tensors = walk.read(index)
        parent = build_block(walk.family, walk.config, index, tensors)
        check.advance(walk, parent, index, before.parent, after.parent)
        del parent
        statistics = self.artifact.statistics(index)
        tensors, energies = fold(tensors, walk, index, self.plan, statistics, self.recipe.order)
        block = build_block(walk.family, walk.config, index, tensors, self.recipe.kv_cache.to_format())
        del tensors
        outcomes = self._quantize(block, index, energies, before)
        at_once = walk.sequences_at_once(self.tokens.shape[1])
        if self.with_hessians and index + 1 < walk.blocks:
            outputs = run(before.calibration, at_once, lambda chunk: walk.forward(block, index, chunk))
            after.calibration.write(outputs, block_name(index))
        check.advance(walk, block, index, before.checkpoint, after.checkpoint)
        record = write_shard(self.directory, shard_file(index), pack.block_tensors(block, index))
        return {
            "block": index,
            "shard": record.to_dict(),
            "linears": pack.linear_entries(block, index, self.names),
            "layers": pack.report_rows(block, index, outcomes, self.names, input_ranges(walk, index, statistics)),
            "seconds": time.monotonic() - started,
        }

    def _quantize(
        self, block: torch.nn.Module, index: int, energies: dict[str, Tensor], before: _Streams
    ) -> list[Outcome]:
        walk = self.walk
        found = targets(walk, index, self.plan, energies, self.recipe.transform_seed, self.recipe.order)
        if not self.with_hessians or not found:
            return quantize_block(block, index, found, None, self.recipe)
        with watched(block, found, walk.device, self.recipe.weights.token_weights) as hessians:
            at_once = walk.sequences_at_once(self.tokens.shape[1])
            with torch.inference_mode():
                for chunk in before.calibration.chunks(at_once):
                    with suppress(InputsSeen):
                        walk.forward(block, index, chunk)
        starved = sum(each.tokens < target.layout.in_features for target, each in zip(found, hessians, strict=True))
        if starved:
            _LOG.warning(
                "%s: %d of %d inputs saw fewer tokens than they have channels; more samples would help",
                block_name(index),
                starved,
                len(found),
            )
        return quantize_block(block, index, found, hessians, self.recipe)

    def _embed(self, streams: _Streams) -> None:
        if self.with_hessians:
            streams.calibration.write(embedded(self.walk, self.tokens), "the embedding")
        proof = check.check_tokens(self.tokens)
        streams.parent.write(embedded(self.walk, proof), "the embedding")
        streams.checkpoint.write(embedded(self.walk, proof), "the embedding")

    def drop(self, index: int) -> None:
        """The streams before a published block are not needed again."""
        self.streams(index).remove()


def _finish(road: _Road, journal: Journal, directory: Path) -> dict[str, Any]:
    """Everything outside the blocks: outer shard, config, tokenizer, index, report; then the proof."""
    walk, streams = road.walk, road.streams(road.walk.blocks)
    outer = read_outer(walk.family, walk.source)
    tensors = dict(outer.state_dict())
    if walk.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    shards = [ShardRecord.from_dict(step["shard"]) for step in journal.steps]
    shards.append(write_shard(directory, shard_file(None), tensors))
    expected = check.divergence(outer.to(walk.device), streams.parent, streams.checkpoint, walk.device)
    del outer, tensors
    walk.source.save_companions(directory)
    linears = {name: entry for step in journal.steps for name, entry in step["linears"].items()}
    config = read_json(directory / CONFIG)
    config["quantization_config"] = pack.quantization_config(
        road.names, linears, road.recipe.kv_cache.to_format(), road.plan.kept()
    )
    write_json(directory / CONFIG, config)
    finish(directory, shards)
    proof = check.check_tokens(road.tokens)
    found = check.verify(directory, walk, proof, streams.parent, streams.checkpoint, expected)
    report = _report(road, journal, found)
    write_json(directory / REPORT, report)
    return report


def _report(road: _Road, journal: Journal, proof: check.Divergence) -> dict[str, Any]:
    source, layers = road.walk.source, [row for step in journal.steps for row in step["layers"]]
    parameters = sum(row["parameters"] for row in layers)
    return {
        "version": 1,
        "parent": {
            "name": source.name,
            "fingerprint": source.fingerprint(),
            "architecture": (source.config.architectures or [source.config.model_type])[0],
            "dtype": str(source.dtype).removeprefix("torch."),
        },
        "recipe": road.recipe.resolved(),
        "calibration": {
            "samples": road.tokens.shape[0],
            "sequence_length": road.tokens.shape[1],
            "tokens": tokens_digest(road.tokens),
        },
        "seed": road.recipe.calibration.seed,
        "bits_per_weight": 8 * sum(row["bytes"] for row in layers) / max(1, parameters),
        "layers": layers,
        "kept": road.plan.kept(),
        "plan": road.plan.prediction,
        "proof": asdict(proof),
        "versions": {
            "atom": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": str(road.walk.device),
        "timings": {
            "blocks": [step["seconds"] for step in journal.steps],
            "peak_memory_bytes": _peak_memory(),
        },
    }


def _identity(walk: Walk, recipe: Recipe, tokens: Tensor, plan_file: Path | None) -> dict[str, Any]:
    """What the result depends on, bit for bit."""
    return {
        "plan": None if plan_file is None else sha256_file(plan_file),
        "atom": __version__,
        "torch": torch.__version__,
        "device": walk.device.type,
        "model": walk.source.fingerprint(),
        "recipe": recipe.resolved(),
        "tokens": tokens_digest(tokens),
    }


def _with_text_of(artifact: Calibration, recipe: Recipe) -> Recipe:
    """The recipe as it counts with an artifact: the artifact's text, not the recipe's."""
    settings = artifact.identity["calibration"]
    if settings != recipe.calibration.model_dump(mode="json"):
        _LOG.warning(
            "the calibration in %s counts, not the recipe's: %s sequences of %s tokens of %s, seed %s",
            artifact.directory,
            *(settings[key] for key in ("samples", "sequence_length", "dataset", "seed")),
        )
    return Recipe.model_validate(recipe.resolved() | {"calibration": settings})


def _refuse(out: Path, overwrite: bool) -> None:
    if not (overwrite and (out / MANIFEST).is_file()):
        refuse_occupied(out)


def _publish(journal: Journal, out: Path, overwrite: bool) -> None:
    """Rename the finished directory to its final name; a checkpoint it replaces is moved aside first, then deleted.

    Whatever only the run needed goes first, the journal last: interrupted anywhere in here, a run goes on here.
    """
    directory = journal.directory
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name in (LOCK, beside(unfinished(directory / _CALIBRATION)).name) or path.suffix in _SCRATCH:
            path.unlink()
    replaced = out.with_name(f"{out.name}.replaced")
    with journal.aside():
        if overwrite and (out / MANIFEST).is_file():
            shutil.rmtree(replaced, ignore_errors=True)
            out.rename(replaced)
        publish(directory, out)
    shutil.rmtree(replaced, ignore_errors=True)


def _check_shards(directory: Path, journal: Journal) -> None:
    """The shards of an interrupted run must be what the journal says; InputError otherwise."""
    for step in journal.steps:
        record = ShardRecord.from_dict(step["shard"])
        path = directory / record.file
        if not path.is_file() or path.stat().st_size != record.bytes or sha256_file(path) != record.sha256:
            raise InputError(
                f"{path} is not what the journal of the interrupted run says",
                f"delete {directory} and run the same command again",
            )


def _mean_error(step: dict[str, Any]) -> float:
    rows = step["layers"]
    return sum(row["error"] for row in rows) / len(rows) if rows else 0.0


def _peak_memory() -> int:
    """The most memory this process ever held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
