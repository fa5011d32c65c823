"""Extract: from pairs of texts to a direction, and where in the model it is clearest."""

from ui.tabs.extract.tab import build

__all__ = ["build"]
