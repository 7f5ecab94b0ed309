"""What a device has left for a cache, and the sentence for a cache that is larger."""

import torch

from atomcli.errors import RunError


def free_bytes(device: torch.device, reserve: float = 0.0) -> int:
    """Bytes that can be allocated on `device` now, but for a share of its memory that is left to others."""
    if device.type != "cuda":
        return 1 << 30
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, free + unused - int(reserve * total))


def require_pages(page: int, page_bytes: int, pages: int, batch: int, context: int, budget: int) -> None:
    """Raise RunError when `pages` pages of `page` tokens and `page_bytes` in all layers take more than `budget` bytes.

    They are for `batch` sequences of `context` tokens; the hint names the batch and the context that would fit.
    """
    fitting = budget // page_bytes
    if pages <= fitting:
        return
    sequences, tokens = fitting // -(-context // page), fitting // batch * page
    fits = [f"{sequences} × {context}"] * (sequences > 0) + [f"{batch} × {tokens}"] * (tokens > 0)
    raise RunError(
        f"A cache of {pages * page} tokens takes {pages * page_bytes / 1e9:.3g} GB; {budget / 1e9:.3g} GB are free",
        f"{' or '.join(fits)} tokens would fit." if fits else "Not even one page fits: the weights leave no room.",
    )
