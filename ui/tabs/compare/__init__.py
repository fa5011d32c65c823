"""Compare: the untrained, the steered and the trained model on the same prompts."""

from ui.tabs.compare.tab import build

__all__ = ["build"]
