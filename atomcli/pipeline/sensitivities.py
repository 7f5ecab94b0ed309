"""The sensitivities of a model, measured once and kept in the calibration artifact.

The parent runs block by block over a few calibration sequences, in fp32. In each block every group of linears is
quantized alone by its reference scheme, and the stream that this gives is carried to the end beside the parent's: its
divergence there is what the group costs. Beside them run a stream with the quantized cache alone and one with
everything quantized at once. The other candidates are only compared by the error of their outputs (see
`algorithms.sensitivity`). The work is that of 4 · blocks / 2 passes over 512 tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atomcli.algorithms.gptq import error_factor
from atomcli.algorithms.rounding import round_to_nearest, unrounded
from atomcli.algorithms.sensitivity import Inputs, Sensitivities, Sensitivity, in_layout, output_errors
from atomcli.algorithms.together import compensate
from atomcli.checkpoint.files import read_json, write_json
from atomcli.errors import InputError
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import Scheme
from atomcli.models.block import Site
from atomcli.pipeline.calibrate import Calibration
from atomcli.pipeline.check import check_tokens
from atomcli.pipeline.hessians import Hessian, linear_in
from atomcli.pipeline.journal import clear, locked
from atomcli.pipeline.model import Walk, full_name
from atomcli.pipeline.parameters import cache_tensors, site_layout
from atomcli.pipeline.progress import Progress, Silent
from atomcli.pipeline.residual import residual_weights
from atomcli.pipeline.select import Group
from atomcli.pipeline.stream import Stream, run
from atomcli.recipe import Recipe
from atomcli.runtime.decoder import build_block, embed, logits, quantize_linear, read_outer
from atomcli.runtime.linear import QuantLinear
from atomcli.version import __version__

# Hessians take in at least this many tokens for each channel of the widest input.
_TOKENS_PER_CHANNEL = 2
_ROWS = 128
_LOG = logging.getLogger("atomcli")


def sensitivities_of(
    walk: Walk, recipe: Recipe, artifact: Calibration, groups: Sequence[Group], progress: Progress | None = None
) -> Sensitivities:
    """The sensitivities of the groups: from the artifact when it has them, else measured and saved there.

    Raises InputError when the saved ones are damaged or belong to something else.
    """
    identity = _identity(recipe, artifact, groups)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = artifact.directory / f"sensitivities-{digest[:16]}.json"
    if path.is_file():
        return _read(path, identity)
    scratch = artifact.directory / "sensitivities.unfinished"
    with locked(scratch):
        clear(scratch)
        found = _measure(walk, recipe, artifact, groups, scratch, progress or Silent())
        shutil.rmtree(scratch)
    write_json(path, {"identity": identity, "sensitivities": asdict(found)})
    return found


def _identity(recipe: Recipe, artifact: Calibration, groups: Sequence[Group]) -> dict[str, Any]:
    """What the sensitivities depend on; the artifact's identity names the model and the text."""
    candidates = {
        group.title: {name: None if scheme is None else scheme.to_dict() for name, scheme in group.candidates.items()}
        for group in groups
    }
    return {
        "atom": __version__,
        "artifact": artifact.identity,
        "weights": {
            key: getattr(recipe.weights, key) for key in ("rounding", "clip", "damping", "damping_rule", "sweeps")
        },
        "transform_seed": recipe.transform_seed,
        "order": recipe.order,
        "kv_cache": recipe.kv_cache.model_dump(mode="json"),
        "candidates": hashlib.sha256(json.dumps(candidates).encode()).hexdigest(),
    }


def _read(path: Path, identity: dict[str, Any]) -> Sensitivities:
    data = read_json(path)
    try:
        if data["identity"] != identity:
            raise InputError(f"{path} holds the sensitivities of another model or recipe", "Delete it to measure again")
        saved = data["sensitivities"]
        groups = tuple(Sensitivity(**each) for each in saved["groups"])
        return Sensitivities(groups, saved["cache_kld"], saved["joint_kld"], tuple(saved["caches"]))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}", "Delete it to measure again") from error


