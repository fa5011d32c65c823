"""Steering Workbench: extract, steer, verify, train in, compare, and version behaviours.

`Workbench` is the Python API; the page and the command line do the same through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.service import Workbench

__all__ = ["Workbench"]


def __getattr__(name: str) -> Any:
    # Late, so that `workbench --help` and the engine's plugin do not pay for what they do not use.
    if name == "Workbench":
        from workbench.service import Workbench  # noqa: PLC0415

        return Workbench
    raise AttributeError(f"module 'workbench' has no attribute {name!r}")
