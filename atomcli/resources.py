"""Where files are: what travels with the code (CUDA sources, recipes), and the cache of what atom fetched or made."""

import os
from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parent


def resource_directory(name: Literal["cuda", "recipes"]) -> Path:
    """The directory `name`: at the top of a source checkout, or inside the installed package."""
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    return _PACKAGE / "_data" / name


def cache_directory() -> Path:
    """The user's cache: $ATOM_CACHE, else $XDG_CACHE_HOME/atom, else ~/.cache/atom. Nobody needs to keep it."""
    if chosen := os.environ.get("ATOM_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "atom"
