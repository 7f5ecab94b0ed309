"""The block loop of the compress road: each block is read, run, quantized, packed, written and let go.

The next block is read while the present one is worked on, and the last one is written: memory of the host holds two
blocks and what is left of a third, that of a GPU one block and its Hessians. A finished block is published in the
journal together with the streams after it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from atomcli.checkpoint.writer import shard_file, write_shard
from atomcli.errors import InputError
from atomcli.models.tensors import block_name
from atomcli.pipeline import check, pack
from atomcli.pipeline.ahead import Ahead, Behind
from atomcli.pipeline.calibrate import Calibration, Statistics
from atomcli.pipeline.held import Held, begin_copy, free_bytes, held_on
from atomcli.pipeline.hessians import Hessian, InputsSeen, Target, pooled, watched
from atomcli.pipeline.parameters import Outcome, cache_tensors, fold, input_ranges, quantize_block, targets
from atomcli.pipeline.passes import drop, pass_through, write_embedded
from atomcli.pipeline.ranks import Ranks, owners
from atomcli.pipeline.shares import share_linears
from atomcli.pipeline.stream import AtOnce, Stream, enough_memory, run
from atomcli.runtime.decoder import build_block

if TYPE_CHECKING:
    from atomcli.pipeline.journal import Journal
    from atomcli.pipeline.model import Walk
    from atomcli.pipeline.select import Plan
    from atomcli.recipe import Recipe

_LOG = logging.getLogger("atomcli")


class Streams:
    """The three streams between two blocks: calibration sequences on the quantized model, and the proof's two."""

    def __init__(self, walk: Walk, directory: Path, index: int, tokens: Tensor, held: Held | None) -> None:
        proof = check.check_tokens(tokens)
        hidden = int(walk.config.hidden_size)

        def stream(name: str, like: Tensor, held: Held | None = None) -> Stream:
            path = directory / f"{name}-{index:05d}.stream"
            return Stream(path, (like.shape[0], like.shape[1], hidden), walk.source.dtype, held=held)

        self.calibration = stream("calibration", tokens, held)
        self.parent = stream("parent", proof)
        self.checkpoint = stream("checkpoint", proof)

    def remove(self) -> None:
        """Delete them."""
        for stream in (self.calibration, self.parent, self.checkpoint):
            stream.remove()


