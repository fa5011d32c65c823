"""Where the weights of task vectors come from, a part at a time and from any thread.

A fine-tune is read as bits, from its own checkpoint folder or out of the library, where it is kept
as the XOR with its base: one tensor is restored and proven, then read in parts.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vectors.errors import ModelNotSupported, ShapeMismatch
from vectors.store.checkpoint import Checkpoint, Slot
from vectors.store.manifests import Manifest
from vectors.tasks.delta import raw_view

if TYPE_CHECKING:
    from vectors.store.library import Library

__all__ = ["FolderTerm", "LibraryTerm", "Reader", "Term"]

Bytes = NDArray[np.uint8]


class Reader(ExitStack):
    """The files of a checkpoint, open for reading at any place; close it when done."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self._where: dict[str, tuple[BinaryIO, Slot]] = {}
        for file in checkpoint.files:
            opened = self.enter_context(file.path.open("rb", buffering=0))
            self._where.update({slot.name: (opened, slot) for slot in file.slots})

    def into(self, name: str, start: int, out: Bytes) -> None:
        """Fill `out` with the tensor's bytes from `start`.

        Raises:
            ModelNotSupported: the file has become shorter.
        """
        file, slot = self._where[name]
        done = 0
        while done < len(out):
            # Not a memory map: a file that is cut while it is read must not kill the process.
            got = os.preadv(file.fileno(), [out[done:].data], slot.start + start + done)
            if not got:
                raise ModelNotSupported(f"{file.name} ended too early; download the model again.")
            done += got


class Term(Protocol):
    """The fine-tuned side of a task vector."""

    key: str
    whole: bool  # whether a tensor is restored as a whole, so that one thread should have it all

    def changes(self, name: str) -> bool:
        """Whether the tensor may differ from the base's."""
        ...

    def tensor(self, name: str, base: Tensor) -> Tensor:
        """The whole tensor, given the base's."""
        ...

    def into(self, name: str, start: int, out: Bytes) -> None:
        """Fill `out` with the tensor's bytes from `start`."""
        ...

    def close(self) -> None:
        """Let go of files and memory."""
        ...


class FolderTerm:
    """A fine-tune in a checkpoint folder.

    Raises:
        ModelNotSupported: no weights there.
        ShapeMismatch: other tensors than the base's.
    """

    whole = False

    def __init__(self, key: str, folder: Path, base: Checkpoint) -> None:
        self.key = key
        self._checkpoint = Checkpoint(folder)
        for name in base:
            mine = self._checkpoint.slot(name) if name in self._checkpoint else None
            theirs = base.slot(name)
            if mine is None or (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
                there = "lacks it" if mine is None else f"has it as {mine.dtype} {list(mine.shape)}"
                raise ShapeMismatch(
                    f"The base has '{name}' as {theirs.dtype} {list(theirs.shape)} and {folder} "
                    f"{there}; merge fine-tunes of this base in its own type."
                )
        extra = sorted(set(self._checkpoint) - set(base))
        if extra:
            raise ShapeMismatch(
                f"{folder} has a tensor '{extra[0]}' that the base lacks; merge fine-tunes of this "
                "base, without copies of tied tensors."
            )
        self._reader = Reader(self._checkpoint)

    def changes(self, name: str) -> bool:
        """True: only reading would tell."""
        return True

    def tensor(self, name: str, base: Tensor) -> Tensor:
        """The whole tensor."""
        return self._checkpoint[name]

    def into(self, name: str, start: int, out: Bytes) -> None:
        """Fill `out` with the tensor's bytes from `start`."""
        self._reader.into(name, start, out)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


class LibraryTerm:
    """A task vector of the library, on the base that it was made for."""

    whole = True

    def __init__(
        self, key: str, library: Library, task: Manifest, base: Mapping[str, Tensor]
    ) -> None:
        self.key = key
        self._library, self._task, self._base = library, task, base
        self._last = threading.local()

    def changes(self, name: str) -> bool:
        """Whether the task vector has the tensor."""
        return name in self._task.tensors

    def tensor(self, name: str, base: Tensor) -> Tensor:
        """The whole tensor, restored and proven."""
        return self._library.tuned_tensor(self._task, name, base)

    def into(self, name: str, start: int, out: Bytes) -> None:
        """Fill `out`; each thread keeps the tensor that it read last."""
        if getattr(self._last, "name", None) != name:
            self._last.name, self._last.raw = None, None
            self._last.raw = raw_view(self.tensor(name, self._base[name]))
            self._last.name = name
        out[:] = self._last.raw[start : start + len(out)]

    def close(self) -> None:
        """Drop what is kept."""
        self._last = threading.local()
