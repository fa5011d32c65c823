"""A small library and small vectors that every test of the store uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vectors.store import Library
from vectors.types import SteeringVector

BASE = "ba" * 32


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")


@pytest.fixture
def vector() -> Callable[..., SteeringVector]:
    """Makes the vector number `seed`."""

    def make(seed: int = 0, **info: object) -> SteeringVector:
        v_D = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        return SteeringVector(BASE, {1: v_D / v_D.norm()}, {1: 2.0}, 1, {"seed": seed, **info})

    return make
