"""vLLM's Qwen3.5 without torchvision, which no build for CPU torch need be there for.

Its file imports the vision models' image processors, and those import torchvision, although text
needs none of it. While that one file is imported, modules stand in whose use raises ImportError.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["install"]

WANTED = "vllm.model_executor.models.qwen3_5"
NAMES = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


def install() -> None:
    """Watch for the import of `WANTED`, where torchvision is absent; once."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Absent(ModuleType):
    """A module that can be imported and not used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        # What makes it a package.
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"{self.__name__}.{name} is not here: torchvision is not installed, and only text "
            "models work without it."
        )


@contextmanager
def _stand_ins() -> Iterator[None]:
    from transformers.utils.import_utils import is_torchvision_available  # noqa: PLC0415

    # transformers remembers this answer; it must be the true one.
    is_torchvision_available()
    for name in NAMES:
        module = sys.modules[name] = _Absent(name)
        parent, _, child = name.rpartition(".")
        if parent:
            vars(sys.modules[parent])[child] = module
    try:
        yield
    finally:
        for name in NAMES:
            del sys.modules[name]


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != WANTED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with _stand_ins():
            self._loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
