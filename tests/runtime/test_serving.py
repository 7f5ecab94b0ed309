"""Continuous batching: every request gets what it would get alone, and gives back every page."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from atomcli.errors import InputError, RunError
from atomcli.runtime.decoding import DecodeRows, ladder
from atomcli.runtime.fused import FusedModel
from atomcli.runtime.prompts import ROWS, SIZES, Piece
from atomcli.runtime.sampling import Sampling
from atomcli.runtime.serving import Request, Server
from tests.helpers.fused import KV8, tiny_model
from tests.helpers.tiny import VOCABULARY


@pytest.fixture(scope="module")
def model() -> FusedModel:
    """A model in which only the cache rounds, to 8 bits, so that the order of sums hardly decides a token."""
    return FusedModel.of(tiny_model("qwen2", None, KV8))


def requests(count: int, seed: int = 0, longest: int = 40, sampling: Sampling | None = None) -> list[Request]:
    draw = random.Random(seed)
    return [
        Request(
            [draw.randrange(2, VOCABULARY) for _ in range(draw.choice((1, 5, 30, 63, 64, 65)))],
            draw.choice((1, 2, 7, 20, longest)),
            sampling=sampling or Sampling(),
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def generated() -> list[list[int]]:
    """What transformers generates for `requests(9)`, one after the other."""
    original, answers = tiny_model("qwen2", None, KV8), []
    for request in requests(9):
        prompt = torch.tensor([request.prompt])
        options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
        out = original.generate(prompt, max_new_tokens=request.new_tokens, **options)
        answers.append(out[0, len(request.prompt) :].tolist())
    return answers


@pytest.mark.parametrize(("pages", "rows", "chunk"), [(40, 8, 2048), (6, 5, 16), (2, 3, 64)])
def test_a_request_gets_the_tokens_that_transformers_generates(
    model: FusedModel, generated: list[list[int]], pages: int, rows: int, chunk: int
) -> None:
    server = Server(model, pages, rows, context=128, chunk=chunk)
    assert server.run(requests(9)) == generated
    assert server.pages.free == pages
    assert server.idle


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 0.9, seed=3)], ids=["greedy", "sampled"])
def test_alone_and_in_a_full_batch_the_tokens_are_the_same(model: FusedModel, sampling: Sampling) -> None:
    asked = requests(6, seed=1, sampling=sampling)
    together = Server(model, 30, 6, context=128).run(asked)
    assert together == [Server(model, 2, 1, context=128).run([request])[0] for request in asked]


def test_preemption_changes_no_token(model: FusedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [request.prompt for request in requests(5, seed=2)]
    asked = [Request(prompt, 45, sampling=Sampling(1.0, seed=number)) for number, prompt in enumerate(prompts)]
    roomy, tight = Server(model, 30, 5, context=128), Server(model, 3, 5, context=128)
    preempted: list[Server] = []
    preempt = Server._preempt

    def counted(server: Server) -> None:
        preempted.append(server)
        preempt(server)

    monkeypatch.setattr(Server, "_preempt", counted)
    assert tight.run(asked) == roomy.run(asked)
    assert set(preempted) == {tight}
    assert tight.pages.free == 3


def test_a_soak_leaks_no_page(model: FusedModel) -> None:
    draw = random.Random(4)
    server = Server(model, 12, 7, context=128, chunk=48)
    asked = requests(40, seed=5, longest=25)
    answers: dict[int, list[int]] = {}
    waiting = list(asked)
    while waiting or not server.idle:
        for _ in range(draw.randrange(4)):
            if waiting:
                answers[server.submit(waiting.pop(0))] = []
        for produced in server.step():
            answers[produced.request].append(produced.token)
            assert produced.done == (len(answers[produced.request]) == asked[produced.request].new_tokens)
        held = [page for each in (*server._running, *server._prefilling) for page in each.pages]
        assert len(held) == len(set(held)) == server.pages.count - server.pages.free
    assert [len(answer) for answer in answers.values()] == [request.new_tokens for request in asked]
    assert server.pages.free == 12


def test_a_stop_token_is_the_last(model: FusedModel) -> None:
    request = requests(1, seed=3)[0]
    free = Server(model, 4, 1, context=128).run([Request(request.prompt, 40)])[0]
    stop = free[10]
    stopped = Server(model, 4, 1, context=128).run([Request(request.prompt, 40, frozenset({stop}))])[0]
    assert stopped == free[: free.index(stop) + 1]


def test_what_can_never_be_served_is_refused_and_harms_nobody(model: FusedModel) -> None:
    server = Server(model, 2, 2, context=256)
    for request, error, sentence in (
        (Request([], 3), InputError, "at least one token, not 0 and 3"),
        (Request([3], 0), InputError, "not 1 and 0"),
        (Request([3] * 250, 7), InputError, "exceed the 256 positions"),
        (Request([3] * 100, 100), RunError, "needs a cache of 199 tokens; the whole cache holds 128"),
    ):
        with pytest.raises(error, match=sentence):
            server.submit(request)
    assert server.run([Request([3] * 100, 29)]) == Server(model, 8, 1).run([Request([3] * 100, 29)])


def test_the_ladder_holds_every_batch() -> None:
    for rows in (1, 3, 64, 100, 300):
        sizes = ladder(rows)
        assert sizes[-1] == rows
        assert list(sizes) == sorted(set(sizes))
    assert ladder(256) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def test_idle_rows_store_nothing_and_change_nobody(model: FusedModel) -> None:
    pools = model.new_pools(4)
    for pool in pools:
        pool.fill_(7)
    rows = DecodeRows(model, pools, 4, 2)
    rows.place(0, 5, 1, [2, 3])
    alone = rows.step(1)
    again = DecodeRows(model, pools, 4, 2)
    again.place(0, 5, 1, [2, 3])
    assert again.step(4)[:1] == alone
    assert again.logits is not None
    for pool in pools:
        assert (pool[:2] == 7).all()


def test_more_pages_than_memory_are_refused(model: FusedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atomcli.runtime.pages.free_bytes", lambda model: 5 * model.pool_bytes(1))
    with pytest.raises(RunError, match="A cache of 512 tokens takes") as raised:
        Server(model, 8, 4, context=128)
    assert raised.value.hint == "2 × 128 or 4 × 64 tokens would fit."
    Server(model, 5, 4, context=128)


def test_padded_prompts_change_no_token(model: FusedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(9)
    plain, padded = (Server(model, 20, 9, context=128, chunk=100) for _ in range(2))
    expected = plain.run(asked)
    rows = padded.prompts
    sizes = []

    def as_captured(pieces: Sequence[Piece]) -> torch.Tensor:
        """What a graph holds, run as plain calls."""
        total = sum(len(piece.tokens) for piece in pieces)
        sizes.append(next(size for size in SIZES if size >= total))
        return rows._run(rows._filled(pieces, sizes[-1], ROWS, rows.pages), sizes[-1])[: len(pieces)]

    aside: list[int] = []
    padded.pages.extend(aside, 1)
    assert aside == [0]  # where padding would land
    for pool in rows.pools:
        pool[0] = 7
    monkeypatch.setattr(rows, "logits", as_captured)
    assert padded.run(asked) == expected
    assert len(set(sizes)) > 1
    assert all((pool[0] == 7).all() for pool in rows.pools)
