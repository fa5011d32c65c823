"""Where things live, and the few knobs of the machine; every path of the project comes from here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from vectors.errors import InputError, OutOfSpace

__all__ = ["WINDOW", "Home", "package_version"]

WINDOW = "WORKBENCH_WINDOW"
"""Most positions that an engine is started with."""


@dataclass(frozen=True)
class Home:
    """The folder that holds all state: `$WORKBENCH_HOME`, or the platform's data folder."""

    root: Path

    @classmethod
    def default(cls) -> Home:
        """The home that the environment names."""
        named = os.environ.get("WORKBENCH_HOME")
        return cls.at(named or platformdirs.user_data_path("steering-workbench", appauthor=False))

    @classmethod
    def at(cls, root: str | os.PathLike[str]) -> Home:
        """The home at `root`, made if it is missing.

        Raises:
            InputError: not a path.
            OutOfSpace: the folder cannot be made or written.
        """
        try:
            home = cls(Path(root).expanduser().resolve())
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{os.fspath(root)[:80]!r} is not a folder for WORKBENCH_HOME ({error}); name another."
            ) from error
        try:
            for folder in (home.models, home.library, home.runs, home.engines):
                folder.mkdir(parents=True, exist_ok=True)
            probe = home.root / f".write-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OutOfSpace(
                f"The home folder {home.root} cannot be written ({error.strerror}); "
                "free the space or set WORKBENCH_HOME to a folder that can."
            ) from error
        return home

    @property
    def models(self) -> Path:
        """Checkpoints that the workbench fetched or made."""
        return self.root / "models"

    @property
    def library(self) -> Path:
        """The versioned store."""
        return self.root / "library"

    @property
    def runs(self) -> Path:
        """One folder for each long piece of work."""
        return self.root / "runs"

    @property
    def engines(self) -> Path:
        """Registrations, logs and caches of running engines."""
        return self.root / "engines"

    @property
    def keys(self) -> Path:
        """The key that signs what this home attests; made when it is first needed."""
        return self.root / "keys"

    @property
    def weights(self) -> Path:
        """Checkpoints materialised from recipes; they can be made again and may be deleted."""
        return self.root / "engines" / "weights"

    @property
    def loras(self) -> Path:
        """LoRAs made of recipes; they can be made again and may be deleted."""
        return self.root / "engines" / "loras"


def package_version(name: str) -> str:
    """The installed version of a distribution, or "" where it is missing."""
    from importlib import metadata  # noqa: PLC0415  # help must answer at once

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
