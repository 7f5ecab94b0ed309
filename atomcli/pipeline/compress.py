"""The compress road: the order of the stages, block by block, from a parent to a verified checkpoint.

Each finished block is published in the journal together with the streams after it (see `road`), so the same command
continues after an interruption and ends with the same bytes, on however many processes.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atomcli.checkpoint.digests import sha256_file
from atomcli.checkpoint.manifest import MANIFEST, REPORT, ShardRecord, read_report
from atomcli.checkpoint.verify import verify_checkpoint
from atomcli.checkpoint.writer import publish, refuse_occupied, unfinished
from atomcli.errors import InputError
from atomcli.pipeline.budget import refuse_out_of_reach
from atomcli.pipeline.calibrate import (
    Calibration,
    calibrate,
    check_calibration_tokens,
    open_calibration,
    tokens_digest,
    tokens_for,
)
from atomcli.pipeline.finish import write_rest
from atomcli.pipeline.journal import LOCK, Journal, beside, opened
from atomcli.pipeline.model import Walk, start_walk
from atomcli.pipeline.progress import Progress, Silent
from atomcli.pipeline.ranks import ALONE, Ranks
from atomcli.pipeline.road import Road
from atomcli.pipeline.select import Plan, groups_of, load_plan, select
from atomcli.pipeline.sensitivities import sensitivities_of
from atomcli.recipe import Recipe
from atomcli.runtime.decoder import empty_block
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
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Compress `source` by `recipe` into the directory `out`; returns the report (atom_report.json).

    `calibration` names an artifact of `calibrate`, whose text then counts; without one the road calibrates itself, with
    the same result. `tokens` (samples, sequence_length) take the place of the recipe's text. A plan in `plan_file`, of
    the same model and recipe, takes the place of the recipe's selection. An interrupted run is
    continued; `overwrite` lets a finished checkpoint be replaced and a run of another recipe be dropped.
    `ranks` are the processes that share the work, all of which call this.
    Raises UsageError, InputError, UnsupportedError before anything is spent, RunError when the run fails.
    """
    progress = progress or Silent()
    _refuse(out, overwrite)
    walk = start_walk(source, device)
    plan = _plan_in_advance(plan_file, recipe, walk)
    for index in range(walk.blocks):
        empty_block(walk.family, walk.config, index, recipe.kv_cache.to_format(index))  # refuses a cache it can't have
    artifact = open_calibration(calibration, source) if calibration is not None else None
    if artifact is not None:
        recipe = _with_text_of(artifact, recipe)
        tokens = artifact.tokens
    elif tokens is None:
        tokens = tokens_for(source, recipe)
    check_calibration_tokens(tokens, walk)
    walk.check_small_tensors()
    if ranks.first:
        source.fingerprint()  # remembered, so that processes of one host hash a model once
    ranks.wait()
    with opened(unfinished(out), _identity(walk, recipe, tokens, plan_file), ranks, restart=overwrite) as journal:
        report = None
        if not (journal.directory / REPORT).is_file():
            report = _work(walk, recipe, plan, artifact, tokens, journal, progress, ranks)
        elif ranks.first:  # written last, after the proof: only the name is missing
            verify_checkpoint(journal.directory)
            report = read_report(journal.directory)
        if ranks.first:
            _publish(journal, out, overwrite)
        report = ranks.tell(report)
    assert report is not None
    return report


def _work(
    walk: Walk,
    recipe: Recipe,
    plan: Plan | None,
    artifact: Calibration | None,
    tokens: Tensor,
    journal: Journal,
    progress: Progress,
    ranks: Ranks,
) -> dict[str, Any] | None:
    """All stages that the journal's directory still lacks; returns the report, to the first process."""
    directory = journal.directory
    if journal.steps:
        _LOG.info("continuing after block %d of %d", len(journal.steps), walk.blocks)
        if ranks.first:
            _check_shards(directory, journal)
    with journal.same_threads():
        if artifact is None:
            artifact = calibrate(
                walk.source,
                recipe,
                directory / _CALIBRATION,
                device=walk.device,
                progress=progress,
                tokens=tokens,
                ranks=ranks,
            )
        if plan is None:
            plan = _selected(walk, recipe, artifact, progress, ranks)
        road = Road(walk, recipe, plan, artifact, directory, ranks)
        done = len(journal.steps)
        progress.begin("quantize", walk.blocks)
        progress.advance(done)
        if journal.restarted and 0 < done < walk.blocks and road.with_hessians:
            road.restore(journal.steps)
        with road.working():
            for index in range(done, walk.blocks):
                step = road.block(index, journal)
                progress.advance(index + 1, f"error {_mean_error(step):.4f}")
        progress.begin("verify", walk.blocks)
        report = write_rest(road, journal, progress) if ranks.first else None
        progress.advance(walk.blocks)
        progress.end()
    return report


def _selected(walk: Walk, recipe: Recipe, artifact: Calibration, progress: Progress, ranks: Ranks) -> Plan:
    """The plan of a recipe with a budget; the first process measures what the others then find in the artifact."""
    if not ranks.first:
        ranks.wait()
    plan = select(recipe, walk, sensitivities_of(walk, recipe, artifact, groups_of(recipe, walk), progress))
    if ranks.first:
        ranks.wait()
    return plan


def _plan_in_advance(plan_file: Path | None, recipe: Recipe, walk: Walk) -> Plan | None:
    """The plan, where it needs no sensitivities; what can be refused without them is refused now."""
    if plan_file is not None:
        return load_plan(plan_file, recipe, walk)
    if recipe.select is None:
        return select(recipe, walk)
    refuse_out_of_reach(recipe, walk, groups_of(recipe, walk))
    return None


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
                f"Delete {directory} and run the same command again",
            )


def _mean_error(step: dict[str, Any]) -> float:
    rows = step["layers"]
    return sum(row["error"] for row in rows) / len(rows) if rows else 0.0
