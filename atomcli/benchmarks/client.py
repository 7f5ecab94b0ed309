"""A client of an OpenAI server: sends requests, and notes when each token comes.

HTTP/1.0 by hand over asyncio's streams: a thousand streams of tokens must cost the machine less than they cost the
server that is measured.
"""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atomcli.errors import RunError

HOST = "127.0.0.1"
POLL_SECONDS = 0.25
WAIT_SECONDS = 3600.0


@dataclass(frozen=True)
class Answer:
    """When a request was sent, when its first and last token came (seconds), and how many tokens came."""

    sent: float
    first: float
    last: float
    tokens: int

    @property
    def to_first_token(self) -> float:
        """Seconds until the first token."""
        return self.first - self.sent

    @property
    def per_token(self) -> float | None:
        """Seconds per token after the first; None where there was but one."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True)
class Load:
    """What a server said of itself at some `time` (seconds): running sequences, the share of its cache that was full,
    and the tokens that it has generated since it started."""

    time: float
    running: float
    cache: float
    generated: float


def get(port: int, path: str, timeout: float = 30.0) -> str:
    """The body of GET `path`; RunError when there is none."""
    return asyncio.run(_exchange(port, f"GET {path} HTTP/1.0\r\n\r\n".encode(), timeout))


def replay(
    port: int, bodies: Sequence[dict[str, Any]], concurrency: int, rate: float | None, seconds: float | None = None
) -> tuple[list[Answer], list[Load]]:
    """Send completions, at most `concurrency` at a time, `rate` a second (None: as soon as allowed), and watch.

    After `seconds` those that are not answered are given up. Raises RunError when the server refuses a request or
    answers another number of tokens than it was asked for.
    """
    return asyncio.run(_replay(port, bodies, concurrency, rate, seconds))


async def _replay(
    port: int, bodies: Sequence[dict[str, Any]], concurrency: int, rate: float | None, seconds: float | None
) -> tuple[list[Answer], list[Load]]:
    gate, loads, begin = asyncio.Semaphore(concurrency), list[Load](), time.perf_counter()

    async def one(number: int, body: dict[str, Any]) -> Answer:
        if rate is not None:
            await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
        async with gate:
            return await _complete(port, body)

    async def watch() -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            loads.append(load_of(await _exchange(port, b"GET /metrics HTTP/1.0\r\n\r\n", WAIT_SECONDS)))

    watcher = asyncio.create_task(watch())
    tasks: list[asyncio.Task[Answer]] = []
    try:
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            tasks += [group.create_task(one(number, body)) for number, body in enumerate(bodies)]
    except TimeoutError:
        pass  # time is up: what was answered by now counts
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        watcher.cancel()
    return [task.result() for task in tasks if task.done() and not task.cancelled()], loads


def load_of(metrics: str) -> Load:
    """What vLLM's /metrics says now."""
    names = ("num_requests_running", "kv_cache_usage_perc", "generation_tokens_total")
    return Load(time.perf_counter(), *(_gauge(metrics, f"vllm:{name}") for name in names))


def cache_tokens(metrics: str) -> int | None:
    """Tokens that the server's cache holds, by what /metrics says of its blocks."""
    info = next((line for line in metrics.splitlines() if line.startswith("vllm:cache_config_info")), "")
    blocks, size = (re.search(rf'[{{,]{name}="(\d+)"', info) for name in ("num_gpu_blocks", "block_size"))
    return int(blocks[1]) * int(size[1]) if blocks and size else None


def _gauge(metrics: str, name: str) -> float:
    return sum(
        float(line.rpartition(" ")[2]) for line in metrics.splitlines() if re.match(rf"{re.escape(name)}[{{ ]", line)
    )


async def _complete(port: int, asked: dict[str, Any]) -> Answer:
    """One streamed completion; only the last event, which holds the counts, is read as JSON."""
    content = json.dumps(asked | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    sent = time.perf_counter()
    reader, writer = await asyncio.open_connection(HOST, port, limit=2**22)
    try:
        writer.write(head.encode() + content)
        status = await reader.readline()
        if b" 200 " not in status:
            body = (await reader.read()).partition(b"\r\n\r\n")[2].decode(errors="replace")
            raise RunError(f"The server refused a request: {body[-300:]}")
        times, events, usage = [0.0, 0.0], 0, b""
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            if b'"choices":[]' in line:
                usage = line
                continue
            times[min(events, 1)] = time.perf_counter()
            events += 1
    finally:
        writer.close()
    tokens = json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"] if usage else 0
    if tokens != asked["max_tokens"]:
        raise RunError(f"The server answered {tokens} tokens where {asked['max_tokens']} were asked for")
    return Answer(sent, times[0], times[1] if events > 1 else times[0], tokens)


async def _exchange(port: int, request: bytes, timeout: float) -> str:
    async def exchange() -> bytes:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(request)
        answer = await reader.read()
        writer.close()
        return answer

    try:
        head, _, body = (await asyncio.wait_for(exchange(), timeout)).partition(b"\r\n\r\n")
    except (OSError, TimeoutError) as error:
        raise RunError(f"No server answers on {HOST}:{port}: {error!r}") from error
    status = head.partition(b"\r\n")[0]
    if b" 200 " not in status:
        raise RunError(f"The server answered {status.decode(errors='replace')}")
    return body.decode(errors="replace")
