"""The accuracy leaderboard: our recipes beside the peers, on one model, one calibration text and one measured text.

Every row is made and measured in a directory of its own that is named after everything the row depends on, so an
interrupted bench continues with the row it was in, and a second one with another row added measures only that row.
Peers run in their own Python; all rows are scored against the same recording of the parent by the same code.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from atomcli.benchmarks.peers import INSTALL, Peer, run_peer
from atomcli.benchmarks.report import Measure, Row, exact, mean
from atomcli.benchmarks.scores import (
    Job,
    load_recording,
    make,
    parent_perplexity,
    save_recording,
    save_tokens,
    score,
    versions,
    write,
)
from atomcli.checkpoint.directory import DirectorySource
from atomcli.checkpoint.files import read_json
from atomcli.checkpoint.source import Source
from atomcli.checkpoint.tensorfile import TensorFile
from atomcli.checkpoint.writer import finish, publish, shard_file, unfinished, write_shard
from atomcli.errors import AtomError, InputError, UsageError
from atomcli.evaluation.divergence import record
from atomcli.evaluation.scoring import Progress as Counter
from atomcli.formats.scheme import Scheme
from atomcli.models.registry import describe
from atomcli.models.tensors import account
from atomcli.overrides import override
from atomcli.pipeline.calibrate import calibrate, tokens_digest, tokens_for
from atomcli.pipeline.compress import compress
from atomcli.pipeline.progress import Progress
from atomcli.recipe import MICROSCALED, Recipe, load_recipe
from atomcli.runtime import decoder, saved
from atomcli.version import __version__

KINDS = ("W16A16", "W4A16", "W4A8", "W4A4 INT", "W4A4 FP", "W8A8", "mixed")
_BLOCK = re.compile(r"model\.layers\.(\d+)\.")
_LOG = logging.getLogger("atomcli")


# What the default leaderboard has of ours: the default of each class that peers compete in.
RECIPES = ("w4a16", "atom-w4a8", "atom-w4a4", "atom-best", "nvfp4")


class Watcher(Progress, Protocol):
    """Progress that can also count for work which reports its own steps."""

    def counter(self, stage: str, unit: str) -> Counter:
        """A callback (done, total) for one stage."""


@dataclass(frozen=True)
class Trial:
    """What all rows have in common: the parent, the text to calibrate on, what is measured, and where it is kept.

    `calibration` is a recipe whose calibration section counts for every row. windows: int64 (n, length).
    """

    source: Source
    calibration: Recipe
    windows: Tensor
    out: Path
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    group: int = 128
    device: str = "cpu"


@dataclass
class Ground:
    """The files that a trial's rows stand on, and the parent's linears: name -> (out_features, in_features)."""

    trial: Trial
    parent: Path
    tokens: Path
    recording: Path
    digest: str
    linears: Mapping[str, tuple[int, int]]
    names_on_disk: Mapping[str, str]
    _artifact: Path | None = field(default=None)

    def job(self, directory: Path, method: str) -> Job:
        """The job of one row."""
        trial = self.trial
        measured = directory / f"text-{_key(self.recording.name)}.json"
        asked = _key([_file_digest(task) for task in trial.tasks], trial.limit)
        return Job(
            method=method,
            parent=self.parent,
            tokens=self.tokens,
            recording=self.recording,
            checkpoint=directory / "checkpoint",
            made=directory / "made.json",
            text=measured,
            tasks_result=directory / f"tasks-{asked}.json",
            group=trial.group,
            seed=trial.calibration.calibration.seed,
            tasks=trial.tasks,
            limit=trial.limit,
            device=trial.device,
        )

    def artifact(self, watcher: Watcher) -> Path:
        """Our calibration of the trial's text, made when the first recipe needs it."""
        if self._artifact is None:
            self._artifact = self.trial.out / f"calibration-{self.digest[:12]}"
            calibrate(
                self.trial.source, self.trial.calibration, self._artifact, device=self.trial.device, progress=watcher
            )
        return self._artifact

    def row_directory(self, name: str, *depends_on: Any) -> Path:
        """Where a row is kept; everything that it depends on, the measured text apart, is in its name."""
        key = _key(self.trial.source.fingerprint(), self.digest, *depends_on)
        directory = self.trial.out / "rows" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-')}-{key}"
        directory.mkdir(parents=True, exist_ok=True)
        return directory


