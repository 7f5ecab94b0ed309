"""A whole model's speed in the fused runtime: prefill, decode, the bytes it holds, and how near it is to the limit.

Timed is what a server does for a batch of equal prompts: all prompts, in passes as the server's, up to their first
tokens on the host, then one token of each at a time, greedy, every step's tokens brought to the host. Models are loaded
one after the other, so a parent and its checkpoint never share memory. The note says what ran: a speed of the reference
says nothing about the kernels.
"""

import gc
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from atomcli.benchmarks.gemm import INT8_PEAK, MEMORY_BANDWIDTH
from atomcli.benchmarks.report import Measure, Row, exact, measure
from atomcli.benchmarks.systems import System
from atomcli.errors import AtomError, RunError, UsageError
from atomcli.runtime.decoding import DecodeRows
from atomcli.runtime.fused import FusedModel
from atomcli.runtime.pages import Pages, require_room
from atomcli.runtime.prompts import ROWS, SIZES, Piece, PromptRows

SEED = 0
BF16_PEAK = {"H100": 0.8e15, "H200": 0.8e15}  # operations/s of a large cuBLAS product, measured

# Prompts are computed up to here; beyond, a batch's prompts are copies of one, and prefill is not timed.
PREFILL_TOKENS = 16384

# The first of these captures the graph, the others wake the card's clock.
WARMUP_STEPS = 3

_MEASURES = ("prefill", "first token", "prefill limit", "decode", "step", "step limit", "KV cache", "weights")