class _Streams:
    """What goes into a block, fp32: sequences for the Hessians, the proof's, and those that a scheme has changed."""

    def __init__(self, directory: Path, index: int, samples: Tensor, proof: Tensor, hidden: int, groups: int) -> None:
        def stream(name: str, sequences: int, tokens: int) -> Stream:
            path = directory / f"{name}-{index:05d}.stream"
            return Stream(path, (sequences, tokens, hidden), torch.float32)

        self.samples = stream("samples", *samples.shape)
        self.parent = stream("parent", *proof.shape)
        self.cache = stream("cache", *proof.shape)
        self.joint = stream("joint", *proof.shape)
        self.groups = stream("groups", groups * proof.shape[0], proof.shape[1])

    def remove(self) -> None:
        for stream in vars(self).values():
            stream.path.unlink(missing_ok=True)


def _measure(
    walk: Walk, recipe: Recipe, artifact: Calibration, groups: Sequence[Group], scratch: Path, progress: Progress
) -> Sensitivities:
    samples, proof = _samples(walk, artifact.tokens), check_tokens(artifact.tokens)
    hidden = int(walk.config.hidden_size)
    caches = recipe.kv_cache.to_format().element != "float"
    alone = [
        (index, title)
        for index in range(walk.blocks)
        for title in (*(g.title for g in groups if g.index == index and g.reference is not None), *[None] * caches)
    ]

    def streams(index: int) -> _Streams:
        done = sum(block < index for block, _ in alone)
        return _Streams(scratch, index, samples, proof, hidden, done)

    before = streams(0)
    outer = read_outer(walk.family, walk.source).float()
    with torch.inference_mode():
        for stream, tokens in ((before.samples, samples), (before.parent, proof)):
            stream.write((embed(outer, sequence[None]) for sequence in tokens), "the embedding")
        for stream in (before.cache, before.joint):
            shutil.copyfile(before.parent.path, stream.path)
        before.groups.write(iter(()), "nothing")
    errors: dict[str, dict[str, float]] = {}
    progress.begin("sensitivities", walk.blocks)
    for index in range(walk.blocks):
        after = streams(index + 1)
        own = [group for group in groups if group.index == index]
        with torch.inference_mode():
            errors |= _block(walk, recipe, artifact, index, own, before, after)
        before.remove()
        before = after
        progress.advance(index + 1)
    progress.begin("divergences", 2 + len(alone), "stream")
    with torch.inference_mode():
        cache, joint, *found = _divergences(outer.to(walk.device), walk, before, progress)
    progress.end()
    klds = {title: kld for (_, title), kld in zip(alone, found, strict=True) if title is not None}
    return Sensitivities(
        tuple(
            Sensitivity(group.title, group.reference, klds.get(group.title, 0.0), errors.get(group.title, {}))
            for group in groups
        ),
        cache,
        joint,
        tuple(kld for (_, title), kld in zip(alone, found, strict=True) if title is None),
    )


def _samples(walk: Walk, tokens: Tensor) -> Tensor:
    """The first calibration sequences, enough for Hessians of full rank where there are enough."""
    widest = max(
        walk.in_features(index, linear)
        for index in range(walk.blocks)
        for linear in walk.family.linears(walk.config, index)[-1:]
    )
    return tokens[: max(4, math.ceil(_TOKENS_PER_CHANNEL * widest / tokens.shape[1]))]


