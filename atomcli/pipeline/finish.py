"""The end of the compress road: everything outside the blocks, the proof, and the report."""

from __future__ import annotations

import platform
import resource
import sys
from dataclasses import asdict
from typing import Any

import torch
import transformers

from atomcli.checkpoint.card import CARD, base_model, checkpoint_card
from atomcli.checkpoint.directory import CONFIG
from atomcli.checkpoint.files import read_json, write_json, write_text
from atomcli.checkpoint.manifest import REPORT, ShardRecord
from atomcli.checkpoint.writer import finish, shard_file, write_shard
from atomcli.pipeline import check, pack
from atomcli.pipeline.calibrate import tokens_digest
from atomcli.pipeline.journal import Journal
from atomcli.pipeline.progress import Progress
from atomcli.pipeline.road import Road
from atomcli.runtime.decoder import read_outer
from atomcli.version import __version__


def write_rest(road: Road, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Everything outside the blocks: outer shard, config, tokenizer, index, report; then the proof, block by block."""
    walk, directory, streams = road.walk, journal.directory, road.streams(road.walk.blocks)
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
        road.names, linears, road.recipe.kv_cache.to_format(), road.plan.cache, road.plan.kept()
    )
    write_json(directory / CONFIG, config)
    report = _report(road, journal, expected)
    size = {"bytes": sum(shard.bytes for shard in shards), "bits_per_weight": report["bits_per_weight"]}
    told = {key: report[key] for key in ("parent", "recipe", "calibration", "proof")}
    write_text(directory / CARD, checkpoint_card(quantization=config["quantization_config"], size=size, **told))
    finish(directory, shards)
    proof = check.check_tokens(road.tokens)
    found = check.verify(directory, walk, proof, streams.parent, streams.checkpoint, expected, progress)
    report |= {"proof": asdict(found), "timings": _timings(journal)}
    write_json(directory / REPORT, report)
    return report


def _report(road: Road, journal: Journal, proof: check.Divergence) -> dict[str, Any]:
    source, layers = road.walk.source, [row for step in journal.steps for row in step["layers"]]
    parameters = sum(row["parameters"] for row in layers)
    return {
        "version": 1,
        "parent": {
            "name": source.name,
            "base_model": base_model(source.name),
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
    }


def _timings(journal: Journal) -> dict[str, Any]:
    return {"blocks": [step["seconds"] for step in journal.steps], "peak_memory_bytes": _peak_memory()}


def _peak_memory() -> int:
    """The most memory this process ever held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