class Road:
    """What every block of one run needs; use it inside `working`."""

    def __init__(
        self, walk: Walk, recipe: Recipe, plan: Plan, artifact: Calibration, directory: Path, ranks: Ranks
    ) -> None:
        self.walk, self.recipe, self.plan, self.ranks = walk, recipe, plan, ranks
        self.artifact, self.directory, self.tokens = artifact, directory, artifact.tokens
        self.names = plan.names()
        # Rounding to nearest needs no Hessians, hence no calibration sequences on the quantized model.
        self.with_hessians = recipe.weights.rounding == "gptq"
        self._held = held_on(walk.device)
        self._at_once = AtOnce(walk.sequences_at_once(self.tokens.shape[1]))
        self._ahead: Ahead | None = None
        self._behind: Behind | None = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Read ahead and write behind while this lasts; what was computed is on disk when it ends."""
        with ThreadPoolExecutor(2, "atom") as pool:
            self._ahead, self._behind = Ahead(self.walk, pool, self._held), Behind(pool)
            try:
                yield
                self._behind.settle()
            except BaseException:
                self.ranks.stopping.set()
                raise

    def streams(self, index: int) -> Streams:
        """The streams that go into block `index`."""
        return Streams(self.walk, self.directory, index, self.tokens, self._held)

    def restore(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Make the calibration stream after finished blocks again, which a restart of the machine may have taken."""
        walk, schemes = self.walk, {name: scheme for scheme, name in self.names.items()}
        self._embed_calibration(self.streams(0))
        for index, step in enumerate(steps):
            kv = self.plan.cache[index]
            block = check.reopened_block(self.directory, walk, index, step["linears"], schemes, kv).to(walk.device)
            before, after = self.streams(index).calibration, self.streams(index + 1).calibration
            pass_through(walk, block, index, before, after, self._at_once, self.ranks)
            drop(before, self.ranks)

    def block(self, index: int, journal: Journal) -> dict[str, Any]:
        """Quantize block `index`; its shard and the streams after it are on disk, and in the journal, a little later.

        Returns its journal step. RunError when memory doesn't suffice.
        """
        with enough_memory(f"quantize {block_name(index)}"):
            return self._block(index, journal)

    def _block(self, index: int, journal: Journal) -> dict[str, Any]:
        started = time.monotonic()
        assert self._ahead is not None
        walk, before, after = self.walk, self.streams(index), self.streams(index + 1)
        if index == 0:
            self._embed(before)
        tensors = self._ahead.take(index)
        # While the first process is still at the checkpoint's stream, and at what it writes, of the block before.
        if self.ranks.last:
            check.advance(
                walk, build_block(walk.family, walk.config, index, tensors), index, before.parent, after.parent
            )
        statistics = self.artifact.statistics(index)
        tensors, energies = fold(tensors, walk, index, self.plan, statistics, self.recipe.order)
        kv = self.plan.cache[index]
        tensors |= cache_tensors(kv, self.artifact, index, walk)
        block = build_block(walk.family, walk.config, index, tensors, kv)
        del tensors
        outcomes = self._quantize(block, index, energies, statistics, before)
        if self.with_hessians and index + 1 < walk.blocks:
            pass_through(walk, block, index, before.calibration, after.calibration, self._at_once, self.ranks)
        if self.ranks.first:
            check.advance(walk, block, index, before.checkpoint, after.checkpoint)
        step = {
            "block": index,
            "linears": pack.linear_entries(block, index, self.names),
            "layers": pack.report_rows(block, index, outcomes, self.names, input_ranges(walk, index, statistics)),
            "seconds": time.monotonic() - started,
        }
        made = pack.block_tensors(block, index) if self.ranks.first else {}
        self._write(index, made, step, journal)
        return step

    def _write(self, index: int, made: dict[str, Tensor], step: dict[str, Any], journal: Journal) -> None:
        """Put a block and the streams after it on disk and into the journal, beside the work on the next one."""
        before, after = self.streams(index), self.streams(index + 1)
        tensors, arrived = begin_copy(made)
        ranks, where = self.ranks, f"block-{index}"

        def write() -> None:
            before.calibration.settle()
            after.calibration.settle()
            if ranks.last:
                after.parent.sync()  # unlike calibration sequences, nothing makes the proof's again
            ranks.arrive(where)
            if not ranks.first:
                return
            arrived()
            record = write_shard(self.directory, shard_file(index), tensors)
            tensors.clear()
            after.checkpoint.sync()
            ranks.await_all(where)
            if self.walk.source.fingerprint() != journal.identity["model"]:
                raise InputError(
                    f"{self.walk.source.name} changed while it was read",
                    f"Delete {self.directory} and run the command again",
                )
            journal.publish({**step, "shard": record.to_dict()})
            before.remove()  # nobody needs the streams before a published block

        assert self._behind is not None
        self._behind.write(write)

    def _quantize(
        self,
        block: nn.Module,
        index: int,
        energies: dict[str, Tensor],
        statistics: dict[str, Statistics],
        before: Streams,
    ) -> list[Outcome]:
        walk, ranks = self.walk, self.ranks
        found = targets(walk, index, self.plan, energies, self.recipe.transform_seed, self.recipe.order)
        owned = owners([_cost(block, target) for target in found], ranks.size)
        mine = [place for place, owner in enumerate(owned) if owner == ranks.rank]
        hessians: list[Hessian | None] | None = None
        together: dict[str, Tensor] = {}
        if self.with_hessians and found:
            hessians = self._hessians(block, index, found, owned, statistics, before.calibration)
            together = pooled(found, hessians, owned, ranks)
        outcomes: list[Outcome] = []
        for done, place in enumerate(mine):
            if hessians is not None:
                _make_room(hessians, mine[done:], walk.device, self._held)
            outcomes += quantize_block(block, index, found, hessians, self.recipe, together, [place])
        return share_linears(block, found, owned, outcomes, ranks)

    def _hessians(
        self,
        block: nn.Module,
        index: int,
        found: list[Target],
        owned: list[int],
        statistics: dict[str, Statistics],
        stream: Stream,
    ) -> list[Hessian | None]:
        """The Hessians of the targets that this process owns, over all sequences; None for the others'."""
        walk, ranks, samples = self.walk, self.ranks, self.tokens.shape[0]
        forced = _forced(found, statistics, samples)
        if self._held is not None:
            self._held.make_room(sum(8 * each.layout.in_features**2 for each in found))
        wholes = [
            Hessian(target.layout.in_features, walk.device) if owner == ranks.rank else None
            for target, owner in zip(found, owned, strict=True)
        ]
        with watched(block, found, walk.device, self.recipe.weights.token_weights, forced) as (parts, routing):

            def look(chunk: Tensor) -> Tensor:
                with suppress(InputsSeen):
                    walk.forward(block, index, chunk)
                return chunk

            for rows, active in ranks.rounds(samples):
                routing.again(rows.start)
                for _ in run(stream.part(rows), self._at_once, look, routing.again):
                    pass
                for part, whole, owner in zip(parts, wholes, owned, strict=True):
                    totals = part.panels() if whole is None else whole.panels()
                    for total, panel in zip(totals, part.panels(), strict=True):
                        ranks.fold(None if whole is None else total, panel, owner, active)
                    part.total.zero_()
        counts = ranks.reduce(torch.tensor([[part.tokens, part.forced] for part in parts])).tolist()
        for whole, (tokens, of_them_forced) in zip(wholes, counts, strict=True):
            if whole is not None:
                whole.tokens, whole.forced = tokens, of_them_forced
        self._say_starved(index, found, counts, len(forced))
        return wholes

    def _say_starved(self, index: int, found: list[Target], counts: list[list[int]], forced: int) -> None:
        if forced:
            _LOG.info("%s: routing was forced for the statistics of %d experts", block_name(index), forced)
        starved = sum(tokens < each.layout.in_features for each, (tokens, _) in zip(found, counts, strict=True))
        if starved:
            _LOG.warning(
                "%s: %d of %d inputs saw fewer tokens than they have channels; more samples would help",
                block_name(index),
                starved,
                len(found),
            )

    def _embed(self, streams: Streams) -> None:
        """The streams into the first block."""
        proof = check.check_tokens(self.tokens)
        if self.with_hessians:
            self._embed_calibration(streams)
        for stream, writes in ((streams.parent, self.ranks.last), (streams.checkpoint, self.ranks.first)):
            if writes:
                write_embedded(self.walk, proof, stream, [range(proof.shape[0])])

    def _embed_calibration(self, streams: Streams) -> None:
        rows = [rows for rows, _ in self.ranks.rounds(self.tokens.shape[0])]
        write_embedded(self.walk, self.tokens, streams.calibration, rows)