def _block(
    walk: Walk,
    recipe: Recipe,
    artifact: Calibration,
    index: int,
    groups: Sequence[Group],
    before: _Streams,
    after: _Streams,
) -> dict[str, dict[str, float]]:
    """Carry all streams through block `index`; returns the errors of its groups' candidates."""
    tensors = {name: tensor.float() for name, tensor in walk.read(index).items()}
    block = build_block(walk.family, walk.config, index, tensors)
    kv = recipe.kv_cache.to_format(index)
    cached = build_block(walk.family, walk.config, index, tensors | cache_tensors(kv, artifact, index, walk), kv)
    with _inputs(walk, block, index) as inputs:
        _advance(walk, block, index, before.samples, after.samples)
        inputs.proof = True
        _advance(walk, block, index, before.parent, after.parent)
    _advance(walk, cached, index, before.cache, after.cache)
    energies = {name: found.energy.to(walk.device) for name, found in artifact.statistics(index).items()}
    errors: dict[str, dict[str, float]] = {}
    replaced: dict[str, dict[str, QuantLinear]] = {}
    for group in groups:
        if group.reference is not None:
            judged = _Judged(recipe, block, energies, inputs, group)
            errors[group.title] = {
                name: judged.error(scheme) for name, scheme in group.candidates.items() if scheme is not None
            }
            reference = group.candidates[group.reference]
            assert reference is not None
            replaced[group.title] = judged.quantized(reference)

    def alone() -> Iterator[Tensor]:
        for linears in replaced.values():
            with _replaced(block, linears):
                yield from run(before.parent, 1, lambda chunk: walk.forward(block, index, chunk))
        if kv.element != "float":
            yield from run(before.parent, 1, lambda chunk: walk.forward(cached, index, chunk))

    at_once = walk.sequences_at_once(before.groups.shape[1])
    carried = run(before.groups, at_once, lambda chunk: walk.forward(block, index, chunk))
    after.groups.write(chain(carried, alone()), full_name(index, "").rstrip("."))
    everything = {name: linear for linears in replaced.values() for name, linear in linears.items()}
    with _replaced(cached, everything):
        _advance(walk, cached, index, before.joint, after.joint)
    return errors


def _advance(walk: Walk, block: nn.Module, index: int, before: Stream, after: Stream) -> None:
    at_once = walk.sequences_at_once(before.shape[1])
    outputs = run(before, at_once, lambda chunk: walk.forward(block, index, chunk))
    after.write(outputs, full_name(index, "").rstrip("."))


@contextmanager
def _replaced(block: nn.Module, linears: dict[str, QuantLinear]) -> Iterator[None]:
    """Quantized linears in their places, for a while."""
    originals = {name: block.get_submodule(name) for name in linears}
    for name, linear in linears.items():
        quantize_linear(block, name, linear)
    try:
        yield
    finally:
        for name, original in originals.items():
            block.set_submodule(name, original)


class _SeenInputs:
    """The inputs of every site of a block (and expert): Hessians of the samples, then the tokens of the proof."""

    def __init__(self) -> None:
        self.proof = False
        self.hessians: dict[tuple[str, int | None], Hessian] = {}
        self.tokens: dict[tuple[str, int | None], list[Tensor]] = {}
        self.weights: dict[tuple[str, int | None], list[Tensor]] = {}

    def of(self, site: str, expert: int | None) -> Inputs | None:
        """What was seen, or None where no token was: an expert that nothing was routed to."""
        key = (site, expert)
        if not self.hessians[key].tokens or not self.tokens.get(key):
            return None
        return Inputs(self.hessians[key].mean(), torch.cat(self.tokens[key]), torch.cat(self.weights[key]))


@contextmanager
def _inputs(walk: Walk, block: nn.Module, index: int) -> Iterator[_SeenInputs]:
    """Watch the first linear of each site and expert, whose input all linears of the site read."""
    seen = _SeenInputs()
    handles = []
    with residual_weights(block) as residual:

        def watch(site: str, expert: int | None) -> Any:
            def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                x = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
                weights = residual.of(site, expert)
                if not seen.proof:
                    seen.hessians[site, expert].add(x, weights)
                elif x.shape[0]:
                    seen.tokens.setdefault((site, expert), []).append(x.clone())
                    ones = x.new_ones(x.shape[0])
                    seen.weights.setdefault((site, expert), []).append(ones if weights is None else weights)

            return hook

        for site in walk.family.sites(walk.config, index):
            experts = range(walk.family.expert_count(walk.config, index)) if site.expert else (None,)
            for expert in experts:
                first = site.of_expert(expert or 0)[0]
                seen.hessians[site.name, expert] = Hessian(walk.in_features(index, first), walk.device)
                handles.append(block.get_submodule(first).register_forward_pre_hook(watch(site.name, expert)))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


