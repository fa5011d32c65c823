"""The file by which an engine is found: `engines/<base>.json`, one per home and base."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from workbench.engines.vllm.watchdog import is_alive

__all__ = ["Registration", "find", "read", "write"]


class Registration(BaseModel):
    """What others need to know of an engine."""

    model_config = ConfigDict(frozen=True)
    base: str
    model: str
    checkpoint: str
    url: str
    token: str
    owner: str
    supervisor: str = ""
    state: Literal["starting", "ready", "failed"] = "starting"
    stage: str = "starting Python"
    error: str = ""
    hello: dict[str, Any] = {}
    started_at: float = 0.0
    ready_at: float = 0.0

    @property
    def alive(self) -> bool:
        """Whether its supervisor, or while that starts its owner, still runs."""
        return is_alive(self.supervisor or self.owner)


def write(path: Path, registration: Registration) -> None:
    """Replace the file at once; it holds the token, so only its owner may read it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".registration-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(registration.model_dump_json())
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: Path) -> Registration | None:
    """The registration at `path`, or None where there is none that can be read."""
    try:
        return Registration.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError, ValidationError):
        return None


def find(path: Path) -> Registration | None:
    """The registration of an engine that lives or starts; a dead one's file does not count."""
    found = read(path)
    return found if found is not None and found.state != "failed" and found.alive else None
