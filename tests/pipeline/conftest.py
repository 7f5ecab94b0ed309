"""Tiny random models on disk, and recipes that fit them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atomcli.checkpoint.source import Source, open_source
from atomcli.recipe import Recipe, parse_recipe
from tests.helpers.tiny import random_parent, random_tokens


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Source]:
    """A family's tiny random model as a source on disk, made once."""
    made: dict[str, Path] = {}

    def make(name: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> Source:
        key = f"{name}-{dtype}-{overrides}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("parent") / name
            random_parent(name, dtype, **overrides)[0].save_pretrained(made[key])
        return open_source(str(made[key]))

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return random_tokens(6, 24)


def small_recipe(**sections: Any) -> Recipe:
    """atom-w4a4 at the size of the tiny models: groups of 16, 16 outliers; `sections` override its keys."""
    data: dict[str, Any] = {
        "name": "small",
        "weights": {"format": "int4", "group": 16, "rounding": "gptq", "clip": 0.85},
        "activations": {"format": "int4", "group": 16, "clip": 0.9},
        "outliers": {"channels": 16},
        "kv_cache": {"format": "int4", "position": "after_rope", "hadamard": True, "bias_free": True},
    }
    for key, value in sections.items():
        data[key] = data[key] | value if isinstance(data.get(key), dict) and isinstance(value, dict) else value
    return parse_recipe(data)


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file of a checkpoint but its report, which holds timings."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != "atom_report.json"}