class _Judged:
    """One group of linears, as its candidates would quantize it."""

    def __init__(
        self, recipe: Recipe, block: nn.Module, energies: dict[str, Tensor], inputs: _SeenInputs, group: Group
    ) -> None:
        self.recipe, self.block, self.energies, self.inputs, self.group = recipe, block, energies, inputs, group
        experts = sorted(
            {int(name.split(".experts.")[1].split(".")[0]) for name in group.linears if ".experts." in name}
        )
        self.parts: list[tuple[Site, int | None]] = [
            (site, expert) for site in group.sites for expert in (experts if site.expert else (None,))
        ]

    def error(self, scheme: Scheme) -> float:
        """The mean relative output error of the group's linears; an expert counts by its tokens."""
        total, count = 0.0, 0
        for site, expert in self.parts:
            inputs = self.inputs.of(site.name, expert)
            if inputs is None:
                continue
            layout, factor = self._layout(site, scheme), self._factor(inputs, site, scheme)
            found = output_errors(self._weights(site, expert), inputs, layout, scheme, self.recipe.weights.clip, factor)
            tokens = inputs.tokens.shape[0]
            total, count = total + tokens * sum(found), count + tokens * len(found)
        return total / count if count else 0.0

    def quantized(self, scheme: Scheme) -> dict[str, QuantLinear]:
        """The group's linears, quantized as the road would: by GPTQ on the parent's inputs, or rounded."""
        linears: dict[str, QuantLinear] = {}
        for site, expert in self.parts:
            inputs = self.inputs.of(site.name, expert)
            layout = self._layout(site, scheme)
            names = site.of_expert(expert or 0)
            weights = [layout.apply(weight) for weight in self._weights(site, expert)]
            if scheme.weights.element == "float":
                together = [unrounded(weight, scheme, torch.float32) for weight in weights]
            elif inputs is not None and self.recipe.weights.rounding == "gptq":
                together = compensate(
                    weights, in_layout(inputs.hessian, layout), scheme, **self.recipe.weights.method()
                )
            else:
                importance = weights[0].new_ones(layout.in_features)
                if inputs is not None:
                    importance = in_layout(inputs.hessian, layout).diagonal().clone()
                clip = self.recipe.weights.clip
                together = [round_to_nearest(weight, importance, scheme, clip) for weight in weights]
            for name, quantized in zip(names, together, strict=True):
                linears[name] = QuantLinear.from_weight(quantized, layout, linear_in(self.block, name).bias)
        return linears

    def _weights(self, site: Site, expert: int | None) -> list[Tensor]:
        return [linear_in(self.block, name).weight for name in site.of_expert(expert or 0)]

    def _layout(self, site: Site, scheme: Scheme) -> InputLayout:
        energy, seed = self.energies[site.name], self.recipe.transform_seed
        return site_layout(energy, scheme, self.group.index, site.name, seed, self.recipe.order)

    def _factor(self, inputs: Inputs, site: Site, scheme: Scheme) -> Tensor | None:
        """GPTQ's factor in the layout of a scheme, or None where weights are only rounded."""
        if self.recipe.weights.rounding != "gptq" or scheme.weights.element == "float":
            return None
        settings = self.recipe.weights
        hessian = in_layout(inputs.hessian, self._layout(site, scheme))
        return error_factor(hessian, settings.damping, settings.damping_rule)


def _divergences(model: Any, walk: Walk, streams: _Streams, progress: Progress) -> list[float]:
    """KL(parent ‖ other) in nats, the mean over the proof's tokens: of the cache, of everything, of each group."""
    head = [_log_probabilities(model, sequence.to(walk.device)) for sequence in streams.parent.chunks(1)]
    found: list[float] = []
    for stream in (streams.cache, streams.joint, streams.groups):
        total, rows = 0.0, 0
        for number, sequence in enumerate(stream.chunks(1), start=1):
            p = head[(number - 1) % len(head)]
            q = _log_probabilities(model, sequence.to(walk.device))
            total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
            rows += p.shape[0]
            if number % len(head) == 0:
                found.append(max(0.0, total / rows))
                progress.advance(len(found))
                total, rows = 0.0, 0
    return found


def _log_probabilities(model: Any, hidden: Tensor) -> Tensor:
    """Log-probabilities (tokens, vocabulary) fp32 of hidden (1, tokens, hidden)."""
    return torch.cat([torch.log_softmax(logits(model, rows).float(), dim=-1) for rows in hidden[0].split(_ROWS)])
