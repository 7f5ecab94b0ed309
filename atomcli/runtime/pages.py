"""Which page of a cache belongs to whom, and how many fit: bookkeeping on the host, the same for every layer."""

from atomcli.errors import UsageError
from atomcli.runtime import memory
from atomcli.runtime.fused import FusedModel

# Of the free memory, what activations of a prefill and graphs may take beside the pages.
_RESERVE = 0.08


class Pages:
    """The free pages of a cache. A sequence holds a list of pages, `page` tokens of it in each."""

    def __init__(self, count: int, page: int) -> None:
        self.count, self.page = count, page
        self._free = list(range(count - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Pages that `tokens` tokens of one sequence take."""
        return -(-tokens // self.page)

    def extend(self, held: list[int], tokens: int) -> bool:
        """Add pages to `held` until it has room for `tokens` tokens; False, with nothing taken, if too few are free."""
        missing = self.needed(tokens) - len(held)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            page = self._free.pop()
            self._taken.add(page)
            held.append(page)
        return True

    def release(self, held: list[int]) -> None:
        """Free all pages of `held` and empty it."""
        for page in held:
            self._taken.remove(page)  # KeyError: it was free, or belongs to another cache
        self._free += reversed(held)
        held.clear()


def free_bytes(model: FusedModel) -> int:
    """Bytes that pages may take on the model's device now."""
    return memory.free_bytes(model.device, _RESERVE)


def fitting_pages(model: FusedModel, budget: int) -> int:
    """How many pages of the model's cache `budget` bytes hold."""
    return budget // model.pool_bytes(1)


def require_room(model: FusedModel, batch: int, context: int, budget: int | None = None) -> int:
    """Pages for `batch` sequences of `context` tokens; RunError names the batch and the context that would fit."""
    if batch < 1 or context < 1:
        raise UsageError(f"A cache is for at least one sequence of one token, not {batch} of {context}")
    pages = batch * -(-context // model.format.page)
    require_pages(model, pages, batch, context, budget)
    return pages


def require_pages(model: FusedModel, pages: int, batch: int, context: int, budget: int | None = None) -> None:
    """Raise RunError when `pages` pages, for `batch` sequences of `context` tokens, take more than `budget` bytes.

    The budget is the memory that is free on the model's device where it is None.
    """
    budget = free_bytes(model) if budget is None else budget
    memory.require_pages(model.format.page, model.pool_bytes(1), pages, batch, context, budget)
