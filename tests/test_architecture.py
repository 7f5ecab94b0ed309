"""The house: a room uses only rooms below it, and the lower rooms need few libraries."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "atomcli"

# What each room may use of ours. What stands in none of the sets is a direction nobody agreed on.
GROUND = {"errors", "resources", "version"}
MAY_USE = {
    "errors": set(),
    "version": set(),
    "resources": set(),
    "units": set(),
    "formats": {"errors"},
    "recipe_errors": set(),
    "recipe": {"errors", "resources", "formats", "recipe_errors"},
    "overrides": {"errors", "formats", "recipe"},
    "models": {"errors"},
    "checkpoint": {*GROUND, "units", "formats"},
    "text": {"errors", "checkpoint"},
    "algorithms": {"errors", "formats", "kernels"},
    "kernels": {"errors", "resources", "formats"},
    "runtime": {"errors", "formats", "models", "kernels"},
    "pipeline": {*GROUND, "formats", "models", "checkpoint", "text", "algorithms", "recipe", "runtime"},
    "integrations": {
        *GROUND,
        "units",
        "formats",
        "models",
        "checkpoint",
        "algorithms",
        "kernels",
        "runtime",
        "pipeline",
    },
    "evaluation": {*GROUND, "formats", "checkpoint", "text", "runtime", "pipeline", "integrations"},
    "benchmarks": {
        *GROUND,
        "formats",
        "models",
        "checkpoint",
        "text",
        "kernels",
        "runtime",
        "pipeline",
        "integrations",
        "recipe",
        "overrides",
        "evaluation",
    },
}
MAY_USE["reporting"] = {"errors", "units", "formats", "checkpoint", "benchmarks"}
MAY_USE["cli"] = set(MAY_USE)
# `import atomcli` registers the quantizer, and `python -m atomcli` is the command line.
MAY_USE |= {"__init__": {"integrations", "version"}, "__main__": {"cli"}}

LIBRARIES = {"torch", "numpy", "safetensors", "transformers", "cupy"}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in it, by their full names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def files_of(room: str) -> list[Path]:
    return [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").is_file() else sorted((PACKAGE / room).rglob("*.py"))


def test_every_room_is_known() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or list(path.glob("*.py"))}
    assert rooms == MAY_USE.keys()


@pytest.mark.parametrize("room", sorted(MAY_USE))
def test_a_room_uses_only_rooms_below_it(room: str) -> None:
    for path in files_of(room):
        for name in imports(path):
            package, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if package == "atomcli" and other != room:
                assert other in MAY_USE[room], f"{path.relative_to(PACKAGE)} imports {name}"


def test_no_two_rooms_use_each_other() -> None:
    order: list[str] = []
    while len(order) < len(MAY_USE):
        free = [room for room in MAY_USE if room not in order and MAY_USE[room] <= {*order}]
        assert free, f"the arrows between {sorted(MAY_USE.keys() - {*order})} run in a circle"
        order += free


@pytest.mark.parametrize("room", ["formats", "kernels", "runtime"])
def test_the_lower_rooms_need_few_libraries(room: str) -> None:
    for path in files_of(room):
        for name in imports(path):
            package = name.partition(".")[0]
            known = package in LIBRARIES or package == "atomcli" or package in sys.stdlib_module_names
            assert known, f"{path.relative_to(PACKAGE)} imports {name}"
