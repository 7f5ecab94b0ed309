"""Serving under a memory budget: how many tokens per second each system gives when all have the same bytes.

The setting of the Atom paper (Zhao et al., MLSys 2024, section 5): a number of bytes for everything, a fixed number of
tokens reserved for each sequence, and for each system the largest power of two of sequences that fits. `reserve` None
is what a paged server does instead: pages as sequences grow, as many sequences as have room.

A run starts in the middle: every place of the batch holds a request at a random point of its life, prefilled for real,
and whoever ends makes room for the next request. So no measured second is a warm-up's or a drain's.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from atomcli.benchmarks.model import check_context, path_note, release_memory, step_limit, synchronize, weight_bytes
from atomcli.benchmarks.report import Measure, Row, exact, measure
from atomcli.benchmarks.systems import System
from atomcli.errors import AtomError, RunError, UsageError
from atomcli.runtime.fused import FusedModel
from atomcli.runtime.pages import fitting_pages
from atomcli.runtime.serving import Request, Server

SEED = 0
MOST_ROWS = 256
_DRAWS = 4096  # of request lengths, for their mean
_MEASURES = ("sequences", "throughput", "step", "step limit", "KV cache", "weights")


@dataclass(frozen=True)
class Workload:
    """Requests whose prompts and outputs have log-normal lengths of these means, in tokens, together below `context`.

    The defaults are the means that the paper's trace of conversations has.
    """

    prompt: int = 23
    output: int = 995
    context: int = 2048
    spread: float = 0.6

    def requests(self, vocabulary: int) -> Iterator[Request]:
        """Random requests without end, the same for every system."""
        draw = random.Random(SEED)
        while True:
            prompt, output = self._lengths(draw)
            yield Request([draw.randrange(vocabulary) for _ in range(prompt)], output)

    def held(self) -> float:
        """Tokens that a sequence of a running batch holds on average.

        A batch is met in the middle: a request is in it with a probability in proportion to the steps that it takes,
        and at a random one of them. So it is more than half of the mean output.
        """
        draw = random.Random(SEED)
        drawn = [self._lengths(draw) for _ in range(_DRAWS)]
        return sum(output * (prompt + output / 2) for prompt, output in drawn) / sum(output for _, output in drawn)

    def _lengths(self, draw: random.Random) -> tuple[int, int]:
        prompt = min(self._length(draw, self.prompt), self.context // 2)
        return prompt, min(self._length(draw, self.output), self.context - prompt)

    def _length(self, draw: random.Random, mean: int) -> int:
        return max(1, round(mean * draw.lognormvariate(-(self.spread**2) / 2, self.spread)))


def bench_capacity(
    systems: Sequence[System],
    budgets: Sequence[float],
    reserve: int | None = 2048,
    workload: Workload | None = None,
    seconds: float = 4.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """A row per budget (GB for weights and pages) and system, with ratios to the first system.

    Raises UsageError for a reserve below the workload's longest request and for a model of fewer positions. A system
    whose weights leave no room keeps its row, with the reason in the note.
    """
    workload = workload or Workload()
    if reserve is not None and reserve < workload.context:
        raise UsageError(f"--reserve {reserve} is less than the {workload.context} tokens that a request may have")
    rows: dict[float, list[Row]] = {budget: [] for budget in budgets}
    for number, system in enumerate(systems):
        model = system.load()
        check_context(system.name, model, workload.context)
        for place, budget in enumerate(budgets):
            rows[budget].append(_row(system.name, model, budget, reserve, workload, seconds))
            release_memory()
            if progress is not None:
                progress(number * len(budgets) + place + 1, len(systems) * len(budgets))
        del model
        release_memory()
    return [_beside(row, budget_rows[0]) for budget_rows in rows.values() for row in budget_rows]


def places(model: FusedModel, budget: float, reserve: int | None, workload: Workload) -> tuple[int, int]:
    """Sequences at a time and pages that `budget` GB hold beside the weights; RunError when they hold not one."""
    left = int(budget * 1e9) - weight_bytes(model)
    pages = fitting_pages(model, left) if left > 0 else 0
    page = model.format.page
    if reserve is None:
        needed = -(-workload.context // page)
        # More rows than have room on average would send each other away, to be computed anew.
        rows = min(MOST_ROWS, int(pages / (workload.held() / page + 1)))
    else:
        needed = -(-reserve // page)
        rows = pages // needed
        rows = min(MOST_ROWS, 1 << rows.bit_length() - 1) if rows else 0
        pages = rows * needed
    if rows < 1 or pages < needed:
        raise RunError(
            f"{weight_bytes(model) / 1e9:.3g} GB of weights leave no room for a sequence in {budget:g} GB",
            "Give it more memory, or take a smaller model.",
        )
    return rows, pages


def _row(name: str, model: FusedModel, budget: float, reserve: int | None, workload: Workload, seconds: float) -> Row:
    labels: dict[str, str | int | float] = {"budget": f"{budget:g} GB", "cache": "reserved" if reserve else "paged"}
    labels["model"] = name
    measures: dict[str, Measure | None] = dict.fromkeys(_MEASURES)
    measures["weights"] = exact(weight_bytes(model), "bytes")
    extra: dict[str, str | int | float] = {"seconds": seconds, "prompt": workload.prompt, "output": workload.output}
    try:
        rows, pages = places(model, budget, reserve, workload)
        server = Server(model, pages, rows, workload.context)
    except (AtomError, torch.OutOfMemoryError) as error:
        return Row(labels, measures, error.what if isinstance(error, AtomError) else "out of memory", extra)
    source = workload.requests(model.config.vocab_size)
    _start_in_the_middle(server, source)
    rates, steps, running, cached = [], [], [], []
    for _ in range(4):
        produced, count, begin = 0, 0, time.perf_counter()
        while time.perf_counter() - begin < seconds / 4:
            while server.waiting < 2:
                server.submit(next(source))
            produced += len(server.step())
            count += 1
            running.append(server.running)
        elapsed = time.perf_counter() - begin
        rates.append(produced / elapsed)
        steps.append(elapsed / max(1, count))
        cached.append(server.cached_tokens)
    measures["sequences"] = exact(round(statistics.mean(running), 1), "")
    measures["throughput"] = measure(rates, "tokens/s")
    measures["step"] = measure([step * 1e3 for step in steps], "ms")
    measures["KV cache"] = exact(model.pool_bytes(pages), "bytes")
    average = statistics.mean(running)
    limit = step_limit(model, max(1, round(average)), round(statistics.mean(cached) / max(1.0, average)))
    if limit is not None:
        measures["step limit"] = measure([100 * limit / step for step in steps], "%")
    return Row(labels, measures, f"{rows} places; {path_note(model)}", extra)


def _start_in_the_middle(server: Server, source: Iterator[Request]) -> None:
    """Fill every place with a request at a random point of its life: what it has said so far is part of its prompt.

    A request is met with a probability in proportion to its length, as on a server that has run for long.
    """
    draw = random.Random(SEED + 1)
    longest = server.context
    while server.running + server.waiting < server.rows:
        request = next(source)
        if draw.random() * longest > len(request.prompt) + request.new_tokens:
            continue
        said = draw.randrange(request.new_tokens)
        prompt = [*request.prompt, *(draw.choice(request.prompt) for _ in range(said))]
        server.submit(Request(prompt, request.new_tokens - said))
    while server.waiting and server.running < server.rows:
        before = server.waiting
        server.step()
        if server.waiting == before and server.running:
            break  # no page is left for the next one
    synchronize(server.model.device)


def _beside(row: Row, first: Row) -> Row:
    own, other = row.measures["throughput"], first.measures["throughput"]
    ratio = None if own is None or other is None else exact(own.median / other.median, "×")
    return Row(row.labels, {**row.measures, "ratio": ratio}, row.note, row.extra)
