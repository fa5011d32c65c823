"""How the plugin is set, by environment variables that reach every process of vLLM."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from vectors.errors import InputError

__all__ = ["CAPTURE", "OPERATORS", "ROWS", "Settings", "has_cuda"]

ROWS = "WORKBENCH_ROWS"
OPERATORS = "WORKBENCH_OPERATORS"
CAPTURE = "WORKBENCH_CAPTURE"
PROJECTING = 32
DEFAULT_ROWS = 512


def has_cuda() -> bool:
    """Whether this machine has an NVIDIA driver, asked without loading anything."""
    return Path("/proc/driver/nvidia/version").exists()


@dataclass(frozen=True)
class Settings:
    """What is compiled into the model.

    Args:
        rows: most distinct (steering, phase) pairs at once that only add.
        operators: whether there are rows that can do more; additions alone are cheaper.
        projecting: how many of those there are.
        capture: whether activations can be read from requests.
    """

    rows: int = DEFAULT_ROWS
    operators: bool = True
    projecting: int = PROJECTING
    capture: bool = True

    @classmethod
    def of_environment(cls) -> Settings:
        """Read `WORKBENCH_ROWS`, `WORKBENCH_OPERATORS` (`all` or `add`) and `WORKBENCH_CAPTURE` (`1`
        or `0`).

        Under a compiler and CUDA graphs every step pays for what is compiled in, so there `add` and
        `0` are the defaults; in eager mode only the steps that use an operator, or capture, do.

        Raises:
            InputError: another value.
        """
        rows = os.environ.get(ROWS, str(DEFAULT_ROWS))
        operators = os.environ.get(OPERATORS, "add" if has_cuda() else "all")
        capture = os.environ.get(CAPTURE, "0" if has_cuda() else "1")
        # One request alone can need a row for its prompt and another for its decoding.
        if not rows.isdigit() or not 2 <= int(rows) <= 100_000:
            raise InputError(f"{ROWS} must be a number from 2 to 100000, not {rows[:40]!r}.")
        if operators not in ("all", "add"):
            raise InputError(f"{OPERATORS} must be 'all' or 'add', not {operators[:40]!r}.")
        if capture not in ("0", "1"):
            raise InputError(f"{CAPTURE} must be 1 or 0, not {capture[:40]!r}.")
        return cls(int(rows), operators == "all", capture=capture == "1")

    def capacity(self, requests: int) -> tuple[int, int]:
        """How many rows for additions and for the rest, where so many requests can run at once.

        A request needs at most two rows, so that twice as many are never short.
        """
        most = 2 * requests
        return min(self.rows, most), min(self.projecting, most) if self.operators else 0

    def salt(self) -> dict[str, object]:
        """What vLLM's compile cache must tell apart."""
        return {"edit": 1, **asdict(self)}
