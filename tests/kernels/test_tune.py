"""Which tile a problem gets: always one that fits, by rule where nothing was measured, else what was measured."""

import itertools
from pathlib import Path

import pytest
import torch

from atomcli.kernels import tune
from atomcli.kernels.layouts import BLOCK_BYTES, Kind
from atomcli.kernels.tiles import SHARED_LIMIT, Tile, deal


@pytest.mark.parametrize("kind", ["w4", "w8", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 9, 17, 33, 65, 129, 257, 5000])
@pytest.mark.parametrize("rows", [64, 4096, 28672])
def test_the_rules_tile_fits_and_holds_the_tokens(kind: Kind, tokens: int, rows: int) -> None:
    tile = tune.default(kind, rows, tokens, 132)
    assert tile.shared_bytes(BLOCK_BYTES[kind]) + 16 * tile.stages <= SHARED_LIMIT
    assert tile.stages >= 2
    assert tile.tokens >= min(tokens, 128)


def test_every_shipped_choice_fits() -> None:
    shipped = tune._measured("NVIDIA H100 80GB HBM3")
    assert len(shipped) > 100
    for key, tile in shipped.items():
        assert tune.fit(tile, key.split()[0]) == tile, key


def test_experts_windows_leave_room_for_others_tokens() -> None:
    assert tune.for_experts("w4", 4096, 8, 8, 132).tokens == 8  # a token each lies within one group of 8
    assert tune.for_experts("w4", 4096, 8, 16, 132).tokens == 16  # two may lie in two of them
    assert tune.for_experts("w4", 4096, 128, 1, 132).tokens == 8
    assert tune.for_experts("w4", 4096, 8, 4096, 132).tokens == 256
    assert all(tune.for_experts("w4", 4096, 8, tokens, 132).cluster == 1 for tokens in (1, 64, 999))


@pytest.mark.parametrize("tokens", [1, 500, 1000, 5000, 8000, 30000])
def test_many_experts_table_fits_beside_the_ring(tokens: int) -> None:
    for rows, kind, experts in itertools.product((64, 512, 4096), ("w4", "w8"), (128, 256)):
        tile = tune.for_experts(kind, rows, experts, tokens, 132)
        static_bytes = 16 * tile.stages + 2 * (experts + 1) * 4  # barriers and the table of experts
        assert tile.shared_bytes(BLOCK_BYTES[kind]) + static_bytes <= SHARED_LIMIT


def test_a_measured_choice_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "_card", lambda device: "A card")
    monkeypatch.setattr(tune.compiler, "multiprocessors", lambda device: 132)
    tune.forget()
    device = torch.device("cpu")
    ruled = tune.choose(device, "w4", 512, 7, 100)
    measured = Tile(16, 1, 4, 4, 4, split="all")
    tune._keep("A card", {tune._key("w4", 512, 7, 100): measured})
    assert tune.choose(device, "w4", 512, 7, 128) == measured != ruled
    assert tune.choose(device, "w4", 512, 7, 129) == tune.default("w4", 512, 129, 132)
    tune.forget()


@pytest.mark.parametrize("card", ["NVIDIA H100 80GB HBM3", "A card"])
def test_a_choice_of_a_bucket_is_each_of_its_tokens(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_card", lambda device: card)
    monkeypatch.setattr(tune.compiler, "multiprocessors", lambda device: 132)
    device, measured = torch.device("cpu"), tune._measured(card)
    for tokens, rows in itertools.product((*range(1, 600), 1023, 1024, 1025, 4096, 4097, 9000), (4096, 22016)):
        known = measured.get(tune._key("w4", rows, 32, tokens))
        expected = tune.fit(known, "w4") if known else tune.default("w4", rows, tokens, 132)
        assert tune.choose(device, "w4", rows, 32, tokens) == expected


def test_tiles_are_dealt_in_turn_or_cut_up() -> None:
    assert deal(Tile(256), 300, 132) == (132, 0)
    assert deal(Tile(256), 100, 132) == (100, 0)
    assert deal(Tile(256, split="remainder"), 300, 132) == (132, 36)
    assert deal(Tile(256, split="all", blocks=128), 300, 132) == (128, 300)
    assert deal(Tile(256, split="all", cluster=2), 300, 132) == (132, 150)