def bench_model(
    systems: Sequence[System],
    batches: Sequence[int],
    contexts: Sequence[int],
    new_tokens: int = 32,
    repeats: int = 3,
    warmup: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """A row per system, batch and context, rows of one setting side by side, with ratios to the first system.

    Raises UsageError for a setting below 1 or a context that a model can't take; a setting that doesn't fit into memory
    keeps its row, with no numbers and the reason in the note.
    """
    for option, values in (
        ("--batch", batches),
        ("--context", contexts),
        ("--new-tokens", [new_tokens]),
        ("--repeats", [repeats]),
    ):
        if not values or min(values) < 1:
            raise UsageError(f"{option} {', '.join(map(str, values))}: every value must be at least 1")
    grid = list(product(batches, contexts))
    rows: dict[tuple[int, int], list[Row]] = {setting: [] for setting in grid}
    done = 0
    for system in systems:
        model = system.load()
        check_context(system.name, model, max(contexts) + new_tokens)
        for setting in grid:
            rows[setting].append(_setting(system.name, model, *setting, new_tokens, repeats, warmup))
            done += 1
            if progress is not None:
                progress(done, len(systems) * len(grid))
        del model
        release_memory()
    return [_beside(row, settings[0]) for settings in rows.values() for row in settings]


def check_context(name: str, model: FusedModel, tokens: int) -> None:
    """Raise UsageError when a model has fewer positions than `tokens`."""
    if tokens > model.context:
        raise UsageError(
            f"{tokens} tokens, prompt and new ones, exceed the {model.context} positions of {name}",
            "Use a smaller --context",
        )


def release_memory() -> None:
    """Give back what a model that is no longer referred to held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def weight_bytes(model: FusedModel) -> int:
    """Bytes of all weights; an embedding that is the head too counts once."""
    return model.read_bytes + (0 if model.config.tie_word_embeddings else model.embedding.nbytes)


def path_note(model: FusedModel) -> str:
    """What runs the blocks' products, what the pages hold, and whether steps are graphs."""
    names = sorted(set(model.kernels))
    shares = [f"{name} ({model.kernels.count(name)})" if len(names) > 1 else name for name in names]
    graphs = "CUDA graphs" if model.capturable else "no graphs"
    elements = "/".join(sorted({block.format.element for block in model.blocks}))
    return f"{', '.join(shares)}; {elements} pages; {graphs}"


def _setting(name: str, model: FusedModel, batch: int, context: int, new_tokens: int, repeats: int, warmup: int) -> Row:
    labels: dict[str, str | int | float] = {"model": name, "batch": batch, "context": context}
    extra: dict[str, str | int | float] = {
        "new_tokens": new_tokens,
        "warmup": warmup,
        "dtype": str(model.dtype),
        "device": str(model.device),
    }
    measures: dict[str, Measure | None] = dict.fromkeys(_MEASURES)
    measures["weights"] = exact(weight_bytes(model), "bytes")
    try:
        pages = require_room(model, batch, context + new_tokens)
        batch_of = Batch(model, batch, context, new_tokens)
        prefills = [] if batch * context > PREFILL_TOKENS else [batch_of.prefill() for _ in range(warmup + repeats)]
        steps = batch_of.decode()
    except (RunError, torch.OutOfMemoryError) as error:
        reason = f"{error.what}: {error.hint}" if isinstance(error, AtomError) else "out of memory"
        return Row(labels, measures, reason, extra)
    if prefills:
        measures["prefill"] = measure([batch * context / seconds for seconds in prefills[warmup:]], "tokens/s")
        measures["first token"] = measure([seconds * 1e3 for seconds in prefills[warmup:]], "ms")
        least = prefill_limit(model, batch, context)
        if least is not None:
            measures["prefill limit"] = measure([100 * least / seconds for seconds in prefills[warmup:]], "%")
    measures["decode"] = measure([batch / seconds for seconds in steps], "tokens/s")
    measures["step"] = measure([seconds * 1e3 for seconds in steps], "ms")
    measures["KV cache"] = exact(model.pool_bytes(pages), "bytes")
    limit = step_limit(model, batch, context + new_tokens // 2)
    if limit is not None:
        measures["step limit"] = measure([100 * limit / seconds for seconds in steps], "%")
    return Row(labels, measures, path_note(model), extra)


class Batch:
    """`batch` sequences of `context` random tokens each, in pages of their own, with room for `new_tokens` more."""

    def __init__(self, model: FusedModel, batch: int, context: int, new_tokens: int) -> None:
        self.model, self.batch, self.context, self.new_tokens = model, batch, context, new_tokens
        page = model.format.page
        self.width = -(-(context + new_tokens) // page)
        pages = Pages(batch * self.width, page)
        held: list[list[int]] = [[] for _ in range(batch)]
        for row in held:
            pages.extend(row, context + new_tokens)
        self.held = held
        self.pools = model.new_pools(batch * self.width)
        generator = torch.Generator().manual_seed(SEED)
        vocabulary = model.config.vocab_size
        self.prompts = torch.randint(vocabulary, (batch, context), generator=generator).numpy()
        self.passes = PromptRows(model, self.pools, self.width)

    def prefill(self, rows: int | None = None) -> float:
        """Seconds from the prompts of the first `rows` sequences, all by default, to their first tokens on the host."""
        synchronize(self.model.device)
        begin = time.perf_counter()
        self._prefill(self.batch if rows is None else rows).tolist()
        return time.perf_counter() - begin

    def decode(self) -> list[float]:
        """Seconds of each of `new_tokens` steps, after some that warm up; uncomputed prompts become copies of one."""
        if self.batch * self.context > PREFILL_TOKENS:
            self.prefill(1)
            first, *others = (torch.tensor(pages, device=self.model.device) for pages in self.held)
            for pool in self.pools:
                for pages in others:
                    pool[pages] = pool[first]
        rows = DecodeRows(self.model, self.pools, self.batch, self.width)
        for _ in range(WARMUP_STEPS):
            self._place(rows)
            rows.step(self.batch)
        self._place(rows)
        synchronize(self.model.device)
        rows.start(self.batch)
        seconds, begin = [], time.perf_counter()
        for step in range(1, self.new_tokens + 1):
            if step < self.new_tokens:
                rows.start(self.batch)  # a step ahead of the tokens that are read, as the server is
            rows.finish()
            end = time.perf_counter()
            seconds.append(end - begin)
            begin = end
        return seconds

    def _place(self, rows: DecodeRows) -> None:
        """Every sequence at the end of its prompt."""
        for row, held in enumerate(self.held):
            rows.place(row, int(self.prompts[row, -1]), self.context, held)

    def _prefill(self, rows: int) -> Tensor:
        """The first tokens of the first `rows` sequences: as many sequences in a pass as fit, or a part of one."""
        together = max(1, min(ROWS, SIZES[-1] // self.context))
        first = []
        for row in range(0, rows, together):
            for start in range(0, self.context, SIZES[-1]):
                logits = self.passes.logits(
                    [
                        Piece(self.prompts[i, start : start + SIZES[-1]], start, self.held[i])
                        for i in range(row, min(row + together, rows))
                    ]
                )
            first.append(logits.argmax(-1))
        return torch.cat(first)


def step_limit(model: FusedModel, batch: int, context: int) -> float | None:
    """Seconds that the card needs at least for a decode step: for its bytes or its operations, whichever is longer.

    None without a card whose limits were measured.
    """
    card = _card(model)
    if card is None:
        return None
    cache = batch * context * model.token_bytes
    operations = 2.0 * batch * model.parameters
    return max((model.read_bytes + cache) / MEMORY_BANDWIDTH[card], operations / _peak(model, card))


def prefill_limit(model: FusedModel, batch: int, context: int) -> float | None:
    """Seconds that the card needs at least for the operations of a prefill; attention's are in 16 bits.

    None without a card whose limits were measured.
    """
    card = _card(model)
    if card is None:
        return None
    products = 2.0 * batch * context * sum(block.parameters for block in model.blocks)
    scores = sum(2.0 * batch * context**2 * block.heads * block.head_dim for block in model.blocks)
    return products / _peak(model, card) + scores / BF16_PEAK[card]


def _card(model: FusedModel) -> str | None:
    if model.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(model.device)
    return next((key for key in MEMORY_BANDWIDTH if key in name), None)


def _peak(model: FusedModel, card: str) -> float:
    return (BF16_PEAK if "torch" in model.kernels else INT8_PEAK)[card]


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it works by itself."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _beside(row: Row, first: Row) -> Row:
    """The row with its speed over the first system's of the same setting."""
    ratios: dict[str, Any] = {}
    for name in ("prefill", "decode"):
        own, other = row.measures[name], first.measures[name]
        ratios[f"{name} ratio"] = None if own is None or other is None else exact(own.median / other.median, "×")
    return Row(row.labels, {**row.measures, **ratios}, row.note, row.extra)