# GPTQ holds about so many matrices of a Hessian's size: it, its mirror, its factors and what they come from.
_WORKSPACE = 7


def _make_room(hessians: list[Hessian | None], waiting: list[int], device: torch.device, held: Held | None) -> None:
    """Bring the first waiting Hessian to the device; where the GPU lacks room for it, what it holds of the hidden
    states goes, and then the other Hessians go to the host."""
    if device.type != "cuda":
        return
    first, *others = (hessians[place] for place in waiting)
    assert first is not None
    needed = _WORKSPACE * first.total.nbytes
    if held is not None:
        held.make_room(needed)
    for other in reversed(others):
        if other is not None and other.total.is_cuda and free_bytes(device) < needed:
            other.total = other.total.cpu()
    first.total = first.total.to(device)


def _cost(block: nn.Module, target: Target) -> float:
    """How long a target takes beside the others: the factor of its Hessian, and a sweep over its linears' columns."""
    channels = target.layout.in_features
    rows = sum(block.get_submodule(name).out_features for name in target.linears)  # type: ignore[misc, operator]
    return float(channels) ** 2 * (channels + rows)


def _forced(found: list[Target], statistics: dict[str, Statistics], samples: int) -> dict[int, int]:
    """How many tokens of each sequence an expert must be shown that the parent's router seldom chose."""
    wanted: dict[int, int] = {}
    for target in found:
        if target.expert is not None:
            lacking = target.layout.in_features - int(statistics[target.site].tokens[target.expert])
            if lacking > 0:
                wanted[target.expert] = max(wanted.get(target.expert, 0), -(-lacking // samples))
    return wanted
