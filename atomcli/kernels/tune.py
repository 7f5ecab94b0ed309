"""Which tile the integer GEMM takes for a problem: measured where it was measured, else by rule.

What was measured on this machine lies in the user's cache; what ships with the package was measured on an H100
(tiles_h100.json). A problem is looked up by kind of weight, out_features, blocks of channels and a bucket of tokens.
"""

import functools
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from atomcli.kernels import compiler, timing
from atomcli.kernels.layouts import BLOCK_BYTES, Kind
from atomcli.kernels.tiles import SHARED_LIMIT, Tile

log = logging.getLogger("atomcli")

BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 4096)

# Candidates for 4-bit weights, by the tokens of a tile. Few tokens: a narrow tile whose four warpgroups share its
# channels, so that few blocks of the grid share a tile. Many: 128 x 256, as much reuse as registers allow.
TILES = (
    Tile(8, 1, 4, 5, 4, split="all"),
    Tile(8, 1, 4, 5, 4, split="all", blocks=128),
    Tile(8, 2, 2, 5, 4, split="all"),
    Tile(8, 1, 2, 5, 4, blocks_per_sm=2, split="all", blocks=132),
    Tile(16, 1, 4, 7, 4, split="all"),
    Tile(16, 1, 4, 7, 4, split="all", blocks=128),
    Tile(16, 1, 4, 4, 4, split="all", blocks=128),
    Tile(16, 2, 2, 5, 4, split="all"),
    Tile(32, 1, 4, 5, 4, split="all"),
    Tile(32, 1, 4, 5, 4, split="all", blocks=128),
    Tile(32, 2, 2, 6, 2, split="all"),
    Tile(64, 1, 2, 8, 2, split="all", blocks=128),
    Tile(64, 2, 1, 5, 2, split="all"),
    Tile(64, 1, 2, 8, 2, split="none"),
    Tile(128, 2, 1, 8, split="all"),
    Tile(128, 2, 1, 8, split="all", blocks=128),
    Tile(128, 1, 2, 4, 2, split="all", blocks=128),
    Tile(128, 1, 2, 4, 2, split="none"),
    Tile(256, 2, 1, 5, split="all"),
    Tile(256, 2, 1, 5, split="all", blocks=128),
    Tile(256, 2, 1, 5, split="none"),
    Tile(256, 2, 1, 5, split="remainder"),
    Tile(256, 2, 1, 5, cluster=2, split="none"),
    Tile(256, 2, 1, 5, cluster=2, split="all"),
)


def choose(device: torch.device, kind: Kind, rows: int, blocks: int, tokens: int) -> Tile:
    """The tile for `tokens` tokens, `rows` output channels and `blocks` blocks of 128 body channels."""
    return _chosen(_card(device), compiler.multiprocessors(device), kind, rows, blocks, _bucket(tokens))


@functools.cache
def _chosen(card: str, multiprocessors: int, kind: Kind, rows: int, blocks: int, bucket: int) -> Tile:
    """The tile for every number of tokens in the bucket."""
    known = _measured(card).get(_key(kind, rows, blocks, bucket))
    return fit(known, kind) if known else default(kind, rows, bucket, multiprocessors)


