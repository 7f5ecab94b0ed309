"""Pages: sizes, views and numbers."""

import pytest
import torch

from atomcli.errors import UnsupportedError
from atomcli.kernels.pages import Element, PageFormat
from tests.kernels.attention_cases import stored

ELEMENTS: tuple[Element, ...] = ("int4", "int8", "fp8", "bf16")


@pytest.mark.parametrize(("element", "per_token"), [("int4", 136), ("int8", 264), ("fp8", 260), ("bf16", 512)])
def test_bytes_of_a_token(element: Element, per_token: int) -> None:
    fmt = PageFormat(element, 128, 64)
    assert fmt.bytes_per_token == per_token
    assert fmt.allocate(3, 2, "cpu").shape == (3, 2, 64 * per_token)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("head_dim", [64, 96, 256])
@pytest.mark.parametrize("page", [16, 32, 64])
def test_views_cover_every_byte_of_a_page_once(element: Element, head_dim: int, page: int) -> None:
    fmt = PageFormat(element, head_dim, page)
    assert fmt.bytes % 16 == 0
    pool = fmt.allocate(2, 3, "cpu")
    pool.zero_()
    views = fmt.views(pool)
    for view in (views.keys, views.values, views.numbers.view(torch.uint8)):
        view += 1
    assert bool((pool == 1).all())


@pytest.mark.parametrize("element", ELEMENTS)
def test_numbers_are_those_of_the_formats(element: Element) -> None:
    torch.manual_seed(0)
    fmt = PageFormat(element, 96)
    x = torch.randn(5, 3, 96) * torch.logspace(-3, 2, 5)[:, None, None]
    vectors = fmt.encode(x)
    assert vectors.codes.shape == (5, 3, fmt.code_bytes)
    assert torch.equal(fmt.decode(*vectors).double(), stored(x, element))


@pytest.mark.parametrize("element", ELEMENTS)
def test_a_vector_of_zeros_stays_zero(element: Element) -> None:
    fmt = PageFormat(element, 64)
    assert not fmt.decode(*fmt.encode(torch.zeros(2, 64))).any()


@pytest.mark.parametrize(("element", "head_dim", "page"), [("int3", 128, 64), ("int4", 128, 48), ("int4", 80, 64)])
def test_pages_that_nobody_serves_are_refused(element: Element, head_dim: int, page: int) -> None:
    with pytest.raises(UnsupportedError, match=r"int3|48|80"):
        PageFormat(element, head_dim, page)
