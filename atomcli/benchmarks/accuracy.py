"""The accuracy leaderboard: our recipes beside the peers, on one model, one calibration text and one measured text.

Every row is made and measured in a directory of its own that is named after everything the row depends on, so an
interrupted bench continues with the row it was in, and a second one with another row added measures only that row.
Peers run in their own Python; all rows are scored against the same recording of the parent by the same code.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from atomcli.benchmarks.peers import INSTALL, Peer, run_peer
from atomcli.benchmarks.report import Measure, Row, exact, mean
from atomcli.benchmarks.scores import (
    Job,
    load_recording,
    make,
    parent_perplexity,
    score,
    versions,
    write,
)
from atomcli.benchmarks.trial import Ground, Trial, Watcher, file_digest, prepare, stored_bits
from atomcli.checkpoint.files import read_json
from atomcli.errors import AtomError, UsageError
from atomcli.formats.scheme import Scheme
from atomcli.overrides import override
from atomcli.pipeline.compress import compress
from atomcli.recipe import MICROSCALED, Recipe, load_recipe
from atomcli.runtime import decoder, saved
from atomcli.version import __version__

KINDS = ("W16A16", "W4A16", "W4A8", "W4A4 INT", "W4A4 FP", "W8A8", "mixed")
_LOG = logging.getLogger("atomcli")

# What the default leaderboard has of ours: the default of each class that peers compete in.
RECIPES = ("w4a16", "atom-w4a8", "atom-w4a8-o0", "atom-w4a4", "atom-best", "nvfp4")


def choose_recipes(names: Sequence[str] | None) -> Sequence[str]:
    """Our recipes of these names or files; those of the classes for None, none for `none`."""
    return RECIPES if names is None else [] if names == ["none"] else names


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
    directory = ground.row_directory(path.name, file_digest(path / "config.json"), str(path.resolve()))
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
    cache = [plan.cache_of(index).bits_per_value(head) for index in range(config.num_hidden_layers)]
    bits = (stored_bits(job.checkpoint, ground), _over_inputs(ground, activation_bits), sum(cache) / len(cache))
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


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
