"""Several processes on one run: who does what, in which order sums are taken, and how one's failure ends all.

Calibration sequences are cut into a fixed number of slots. A slot is summed by one process; the sums of the slots are
added in the slots' order. Neither depends on how many processes there are, so the result is bit for bit that of one.
The processes need the same files: the model, and the directory that the run works in.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from atomcli.errors import AtomError, RunError, UsageError
from atomcli.runtime.device import choose_device

T = TypeVar("T")
_LOG = logging.getLogger("atomcli")

# More slots than this many processes would find no work in calibration; fewer would cost nothing else.
SLOTS = 16
# One process may work alone for hours (the selection, the proof) while the others wait.
_PATIENCE = timedelta(days=30)
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_FOR_GOODBYES = 10.0


def slots(samples: int) -> list[range]:
    """The calibration sequences of each slot, in order; fewer than SLOTS where there are fewer sequences."""
    count = min(SLOTS, samples)
    return [range(samples * slot // count, samples * (slot + 1) // count) for slot in range(count)]


class Ranks:
    """The processes of one run as one of them sees them; with a size of 1 nothing is exchanged."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None, store: Any = None) -> None:
        self.rank, self.size, self.device, self._store = rank, size, device, store
        self.stopping = threading.Event()

    @property
    def first(self) -> bool:
        """Whether this process writes the files and speaks for all."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """Whether this process does what the first need not do itself."""
        return self.rank == self.size - 1

    def rounds(self, samples: int) -> list[tuple[range, int]]:
        """For each round of calibration, this process's sequences (or none) and how many processes have some."""
        cut = slots(samples)
        return [
            (cut[start + self.rank] if start + self.rank < len(cut) else range(0), min(self.size, len(cut) - start))
            for start in range(0, len(cut), self.size)
        ]

    def fold(self, total: Tensor | None, part: Tensor, owner: int, active: int) -> None:
        """Add the parts of processes 0 … active-1, in this order, to `total` of the process `owner`."""
        if self.size == 1:
            assert total is not None
            total.add_(part)
            return
        received = None
        for rank in range(active):
            if self.rank == owner:
                assert total is not None
                if rank == owner:
                    total.add_(part)
                    continue
                received = part.new_empty(part.shape) if received is None else received
                dist.recv(received, rank)
                total.add_(received)
            elif self.rank == rank:
                dist.send(part.contiguous(), owner)

    def fold_one(self, total: Tensor, part: Tensor | None, source: int) -> None:
        """Add to `total` of the first process the part that the process `source` has."""
        if self.rank == source:
            assert part is not None
            if self.first:
                total.add_(part)
            else:
                dist.send(part, 0)
        elif self.first:
            received = torch.empty_like(total)
            dist.recv(received, source)
            total.add_(received)

    def reduce(self, tensor: Tensor, how: Any = dist.ReduceOp.SUM) -> Tensor:
        """Integers summed, or extremes taken, over all processes: operations whose order doesn't matter."""
        if self.size == 1:
            return tensor
        shared = tensor.to(self.device)
        dist.all_reduce(shared, how)
        return shared.to(tensor.device)

    def share(self, tensor: Tensor, owner: int) -> None:
        """Give every process the bytes that `owner` has in `tensor`, in place."""
        if self.size > 1 and tensor.numel():
            dist.broadcast(tensor.contiguous().reshape(-1).view(torch.uint8), owner)

    def tell(self, value: T | None, owner: int = 0) -> T:
        """Plain data that `owner` has, for everybody."""
        if self.size == 1:
            return value  # type: ignore[return-value]
        box = [value]
        dist.broadcast_object_list(box, owner, device=self.device)
        return box[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.size > 1:
            self.reduce(torch.zeros(1, dtype=torch.int64))

    def arrive(self, where: str) -> None:
        """Say, without waiting, that this process has come to `where`."""
        if self.size > 1:
            self._store.add(where, 1)

    def await_all(self, where: str) -> None:
        """Go on when every process has said that it came to `where`; may be called beside the other exchanges.

        RunError when this process is `stopping` meanwhile.
        """
        while self.size > 1 and self._store.add(where, 0) < self.size:
            if self.stopping.wait(0.005):
                raise RunError("The run is ending")

    def first_to_fail(self, exit_code: int) -> bool:
        """Tell the others that this process failed; False when another did before, and says so itself."""
        if self.size == 1:
            return True
        word = json.dumps({"rank": self.rank, "exit_code": exit_code})
        try:
            mine = bool(json.loads(self._store.compare_set("failed", "", word))["rank"] == self.rank)
        except RuntimeError:  # the store ended with the process that held it
            return False
        self.take_leave()
        return mine

    def failure(self) -> dict[str, int] | None:
        """The rank and exit code of the process that failed first; None while none has."""
        return json.loads(self._store.get("failed")) if self._store.check(["failed"]) else None

    def take_leave(self) -> None:
        """Say that this process ends with the others; the one that may hold the store waits for all of them."""
        deadline = time.monotonic() + _SECONDS_FOR_GOODBYES
        with suppress(RuntimeError):
            self._store.add("gone", 1)
            while self.first and self._store.add("gone", 0) < self.size and time.monotonic() < deadline:
                time.sleep(0.02)


ALONE = Ranks()


def launched() -> bool:
    """Whether torchrun, or something with its environment, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def together(device: torch.device | str | None = None) -> Iterator[Ranks]:
    """Meet the other processes that torchrun started; alone otherwise.

    `device` None takes each process's own GPU where there is one. UsageError when a GPU is named for all of them.
    """
    if not launched():
        yield ALONE
        return
    target = _own_device(device)
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=_PATIENCE)))
    # Of a run that torchrun started again nothing may be left over.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        "nccl" if target.type == "cuda" else "gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE
    )
    ranks, over = Ranks(rank, size, target, store), threading.Event()
    watch = threading.Thread(target=_end_with_the_others, args=(ranks, over), daemon=True)
    watch.start()
    try:
        yield ranks
        ranks.wait()
    except BaseException as error:
        failure = _of_a_peer(error)
        code = failure.exit_code if isinstance(failure, AtomError) else 130 if _interrupted(failure) else 1
        if not ranks.first_to_fail(code):
            logging.shutdown()
            os._exit(code)
        if failure is error:
            raise
        raise failure from error
    finally:
        over.set()
    watch.join()
    dist.destroy_process_group()


def _of_a_peer(error: BaseException) -> BaseException:
    """The error of a collective as what it means: another process has gone."""
    text = str(error).lower()
    if isinstance(error, RuntimeError) and any(word in text for word in ("peer", "connection", "remote process")):
        return RunError(
            "Another process of this run ended without saying why",
            "Look at what the system says about it (out of memory?); the same command continues after the last block.",
        )
    return error


def _interrupted(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt)


def _own_device(device: torch.device | str | None) -> torch.device:
    if device is None and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local)
        return choose_device(f"cuda:{local}")
    chosen = choose_device(device)
    if chosen.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"--device {chosen} is one GPU for several processes", "Leave --device out: each takes its own"
        )
    return chosen


def _end_with_the_others(ranks: Ranks, over: threading.Event) -> None:
    """End this process, silently and with the same exit code, when another one fails.

    It may be waiting inside a collective that nothing else can interrupt.
    """
    while not over.wait(_SECONDS_BETWEEN_LOOKS):
        try:
            found = ranks.failure()
        except RuntimeError:  # the process that held the store is gone, which only a failure explains
            found = {"rank": -1, "exit_code": 1}
        if found is None:
            continue
        if found["rank"] != ranks.rank:
            ranks.take_leave()
            logging.shutdown()
            os._exit(int(found["exit_code"]))
        return


def owners(costs: Sequence[float], size: int) -> list[int]:
    """Which of `size` processes takes each piece of work, so that the busiest has little more than the others."""
    loads, chosen = [0.0] * size, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        chosen[piece] = loads.index(min(loads))
        loads[chosen[piece]] += costs[piece]
    return chosen
