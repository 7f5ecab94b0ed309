"""Continuous batching: requests are admitted as pages allow, prefilled in chunks, decoded together, and let go.

A sequence takes pages as it grows. When none is left, the one admitted last gives its pages back and waits to be
computed anew, prompt and tokens so far; so the one admitted first always finishes.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from atomcli.errors import InputError, RunError
from atomcli.runtime.decoding import DecodeRows
from atomcli.runtime.fused import FusedModel
from atomcli.runtime.pages import Pages, require_pages
from atomcli.runtime.prompts import Piece, PromptRows
from atomcli.runtime.sampling import GREEDY, Sampling, sample

_GROWTH = 4  # a newcomer leaves one free page for this many sequences


@dataclass(frozen=True)
class Request:
    """Token ids to continue: at most `new_tokens` more, or up to one of `stop`, which is the last token then."""

    prompt: Sequence[int]
    new_tokens: int
    stop: frozenset[int] = frozenset()
    sampling: Sampling = GREEDY


@dataclass(frozen=True)
class Produced:
    """A token of the request with this number; `done` with the last one."""

    request: int
    token: int
    done: bool


@dataclass(eq=False)
class _Sequence:
    number: int
    request: Request
    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def produced(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def is_done(self) -> bool:
        return self.produced >= self.request.new_tokens or (self.produced > 0 and self.tokens[-1] in self.request.stop)


class Server:
    """Serves requests from `pages` pages to at most `rows` sequences at a time.

    `context` bounds a request's tokens, the model's positions where it is None; `chunk` is how many prompt tokens are
    computed between two decode steps. Raises RunError for more pages than there is memory.
    """

    def __init__(self, model: FusedModel, pages: int, rows: int, context: int | None = None, chunk: int = 2048) -> None:
        self.model, self.rows, self.chunk = model, rows, chunk
        self.context = min(context or model.context, model.context)
        require_pages(model, pages, rows, self.context)
        self.pages = Pages(pages, model.format.page)
        self.pools = model.new_pools(pages)
        self.decoding = DecodeRows(model, self.pools, rows, self.pages.needed(self.context))
        self.prompts = PromptRows(model, self.pools, self.decoding.pages)
        self._waiting: deque[_Sequence] = deque()
        self._prefilling: list[_Sequence] = []
        self._running: list[_Sequence] = []  # by row
        self._flights: deque[list[_Sequence]] = deque()  # whose steps are under way, oldest first
        self._count = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to do."""
        return not (self._waiting or self._prefilling or self._running)

    @property
    def running(self) -> int:
        """Number of sequences that decode."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of requests that don't decode yet, those sent back included."""
        return len(self._waiting) + len(self._prefilling)

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values lie in pages now."""
        return sum(sequence.cached for sequence in (*self._running, *self._prefilling))

    def submit(self, request: Request) -> int:
        """Queue a request and answer its number; InputError or RunError for one that can't be served at all."""
        total = len(request.prompt) + request.new_tokens
        if not request.prompt or request.new_tokens < 1:
            raise InputError(
                f"A request has a prompt and asks for at least one token, not {len(request.prompt)} and "
                f"{request.new_tokens}"
            )
        if total > self.context:
            raise InputError(
                f"{len(request.prompt)} prompt tokens and {request.new_tokens} new ones exceed the {self.context} "
                "positions that are served",
                f"Ask for at most {max(0, self.context - len(request.prompt))} new tokens.",
            )
        if self.pages.needed(total - 1) > self.pages.count:  # the last token is never cached
            raise RunError(
                f"The request needs a cache of {total - 1} tokens; the whole cache holds "
                f"{self.pages.count * self.pages.page}",
                "Give the server more pages.",
            )
        self._waiting.append(_Sequence(self._count, request, list(request.prompt)))
        self._count += 1
        return self._count - 1

    def step(self) -> list[Produced]:
        """Admit, prefill a chunk, decode one token of every running sequence; the tokens that came out."""
        produced = self._land_all() if self._prefilling or self._can_admit() else []
        self._admit()
        if self._prefilling:
            produced += self._prefill()
        return produced + self._decode()

    def run(self, requests: Iterable[Request]) -> list[list[int]]:
        """The new tokens of each request, all served to their end."""
        numbers = [self.submit(request) for request in requests]
        outputs: dict[int, list[int]] = {number: [] for number in numbers}
        while not self.idle:
            for produced in self.step():
                outputs[produced.request].append(produced.token)
        return [outputs[number] for number in numbers]

    def _can_admit(self) -> bool:
        busy = len(self._prefilling) + len(self._running)
        if not self._waiting or busy >= self.rows:
            return False
        # Some pages to grow by for those who are here, or the newcomer would soon be sent away again.
        return self.pages.needed(len(self._waiting[0].tokens)) + -(-busy // _GROWTH) <= self.pages.free

    def _admit(self) -> None:
        while self._can_admit():
            sequence = self._waiting.popleft()
            self.pages.extend(sequence.pages, len(sequence.tokens))
            self._prefilling.append(sequence)

    @torch.inference_mode()
    def _prefill(self) -> list[Produced]:
        """Compute up to `chunk` tokens of the sequences admitted first; those that end here get their next token."""
        chosen: list[_Sequence] = []
        pieces: list[Piece] = []
        room = self.chunk
        for sequence in self._prefilling:
            if room:
                end = min(sequence.cached + room, len(sequence.tokens))
                chosen.append(sequence)
                pieces.append(Piece(sequence.tokens[sequence.cached : end], sequence.cached, sequence.pages))
                room -= end - sequence.cached
        logits = self.prompts.logits(pieces)
        for sequence, piece in zip(chosen, pieces, strict=True):
            sequence.cached = piece.end
        ended = [row for row, sequence in enumerate(chosen) if sequence.cached == len(sequence.tokens)]
        if not ended:
            return []
        finished = [chosen[row] for row in ended]
        first = self._choose(logits[ended], finished)
        self._prefilling = [sequence for sequence in self._prefilling if sequence not in finished]
        produced = []
        for sequence, token in zip(finished, first, strict=True):
            produced.append(self._take(sequence, token))
            if not sequence.is_done:
                self._running.append(sequence)
                self.decoding.place(
                    len(self._running) - 1, token, sequence.cached, sequence.pages, sequence.request.sampling
                )
        return produced

    def _choose(self, logits: torch.Tensor, sequences: Sequence[_Sequence]) -> list[int]:
        device = logits.device
        samplings = [sequence.request.sampling for sequence in sequences]
        tokens: list[int] = sample(
            logits,
            torch.tensor([sampling.temperature for sampling in samplings], device=device),
            torch.tensor([sampling.top_p for sampling in samplings], device=device),
            torch.tensor([sampling.seed for sampling in samplings], device=device),
            torch.tensor([sequence.cached - 1 for sequence in sequences], device=device),
        ).tolist()
        return tokens

    def _decode(self) -> list[Produced]:
        """The tokens of the step under way; if nothing changes in between, the next one is started before."""
        if not self._flights:
            self._make_room()
            if not self._running:
                return []
            self._launch()
        if self._can_go_ahead():
            self._launch()
        produced = self._land()
        return produced + self._land_all() if any(sequence.is_done for sequence in self._running) else produced

    def _launch(self) -> None:
        sampled = any(sequence.request.sampling.temperature > 0 for sequence in self._running)
        self.decoding.start(len(self._running), sampled)
        self._flights.append(list(self._running))

    def _can_go_ahead(self) -> bool:
        """Whether a second step may start: nobody comes or ends by then, and there are pages for its tokens."""
        if len(self._flights) > 1 or self._prefilling or self._can_admit() or not self.decoding.can_go_ahead:
            return False
        if any(sequence.produced + 1 >= sequence.request.new_tokens for sequence in self._running):
            return False
        return all(self._extend(row, sequence.cached + 2) for row, sequence in enumerate(self._running))

    def _land(self) -> list[Produced]:
        """Take in the tokens of the oldest step under way; who ended with the step before it gets no more."""
        sequences, tokens, produced = self._flights.popleft(), self.decoding.finish(), []
        for sequence, token in zip(sequences, tokens, strict=True):
            if not sequence.is_done:
                sequence.cached += 1
                produced.append(self._take(sequence, token))
        return produced

    def _land_all(self) -> list[Produced]:
        """Take in all steps under way and let go of those who ended, so that rows may change."""
        produced = []
        while self._flights:
            produced += self._land()
        for row in range(len(self._running) - 1, -1, -1):
            if self._running[row].is_done:
                self._leave(row)
        return produced

    def _take(self, sequence: _Sequence, token: int) -> Produced:
        sequence.tokens.append(token)
        if sequence.is_done:
            self.pages.release(sequence.pages)
        return Produced(sequence.number, token, sequence.is_done)

    def _make_room(self) -> None:
        """Room for the token that each running sequence is about to store, at the cost of those admitted last."""
        row = 0
        while row < len(self._running):
            if self._extend(row, self._running[row].cached + 1):
                row += 1
            else:
                self._preempt()

    def _extend(self, row: int, tokens: int) -> bool:
        """Pages for `tokens` tokens of a running sequence; False if too few are free."""
        pages = self._running[row].pages
        held = len(pages)
        if not self.pages.extend(pages, tokens):
            return False
        if len(pages) > held:
            self.decoding.set_pages(row, pages)
        return True

    def _preempt(self) -> None:
        """The sequence with the highest number gives its pages back and waits at the front, to be computed anew."""
        last = max(self._prefilling + self._running, key=lambda sequence: sequence.number)
        self.pages.release(last.pages)
        if last in self._prefilling:
            self._prefilling.remove(last)
        else:
            self._leave(self._running.index(last))
        last.cached = 0
        self._waiting.appendleft(last)

    def _leave(self, row: int) -> None:
        """Take a row out of the batch; the last row moves into its place."""
        last = len(self._running) - 1
        self.decoding.move(last, row)
        self._running[row] = self._running[last]
        self._running.pop()