def adapt(name: str, group: int, kv_cache: str | None, calibration: Mapping[str, Any]) -> Recipe:
    """A recipe with the bench's group (where its format leaves a choice), cache and calibration text.

    Raises UsageError for what no recipe can have.
    """
    recipe = load_recipe(name)
    numbers = (recipe.weights, recipe.activations)
    chooses = any(each.group is not None and each.format not in MICROSCALED for each in numbers)
    return override(recipe, group=group if chooses else None, kv_cache=kv_cache, **calibration)


def leaderboard(
    trial: Trial,
    recipes: Mapping[str, Recipe],
    checkpoints: Sequence[Path],
    peers: Sequence[Peer],
    pythons: Mapping[str, Path],
    watcher: Watcher,
) -> list[Row]:
    """A row for the parent, each recipe, each checkpoint of atom and each peer; best of its class first.

    A row that can't be made stays, with the reason in its note. Raises InputError when parent or texts can't be read.
    """
    ground = prepare(trial, watcher)
    rows = [_parent_row(ground, watcher)]
    for name, recipe in recipes.items():
        kind = kind_of([recipe.scheme()])
        rows.append(_kept(name, "atom", kind, partial(_recipe_row, ground, name, recipe, watcher)))
    for path in checkpoints:
        rows.append(_kept(str(path), "atom", "", partial(_checkpoint_row, ground, path, watcher)))
    for peer in peers:
        rows.append(_kept(peer.method, peer.library, peer.kind, partial(_peer_row, ground, peer, pythons)))
    return sorted(rows, key=_rank)


def prepare(trial: Trial, watcher: Watcher) -> Ground:
    """The parent as a directory, the calibration tokens and the parent's recording; what is there is used again."""
    source = trial.source
    trial.out.mkdir(parents=True, exist_ok=True)
    parent = source.path if isinstance(source, DirectorySource) else _export(source, trial.out / "parent")
    tokens = tokens_for(source, trial.calibration)
    digest = tokens_digest(tokens)
    tokens_file = trial.out / f"tokens-{digest[:12]}.safetensors"
    if not tokens_file.is_file():
        save_tokens(tokens, tokens_file)
    recording = trial.out / f"recording-{_key(source.fingerprint(), tokens_digest(trial.windows))}.safetensors"
    if not recording.is_file():
        model = decoder.load_parent(source).to(trial.device)  # type: ignore[arg-type]
        save_recording(record(model, trial.windows, watcher.counter("parent", "window")), recording)
        del model
    found = account(describe(source.config), source.config, source.names(), source.shape).quantizable
    inside = {name: disk for name, disk in found.items() if _BLOCK.match(name)}
    linears = {name: (source.shape(disk)[0], source.shape(disk)[1]) for name, disk in inside.items()}
    return Ground(trial, parent, tokens_file, recording, digest, linears, inside)


def stored_bits(directory: Path, ground: Ground, code_bits: int = 4) -> float:
    """Bits per weight of all linears in the blocks, by the tensors that a directory's safetensors files hold for them.

    Scales, zero points, orders and outliers count with every bit; codes that a format keeps one in a byte (INT8
    tensors called `weight`) count `code_bits`. Raises InputError for a linear without any tensor.
    """
    size = dict.fromkeys(ground.linears, 0.0)
    owners = {name: name for name in ground.linears}
    owners |= {disk.removesuffix(".weight"): name for name, disk in ground.names_on_disk.items()}
    for path in sorted(directory.glob("*.safetensors")):
        for tensor, entry in TensorFile(path).entries.items():
            linear, _, part = tensor.rpartition(".")
            if linear in owners and part != "bias":
                bits = 8 * (entry.end - entry.start)
                unpacked = part == "weight" and entry.dtype == torch.int8
                size[owners[linear]] += bits * code_bits / 8 if unpacked else bits
    if missing := [name for name, bits in size.items() if not bits]:
        raise InputError(f"{directory} has no tensors of {missing[0]}")
    return sum(size.values()) / sum(rows * columns for rows, columns in ground.linears.values())


