"""Checkpoints of tiny models, made by the compress road in schemes that other engines can or can't hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atomcli.checkpoint.source import open_source
from atomcli.pipeline.compress import compress
from atomcli.recipe import Recipe, load_recipe, parse_recipe
from tests.helpers.tiny import random_parent, random_tokens

# Sizes that groups of 32 cut evenly, as those of real models are cut by groups of 128.
SIZES: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 128, "head_dim": 32}


def small(name: str, **sections: Any) -> Recipe:
    """A shipped recipe with groups of 32 where it has groups of 128, in rounding to nearest."""
    data = load_recipe(name).resolved()
    for section in ("weights", "activations"):
        if data[section]["group"] == 128:
            data[section]["group"] = 32
    if data["outliers"]["channels"]:
        data["outliers"]["channels"] = 16
    data["weights"]["rounding"] = "rtn"
    for section, values in sections.items():
        data[section] = data[section] | values if isinstance(values, dict) else values
    return parse_recipe(data)


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A family's tiny random model on disk, made once."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
        key = f"{family}-{dtype}-{overrides}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("parent") / family
            random_parent(family, dtype, **(SIZES | overrides))[0].save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory, parent: Callable[..., Path]) -> Callable[..., Path]:
    """A checkpoint of such a model by a recipe, made once."""
    made: dict[str, Path] = {}

    def make(recipe: Recipe, family: str = "llama", **options: Any) -> Path:
        key = f"{family}-{options}-{recipe.resolved()}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoint") / recipe.name
            source = open_source(str(parent(family, **options)))
            compress(source, recipe, made[key], tokens=random_tokens(6, 24), device="cpu")
        return made[key]

    return make
