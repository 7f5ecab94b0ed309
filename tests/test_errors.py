"""Errors are sentences: they begin with a capital, or with the name of something that is written as it is."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from atomcli import errors

PACKAGE = Path(__file__).parents[1] / "atomcli"
KINDS = {name for name in vars(errors) if name.endswith("Error")}
NAMES = {"atom", "order", "pip", "stdout", "torch"}  # what begins a sentence and is spelled small


def texts(node: ast.expr) -> Iterator[str]:
    """How an argument can begin; nothing where it begins with a value."""
    if isinstance(node, ast.IfExp):
        yield from (*texts(node.body), *texts(node.orelse))
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def raised(path: Path) -> Iterator[tuple[int, str]]:
    """(line, beginning) of every message and hint that a file makes an error of."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in KINDS:
            for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
                yield from ((argument.lineno, text) for text in texts(argument))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_errors_begin_as_sentences(path: Path) -> None:
    for line, text in raised(path):
        word = re.match(r"[a-z]+(?:'[a-z]+)?(?=[ ,:])", text)
        assert word is None or word[0] in NAMES, f"{path}:{line}: {text!r} begins small"
