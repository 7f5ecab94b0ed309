"""Where the files are that travel with the code: the CUDA sources and the recipes that ship."""

from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parent


def resource_directory(name: Literal["cuda", "recipes"]) -> Path:
    """The directory `name`: at the top of a source checkout, or inside the installed package."""
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    return _PACKAGE / "_data" / name