def kind_of(schemes: Sequence[Scheme]) -> str:
    """The class that a model competes in, by what its linears multiply: W4A8, W4A4 INT, …; mixed for several."""
    bits = {"int4": "4", "e2m1": "4", "int8": "8", "float": "16"}
    kinds = set()
    for scheme in schemes:
        kind = f"W{bits[scheme.weights.element]}A{bits[scheme.activations.element]}"
        if kind == "W4A4":
            kind += " FP" if "e2m1" in (scheme.weights.element, scheme.activations.element) else " INT"
        kinds.add(kind)
    return kinds.pop() if len(kinds) == 1 else "mixed"


def _parent_row(ground: Ground, watcher: Watcher) -> Row:
    source = ground.trial.source
    job = ground.job(ground.row_directory("parent"), "parent")
    if not job.text.is_file():
        own = parent_perplexity(load_recording(job.recording))
        write(
            job.text,
            {
                "token_perplexity": own.value,
                "token_perplexity_standard_error": own.standard_error,
                "windows": own.windows,
            },
        )
    device = ground.trial.device
    score(job, lambda: (decoder.load_parent(source).to(device), source.tokenizer()), watcher.counter)  # type: ignore[arg-type]
    bits = 8.0 * source.dtype.itemsize
    return _row(source.name, "parent", "W16A16", (bits, bits, bits), job, str(source.dtype).removeprefix("torch."))


def _recipe_row(ground: Ground, name: str, recipe: Recipe, watcher: Watcher) -> Row:
    """Compress by a recipe, on the trial's calibration text, and measure."""
    trial = ground.trial
    settings = {key: value for key, value in recipe.resolved().items() if key not in ("name", "description")}
    job = ground.job(ground.row_directory(name, __version__, settings), "recipe")

    def quantized(checkpoint: Path) -> dict[str, Any]:
        if not checkpoint.is_dir():
            artifact = ground.artifact(watcher)
            compress(trial.source, recipe, checkpoint, calibration=artifact, device=trial.device, progress=watcher)
        return {"versions": {"atom": __version__, **versions(["torch", "transformers"])}}

    make(job, quantized)
    return _own_row(ground, name, job, watcher)


def _checkpoint_row(ground: Ground, path: Path, watcher: Watcher) -> Row:
    """Measure a checkpoint of atom that is there, whatever it was calibrated on."""
    directory = ground.row_directory(path.name, _file_digest(path / "config.json"), str(path.resolve()))
    job = replace(ground.job(directory, "checkpoint"), checkpoint=path)
    make(job, lambda _: {"versions": {"atom": __version__, **versions(["torch", "transformers"])}})
    return _own_row(ground, str(path), job, watcher, "calibrated as its report says")


def _own_row(ground: Ground, name: str, job: Job, watcher: Watcher, note: str = "") -> Row:
    device = ground.trial.device
    tokenizer = ground.trial.source.tokenizer
    score(job, lambda: (decoder.load_checkpoint(job.checkpoint).to(device), tokenizer()), watcher.counter)  # type: ignore[arg-type]
    config = saved.read_config(job.checkpoint)
    plan = saved.Plan.of(config)
    schemes = {each: saved.scheme_of(entry, plan.schemes) for each, entry in plan.linears.items()}

    def activation_bits(linear: str, channels: int) -> float:
        return schemes[linear].bits_per_activation(channels) if linear in schemes else 16.0

    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bits = (
        stored_bits(job.checkpoint, ground),
        _over_inputs(ground, activation_bits),
        plan.kv_cache.bits_per_value(head),
    )
    return _row(name, "atom", kind_of([*schemes.values()]), bits, job, note)


def _peer_row(ground: Ground, peer: Peer, pythons: Mapping[str, Path]) -> Row:
    """Run a peer's driver, unless all that it would measure is there, and read its results."""
    directory = ground.row_directory(peer.name, ground.trial.group)
    job = ground.job(directory, peer.method)
    if not (job.text.is_file() and (not job.tasks or job.tasks_result.is_file())):
        if peer.library not in pythons:
            raise UsageError(
                f"No environment of {peer.library} was given",
                f"Install `{INSTALL[peer.library]}` in one of its own and add --peer-python {peer.library}=PATH",
            )
        _LOG.info("%s runs in %s", peer.name, pythons[peer.library])
        run_peer(peer, pythons[peer.library], job, directory)
    given = read_json(job.made).get("activations")

    def activation_bits(_: str, channels: int) -> float:
        if given is None:
            return 16.0
        return given["bits"] + given["scale_bits"] / (given["group"] or channels)

    bits = (stored_bits(job.checkpoint, ground), _over_inputs(ground, activation_bits), 16.0)
    return _row(peer.method, peer.library, peer.kind, bits, job)


