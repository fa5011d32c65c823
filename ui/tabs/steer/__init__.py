"""Steer: talk to the model with and without the direction, side by side."""

from ui.tabs.steer.tab import build

__all__ = ["build"]
