"""Registers atom's quantizer with transformers as soon as transformers is there, and not before.

transformers finds third-party quantizers only by being told, and importing it takes seconds; `import atomcli` must
be instant. So the registration waits for the module that holds transformers' table of quantizers.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLE = "transformers.quantizers.auto"


def register_when_transformers_loads() -> None:
    """Register now if transformers' table of quantizers is loaded, else when it is; idempotent."""
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterTable) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTable())


def _register() -> None:
    importlib.import_module("atomcli.integrations.transformers")


class _AfterTable(MetaPathFinder):
    """Finds nothing itself; runs the registration once right after the table's module has been executed."""

    def __init__(self) -> None:
        self._asking_others = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE or self._asking_others:
            return None
        self._asking_others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking_others = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
