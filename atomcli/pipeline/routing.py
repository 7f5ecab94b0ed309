"""Whose rows a linear sees: of which calibration sequences and, in a mixture, of which tokens routed to its expert.

An expert that calibration text seldom reaches would be quantized blindly. For such experts routing is forced: beside
the tokens that the router sends, it gets, of each sequence, the tokens for which the router likes it most. They count
in its Hessians only; what the block puts out stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Routing:
    """What the forward under way computes: sequences `first`, `first` + 1, …, and the tokens that each expert gets."""

    def __init__(self) -> None:
        self.first = self._next = 0
        self._count = self._tokens = 1
        self._experts: Tensor | None = None
        self._scores: Tensor | None = None
        self._forced: Tensor | None = None
        self._counts: list[list[int]] = []

    def begin(self, sequences: int, tokens: int) -> None:
        """A forward of the next `sequences` of `tokens` each begins."""
        self.first, self._next = self._next, self._next + sequences
        self._count, self._tokens, self._experts = sequences, tokens, None

    def again(self, at: int | None = None) -> None:
        """The next forward begins with the sequence that the last one began with, or with sequence `at`."""
        self._next = self.first if at is None else at

    def see_scores(self, scores: Tensor) -> None:
        """The router's logits (tokens, experts)."""
        self._scores = scores

    def see_experts(self, experts: Tensor) -> None:
        """The experts (tokens, k) that the router chose for each token."""
        self._experts = experts
        owner = torch.arange(experts.shape[0], device=experts.device) // self._tokens
        number = int(experts.max()) + 1
        flat = (experts * self._count + owner[:, None]).reshape(-1)
        self._counts = torch.bincount(flat, minlength=number * self._count).view(-1, self._count).tolist()

    def rows(self, expert: int) -> Tensor:
        """The tokens (n,) of the forward whose rows an expert sees now."""
        assert self._experts is not None
        return torch.where(self._experts == expert)[0] if self._forced is None else self._forced

    def counts(self, rows: int, expert: int | None) -> Iterator[tuple[int, int]]:
        """For each sequence its number and how many of the `rows` that a linear sees are its own."""
        if expert is None or self._forced is not None:
            counts = [rows // self._count] * self._count
        else:
            counts = self._counts[expert] if expert < len(self._counts) else [0] * self._count
        yield from enumerate(counts, start=self.first)

    @property
    def forcing(self) -> bool:
        """Whether an expert gets tokens now that the router sent elsewhere."""
        return self._forced is not None

    def force(self, experts: nn.Module, hidden: Tensor, wanted: Mapping[int, int]) -> None:
        """Show each expert of `wanted` that many more tokens of every sequence, of hidden (tokens, K)."""
        assert self._scores is not None
        assert self._experts is not None
        scores = self._scores.float()
        for expert, tokens in wanted.items():
            sent = (self._experts == expert).any(dim=1)
            liking = scores[:, expert].masked_fill(sent, -torch.inf).view(self._count, self._tokens)
            order = liking.argsort(dim=1, descending=True, stable=True)[:, : min(tokens, self._tokens)]
            offsets = torch.arange(self._count, device=order.device)[:, None] * self._tokens
            self._forced = (order.sort(dim=1).values + offsets).reshape(-1)
            try:
                experts.get_submodule(str(expert))(hidden[self._forced])
            finally:
                self._forced = None


class Once:
    """Lets each sequence count once at a linear, also when its forward has to be computed again."""

    def __init__(self, routing: Routing, expert: int | None) -> None:
        self.routing, self.expert = routing, expert
        self._last = {False: -1, True: -1}  # of the tokens that the router sent, and of those that were forced

    def rows(self, x: Tensor) -> Iterator[slice]:
        """The rows of x (n, K), a slice for each sequence that wasn't counted before."""
        forcing, position = self.routing.forcing, 0
        for sequence, count in self.routing.counts(x.shape[0], self.expert):
            if count and sequence > self._last[forcing]:
                yield slice(position, position + count)
                self._last[forcing] = sequence
            position += count


@contextmanager
def routing_of(block: nn.Module, wanted: Mapping[int, int] | None = None) -> Iterator[Routing]:
    """Watch a block's sequences and its router; `wanted` tokens of each sequence are forced upon these experts."""
    routing = Routing()

    def block_begins(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        routing.begin(*arguments[0].shape[:2])

    def router_ends(module: nn.Module, arguments: Any, output: tuple[Tensor, ...]) -> None:
        routing.see_scores(output[0])

    def experts_begin(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        routing.see_experts(arguments[1])

    def experts_end(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        routing.force(module, arguments[0], wanted or {})

    handles = [block.register_forward_pre_hook(block_begins)]
    experts = getattr(block.mlp, "experts", None)
    if experts is not None:
        router = block.get_submodule("mlp.gate")
        handles.append(experts.register_forward_pre_hook(experts_begin))
        if wanted:
            handles.append(router.register_forward_hook(router_ends))
            handles.append(experts.register_forward_hook(experts_end))
    try:
        yield routing
    finally:
        for handle in handles:
            handle.remove()
