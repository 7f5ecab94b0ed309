"""Serving through vLLM: each system is started as people start it, under one memory budget, and given one workload.

The server is `vllm serve`'s own, on loopback, in a process of its own; the client streams, as a user's would. All
systems run one after the other in one call, with the engine's default settings unless the caller says otherwise.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomcli.benchmarks import client, workloads
from atomcli.benchmarks.report import Measure, Row, exact, measure
from atomcli.errors import RunError, UsageError

START_SECONDS = 1200.0
_MEASURES = (
    "output tokens", "requests", "first token p50", "first token p99", "per token p50", "per token p99", "batch",
    "largest batch", "KV room",
)  # fmt: skip


@dataclass(frozen=True)
class Served:
    """A model to serve: the name its rows carry, a directory or Hub id, and options of vLLM for it alone."""

    name: str
    model: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """What all systems share: requests, how many are in flight, vLLM's options, and the Python that has vLLM.

    With `seconds` a run ends after them, answered or not, and its tokens are counted from the first quarter on.
    """

    requests: Sequence[workloads.Request]
    workload: str
    concurrency: int | None = None
    rate: float | None = None
    repeats: int = 1
    seed: int = 0
    options: tuple[str, ...] = ()
    python: str = sys.executable
    logs: Path | None = None
    seconds: float | None = None


def bench_engine(
    systems: Sequence[Served],
    budgets: Sequence[float | None],
    setting: Setting,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """A row per budget (GB for everything; None: vLLM's own default) and system, with ratios to the first system.

    A system that doesn't start under a budget keeps its row, with the reason in the note.
    """
    rows = []
    for place, budget in enumerate(budgets):
        group = []
        for number, system in enumerate(systems):
            group.append(_row(system, budget, setting))
            if progress is not None:
                progress(place * len(systems) + number + 1, len(budgets) * len(systems))
        rows += [_beside(row, group[0]) for row in group]
    return rows


def memory_options(budget: float, model: str) -> list[str]:
    """vLLM's options for `budget` GB in all: a share of the GPU, or on a CPU what the weights leave to the cache.

    Raises RunError when there is less, UsageError when there isn't so much.
    """
    import torch

    total = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else None
    if total is not None:
        if budget > total:
            raise UsageError(f"--memory {budget:g} is more than the {total:.0f} GB that this GPU has")
        return ["--gpu-memory-utilization", f"{budget / total:.4f}"]
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    left = int(budget * 1e9) - weights
    if left <= 0:
        raise RunError(f"{weights / 1e9:.3g} GB of weights leave no room for a cache in {budget:g} GB")
    return ["--kv-cache-memory-bytes", str(left)]


@contextmanager
def server(system: Served, setting: Setting, memory: Sequence[str]) -> Iterator[int]:
    """A server of the system on a free port of loopback, ready to answer; RunError with its last error if not."""
    with socket.socket() as free:
        free.bind((client.HOST, 0))
        port = int(free.getsockname()[1])
    command = [
        setting.python, "-m", "vllm.entrypoints.openai.api_server", "--model", system.model, "--host", client.HOST,
        "--port", str(port), "--no-enable-prefix-caching", *memory, *setting.options, *system.options,
    ]  # fmt: skip
    logs = setting.logs or Path(tempfile.mkdtemp(prefix="atom-serve-"))
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{system.name.replace('/', '_')}.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=_environment())
    try:
        _wait(process, port, log)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_error(log: str) -> str:
    """The sentence that a server's log ends on when it didn't start: the last error that isn't about another one."""
    lines = [line.rpartition("] ")[2].strip() for line in log.splitlines() if "Error: " in line]
    telling = [line for line in lines if "See root cause" not in line and "Failed core proc" not in line]
    return (telling or lines or log.strip().splitlines() or ["it said nothing"])[-1][:300]


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        if process.poll() is not None:
            raise RunError(f"vLLM didn't start: {last_error(log.read_text(errors='replace'))}", f"Its log is {log}")
        try:
            client.get(port, "/health", 5.0)
            return
        except RunError:
            if time.monotonic() > deadline:
                raise RunError(f"vLLM wasn't ready after {START_SECONDS:.0f} s", f"Its log is {log}") from None
            time.sleep(0.5)


def _environment() -> dict[str, str]:
    """This process's, without what would make two servers differ; a server phones nobody."""
    return os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def _row(system: Served, budget: float | None, setting: Setting) -> Row:
    labels: dict[str, str | int | float] = {"workload": setting.workload, "model": system.name}
    if budget is not None:
        labels = {"budget": budget, **labels}
    sizes = setting.requests
    extra: dict[str, str | int | float] = {
        "requests": len(sizes),
        "prompt_tokens": statistics.mean(request.prompt for request in sizes),
        "output_tokens": statistics.mean(request.output for request in sizes),
        "options": " ".join((*setting.options, *system.options)),
        "path": system.model,
    }
    measures: dict[str, Measure | None] = dict.fromkeys(_MEASURES)
    try:
        memory = [] if budget is None else memory_options(budget, system.model)
        with server(system, setting, memory) as port:
            return Row(labels, _measured(port, system, setting), "", extra)
    except RunError as error:
        return Row(labels, measures, error.what, extra)


def _measured(port: int, system: Served, setting: Setting) -> dict[str, Measure | None]:
    vocabulary = json.loads((Path(system.model) / "config.json").read_text())["vocab_size"]
    bodies: list[dict[str, Any]] = [
        {
            "model": system.model,
            "prompt": workloads.token_ids(request, number, vocabulary, setting.seed),
            "max_tokens": request.output,
            "temperature": 0,
            "ignore_eos": True,
        }
        for number, request in enumerate(setting.requests)
    ]
    client.replay(port, bodies[:2], 2, None)  # the first steps compile and allocate
    runs = []
    for _ in range(setting.repeats):
        answers, loads = client.replay(port, bodies, setting.concurrency or len(bodies), setting.rate, setting.seconds)
        runs.append(_summary(answers, loads, setting.seconds))
    measures: dict[str, Measure | None] = {
        name: measure([run[name][0] for run in runs], runs[0][name][1])
        for name in runs[0]
        if all(name in run for run in runs)
    }
    tokens = client.cache_tokens(client.get(port, "/metrics"))
    return dict.fromkeys(_MEASURES) | measures | {"KV room": None if tokens is None else exact(tokens, "tokens")}


def _summary(
    answers: Sequence[client.Answer], loads: Sequence[client.Load], limit: float | None
) -> dict[str, tuple[float, str]]:
    """The measures of a run, each with its unit; those of answers are left out where time was up before any came."""
    running = [load.running for load in loads] or [0.0]
    summary: dict[str, tuple[float, str]] = {
        "batch": (round(statistics.mean(running), 1), ""),
        "largest batch": (max(running), ""),
    }
    if answers:
        seconds = limit or max(answer.last for answer in answers) - min(answer.sent for answer in answers)
        firsts = [answer.to_first_token for answer in answers]
        each = [value for answer in answers if (value := answer.per_token) is not None] or [0.0]
        summary |= {
            "output tokens": (sum(answer.tokens for answer in answers) / seconds, "tokens/s"),
            "requests": (len(answers) / seconds, "1/s"),
            "first token p50": (1e3 * percentile(firsts, 50), "ms"),
            "first token p99": (1e3 * percentile(firsts, 99), "ms"),
            "per token p50": (1e3 * percentile(each, 50), "ms"),
            "per token p99": (1e3 * percentile(each, 99), "ms"),
        }
    if limit is not None:
        summary["output tokens"] = (generated_per_second(loads, limit), "tokens/s")
    return summary


def generated_per_second(loads: Sequence[client.Load], limit: float) -> float:
    """Tokens per second by the server's own count, without the first quarter of `limit` seconds, in which it fills.

    Raises RunError when it was asked fewer than two times after that.
    """
    after = [load for load in loads if load.time >= loads[0].time + limit / 4]
    if len(after) < 2:
        raise RunError(f"{limit:g} s are too few to count tokens in")
    return (after[-1].generated - after[0].generated) / (after[-1].time - after[0].time)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` % of the values don't exceed, linear between neighbours."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _beside(row: Row, first: Row) -> Row:
    own, other = row.measures["output tokens"], first.measures["output tokens"]
    ratio = None if own is None or other is None else exact(own.median / other.median, "×")
    return Row(row.labels, {**row.measures, "ratio": ratio}, row.note, row.extra)