def default(kind: Kind, rows: int, tokens: int, multiprocessors: int) -> Tile:
    """A good tile without measuring: the rule that the measurements on an H100 suggest."""
    narrow = -(-rows // 64) <= multiprocessors  # row groups: few enough that tiles must be cut to feed every SM
    split_evenly = 128 if narrow and multiprocessors >= 128 else 0
    if tokens <= 8:
        tile = Tile(8, 1, 4, 5, 4, split="all", blocks=split_evenly)
    elif tokens <= 16:
        tile = Tile(16, 1, 4, 7, 4, split="all", blocks=split_evenly)
    elif tokens <= 32:
        tile = Tile(32, 1, 4, 5, 4, split="all", blocks=split_evenly)
    elif tokens <= 64:
        tile = Tile(64, 1, 2, 8, 2, split="all", blocks=split_evenly) if narrow else Tile(64, 2, 1, 5, 2, split="all")
    elif tokens <= 128:
        tile = Tile(128, 1, 2, 4, 2, split="all", blocks=split_evenly) if narrow else Tile(128, 2, 1, 8, split="all")
    elif tokens <= 256:
        tile = Tile(128, 1, 2, 4, 2, split="none") if narrow else Tile(256, 2, 1, 5, split="all")
    else:
        tile = Tile(256, 2, 1, 5, split="none")
    return fit(tile, kind)


def for_experts(kind: Kind, rows: int, experts: int, tokens: int, multiprocessors: int) -> Tile:
    """A tile for `tokens` tokens sorted by expert, as if those that have some had equally many.

    An expert's tokens begin anywhere in a window of whole groups of 8: up to 7 others may come before them.
    """
    active = min(experts, tokens)
    return fit(default(kind, rows * active, -(-tokens // active) + 7, multiprocessors), kind, experts)


def fit(tile: Tile, kind: Kind, experts: int = 0) -> Tile:
    """The same tile with as many stages as shared memory holds for this kind of weight, beside the table of experts."""
    while tile.shared_bytes(BLOCK_BYTES[kind]) + tile.stages * 16 + (experts + 1) * 8 > SHARED_LIMIT:
        tile = replace(tile, stages=tile.stages - 1)
    return tile


def candidates(kind: Kind, rows: int, tokens: int) -> Iterable[Tile]:
    """Tiles worth timing for a problem: about as many tokens as it has, or one bucket fewer."""
    bucket = min(_bucket(tokens), 256)
    for tile in TILES:
        clusters_fit = -(-rows // tile.rows) % tile.cluster == 0
        if tile.tokens in (bucket, bucket // 2) and clusters_fit:
            yield fit(tile, kind)


def tune(
    device: torch.device,
    kind: Kind,
    rows: int,
    blocks: int,
    tokens: int,
    products: Callable[[Tile], list[Callable[[], object]]],
) -> Tile:
    """Time every candidate and keep the fastest; `products` gives the calls to time with a tile, on rotated weights."""
    replays = {tile: timing.capture(products(tile)) for tile in candidates(kind, rows, tokens)}
    times = {tile: statistics.median(samples) for tile, samples in timing.in_turn(replays).items()}
    best = min(times, key=times.__getitem__)
    log.info("%s: %s takes %.2f µs", _key(kind, rows, blocks, tokens), best, times[best])
    _keep(_card(device), {_key(kind, rows, blocks, tokens): best})
    return best


def _bucket(tokens: int) -> int:
    return next((bucket for bucket in BUCKETS if tokens <= bucket), BUCKETS[-1])


def _key(kind: Kind, rows: int, blocks: int, tokens: int) -> str:
    return f"{kind} {rows}x{blocks} m{_bucket(tokens)}"


@functools.cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@functools.cache
def _measured(card: str) -> dict[str, Tile]:
    """What was measured on this kind of card: shipped first, the user's own on top."""
    tables = [Path(__file__).with_name("tiles_h100.json")] if "H100" in card else []
    tables.append(_kept_path(card))
    tiles: dict[str, Tile] = {}
    for table in tables:
        if table.is_file():
            tiles |= {key: Tile(**values) for key, values in json.loads(table.read_text()).items()}
    return tiles


def _kept_path(card: str) -> Path:
    return compiler.cache_directory() / f"tiles-{card.replace(' ', '-')}.json"


def _keep(card: str, tiles: dict[str, Tile]) -> None:
    path = _kept_path(card)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = json.loads(path.read_text()) if path.is_file() else {}
    table |= {key: asdict(tile) for key, tile in tiles.items()}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(table, file, indent=1, sort_keys=True)
    Path(file.name).replace(path)
    forget()


def forget() -> None:
    """Read again what was measured, and choose anew."""
    _measured.cache_clear()
    _chosen.cache_clear()
