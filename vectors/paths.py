"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path

from vectors.errors import InputError

__all__ = ["expanded"]


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` and `~user` replaced.

    Raises:
        InputError: a user without a home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{os.fspath(path)[:80]!r} is no path here ({error}); write it out."
        ) from error
