"""Library: everything that was kept, its history, and what can be made of it."""

from ui.tabs.library.tab import build

__all__ = ["build"]
