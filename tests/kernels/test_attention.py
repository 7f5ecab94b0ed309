"""Attention on a paged cache: the operators against fp64 attention over what the cache holds."""

import pytest
import torch

from atomcli.errors import UnsupportedError
from atomcli.formats.groups import apply_hadamard
from atomcli.kernels import attention
from atomcli.kernels.pages import Element, PageFormat
from tests.kernels.attention_cases import problem, relative_error, rope_tables, stored

ELEMENTS: tuple[Element, ...] = ("int4", "int8", "fp8", "bf16")
SCALING = 0.1
LENGTHS = [0, 1, 15, 16, 17, 32, 33, 77, 128]


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("window", [None, 20])
def test_decode_attends_to_what_is_cached(element: Element, window: int | None) -> None:
    case = problem(element, LENGTHS, dtype=torch.float32)
    out = attention.decode(case.query, case.pool, case.fmt, case.page_table, case.lengths, SCALING, window)
    assert relative_error(out, case.expected(SCALING, window)) < 1e-5
    assert not out[0].any()


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("window", [None, 20])
def test_prefill_is_causal_from_any_start(element: Element, window: int | None) -> None:
    queries = [0, 1, 15, 3, 17, 0, 33, 20, 1]
    case = problem(element, LENGTHS, queries=queries, heads=6, kv_heads=3, page=32, dtype=torch.float32)
    out = attention.prefill(
        case.query, case.pool, case.fmt, case.page_table, case.starts, case.lengths, SCALING, window
    )
    assert relative_error(out, case.expected(SCALING, window)) < 1e-5


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_biases_come_back(hadamard: bool, head_dim: int) -> None:
    case = problem("int4", [1, 40, 33], head_dim=head_dim, dtype=torch.float32)
    key_bias, value_bias = torch.randn(2, head_dim) * 3, torch.randn(2, head_dim)
    cos, sin = rope_tables(64, head_dim)
    turned = attention.reference.rotate(key_bias.expand(64, 2, head_dim), cos, sin)
    if hadamard:
        turned = apply_hadamard(turned, [64, 32] if head_dim == 96 else [64])
    out = attention.decode(
        case.query, case.pool, case.fmt, case.page_table, case.lengths, SCALING, None, key_bias, value_bias,
        (cos, sin), hadamard=hadamard,
    )  # fmt: skip
    assert relative_error(out, case.expected(SCALING, None, turned, value_bias)) < 1e-5


def test_keys_stored_before_rope_are_rotated_when_read() -> None:
    """Scores depend on distance alone: the same tokens, all rotated by 100 positions more, are attended to alike."""
    torch.manual_seed(1)
    fmt, tokens = PageFormat("bf16", 64, 16), 40
    query, key, value = (
        torch.randn(tokens, 4, 64),
        torch.randn(tokens, 2, 64).bfloat16().float(),
        torch.randn(40, 2, 64),
    )
    cos, sin = rope_tables(200, 64)
    table, slots = torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.arange(tokens)
    starts, lengths = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    results = []
    for shift in (0, 100):
        pool = fmt.allocate(3, 2, "cpu")
        now = cos[shift : shift + tokens], sin[shift : shift + tokens]
        rotated = attention.append(pool, fmt, query, key, value, *now, slots, rotate_keys=False)
        rope = (cos[shift:], sin[shift:])
        results.append(
            attention.prefill(
                rotated, pool, fmt, table, starts, lengths, SCALING, rope=rope, keys_rotated=False
            )
        )  # fmt: skip
        assert torch.equal(fmt.views(pool).keys[1, :, 3].view(torch.bfloat16).float(), key[19])
    assert relative_error(results[1], results[0].double()) < 1e-4


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize(("head_dim", "sizes"), [(64, [64]), (96, [64, 32]), (128, [128])])
def test_append_rotates_quantizes_and_writes(element: Element, head_dim: int, sizes: list[int]) -> None:
    torch.manual_seed(0)
    fmt, tokens = PageFormat(element, head_dim, 16), 7
    pool = torch.full((4, 2, fmt.bytes), 0xFF, dtype=torch.uint8)
    query, key, value = (torch.randn(tokens, heads, head_dim) for heads in (6, 2, 2))
    cos, sin = (table[100:107] for table in rope_tables(107, head_dim))
    slots = torch.tensor([0, 63, -1, 17, 16, 33, -5])
    rotated = attention.append(pool, fmt, query, key, value, cos, sin, slots, hadamard=True)

    def expected(x: torch.Tensor) -> torch.Tensor:
        turned = torch.view_as_complex(x.unflatten(-1, (2, -1)).transpose(-1, -2).contiguous())
        turned = torch.view_as_real(turned * torch.complex(cos, sin)[:, None]).transpose(-1, -2).flatten(-2)
        return apply_hadamard(turned, sizes)

    assert relative_error(rotated, expected(query).double()) < 1e-6
    views = fmt.views(pool)
    side = fmt.numbers // 2
    kept = slots >= 0
    where = slots[kept] // 16, slots[kept] % 16
    keys = fmt.decode(views.keys[where[0], :, where[1]], views.numbers[where[0], :, where[1]][..., :side])
    values = fmt.decode(views.values[where[0], :, where[1]], views.numbers[where[0], :, where[1]][..., side:])
    assert torch.equal(values.double(), stored(value[kept], element))
    assert relative_error(keys, stored(expected(key)[kept], element)) < 1e-2  # a rounding may fall to the other side
    written = torch.zeros(4, 16, dtype=torch.bool)
    written[where] = True
    untouched = views.values.transpose(1, 2)[~written]
    assert bool((untouched == 0xFF).all())


def test_a_request_alone_and_in_a_batch() -> None:
    case = problem("int4", [5, 100, 64, 31])
    together = attention.decode(case.query, case.pool, case.fmt, case.page_table, case.lengths, SCALING)
    for b in range(4):
        rows = slice(b, b + 1)
        alone = attention.decode(
            case.query[rows], case.pool, case.fmt, case.page_table[rows], case.lengths[rows], SCALING
        )
        assert torch.equal(alone, together[rows])


def test_operators_under_a_fake_mode() -> None:
    case = problem("int4", [5, 100])
    arguments = (case.query, case.pool, case.fmt, case.page_table, case.lengths)
    compiled = torch.compile(lambda *a: attention.decode(*a, SCALING) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), attention.decode(*arguments, SCALING) * 2)


def test_what_does_not_fit_is_refused_by_name() -> None:
    case = problem("int4", [5, 100])
    good = (case.query, case.pool, case.fmt, case.page_table, case.lengths)
    for bad, words in (
        ((case.query[:, :3], *good[1:]), "3 query heads"),
        ((case.query, case.pool[..., :-16], *good[2:]), "pool"),
        ((*good[:3], case.page_table.long(), case.lengths), "int32"),
        ((*good[:4], case.lengths[:1]), "1 sequences"),
        ((*good[:3], case.page_table.t().contiguous().t(), case.lengths), "contiguous"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            attention.decode(*bad, SCALING)
    with pytest.raises(UnsupportedError, match="rope"):
        attention.decode(*good, SCALING, key_bias=torch.zeros(2, 64))
    with pytest.raises(UnsupportedError, match="output must be"):
        attention.decode(*good, SCALING, out=torch.empty(2, 4, 32, dtype=torch.bfloat16))