def _over_inputs(ground: Ground, bits: Callable[[str, int], float]) -> float:
    """The mean over all linears' inputs, each channel counted once per linear that reads it."""
    total = sum(channels for _, channels in ground.linears.values())
    return sum(bits(name, channels) * channels for name, (_, channels) in ground.linears.items()) / total


def _row(name: str, by: str, kind: str, bits: tuple[float, float, float], job: Job, note: str = "") -> Row:
    """A row from the result files of a job."""
    made, text = read_json(job.made, missing_ok=True), read_json(job.text)
    tasks = read_json(job.tasks_result)["results"] if job.tasks else []
    accuracies = [result for result in tasks if result["metric"] == "acc"]
    windows = int(text["windows"])

    def measured(key: str, unit: str, factor: float = 1.0) -> Measure | None:
        if text.get(key) is None:
            return None
        return mean(text[key] * factor, _times(text.get(f"{key}_standard_error"), factor), unit, windows)

    measures: dict[str, Measure | None] = {
        "weights": exact(round(bits[0], 3), "bits"),
        "activations": exact(round(bits[1], 3), "bits"),
        "KV": exact(round(bits[2], 3), "bits"),
        "token perplexity": measured("token_perplexity", ""),
        "× parent": measured("perplexity_ratio", ""),
        "KLD": measured("mean_kld", "nats"),
        "same top token": measured("top1_agreement", "%", 100.0),
    }
    if accuracies:  # the last one is the average over the tasks
        last = accuracies[-1]
        error = _times(last["standard_error"], 100.0)
        measures["zero-shot"] = mean(100.0 * last["value"], error, "%", last["examples"])
    extra = {"made": made, "text": text, "tasks": tasks, "job": json.loads(json.dumps(asdict(job), default=str))}
    library = made.get("versions", {}).get({"atom": "atom"}.get(by, by), "")
    return Row({"class": kind, "method": name, "by": f"{by} {library}".strip()}, measures, note, extra)


def _empty(name: str, by: str, kind: str, note: str) -> Row:
    columns = ("weights", "activations", "KV", "token perplexity", "× parent", "KLD", "same top token")
    return Row({"class": kind, "method": name, "by": by}, dict.fromkeys(columns), note)


def _kept(name: str, by: str, kind: str, made: Callable[[], Row]) -> Row:
    """The row, or an empty one that says why there is none: one method's failure is not the bench's."""
    try:
        return made()
    except AtomError as error:
        _LOG.warning("%s %s: %s%s", by, name, error.what, f" ({error.hint})" if error.hint else "")
        return _empty(name, by, kind, f"Not measured: {error.what}")


def _rank(row: Row) -> tuple[int, float]:
    """Classes in the order of KINDS; within one the smallest divergence first, then what has none."""
    kind = str(row.labels["class"])
    kld = row.measures.get("KLD")
    return KINDS.index(kind) if kind in KINDS else len(KINDS), float("inf") if kld is None else kld.median


def _export(source: Source, out: Path) -> Path:
    """The parent as a directory that transformers and every peer can read, in its own dtype, one shard per block."""
    if out.is_dir():
        return out
    directory = unfinished(out)
    directory.mkdir(parents=True, exist_ok=True)
    blocks: dict[int | None, list[str]] = {}
    for name in sorted(source.names()):
        matched = _BLOCK.match(name)
        blocks.setdefault(int(matched[1]) if matched else None, []).append(name)
    source.save_companions(directory)
    shards = [
        write_shard(directory, shard_file(block), {name: source.read(name) for name in names})
        for block, names in blocks.items()
    ]
    finish(directory, shards)
    publish(directory, out)
    return out


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _file_digest(name: str | Path) -> str:
    """The contents of a file, or the name of what is none."""
    path = Path(name).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(name)


def _key(*parts: Any) -> str:
    """Twelve letters that differ when anything in `parts` does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]
