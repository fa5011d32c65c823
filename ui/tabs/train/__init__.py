"""Train: teach the weights what the direction does."""

from ui.tabs.train.tab import build

__all__ = ["build"]
