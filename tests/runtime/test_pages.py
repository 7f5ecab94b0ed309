"""Pages are taken whole or not at all, and a cache that doesn't fit names one that would."""

import pytest

from atomcli.errors import RunError, UsageError
from atomcli.runtime.fused import FusedModel
from atomcli.runtime.pages import Pages, require_room
from tests.helpers.fused import KV8, tiny_model


def test_too_small_a_card_names_what_fits() -> None:
    model = FusedModel.of(tiny_model("qwen2", None, KV8))
    page = model.pool_bytes(1)
    assert require_room(model, 2, 128, 4 * page) == 4
    with pytest.raises(RunError) as raised:
        require_room(model, 3, 256, 9 * page)
    assert raised.value.hint == "2 × 256 or 3 × 192 tokens would fit."
    with pytest.raises(RunError) as raised:
        require_room(model, 1, 64, page - 1)
    assert "leave no room" in str(raised.value.hint)
    with pytest.raises(UsageError, match="not 0 of 5"):
        require_room(model, 0, 5)


def test_pages_are_given_whole_or_not_at_all() -> None:
    pages, held = Pages(3, 16), list[int]()
    assert pages.extend(held, 17)
    assert (len(held), pages.free) == (2, 1)
    assert not pages.extend(held, 65)
    assert (len(held), pages.free) == (2, 1)
    assert pages.extend(held, 20)
    twice = list(held)
    pages.release(held)
    assert (held, pages.free) == ([], 3)
    with pytest.raises(KeyError):
        pages.release(twice)
