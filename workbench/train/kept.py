"""What a training run keeps until its end, so that one that was killed goes on where it was."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vectors.errors import InputError
from vectors.formats.atomic import write_atomic
from workbench.train.lesson import Lesson
from workbench.train.lesson_file import load_lesson, save_lesson

__all__ = ["Kept", "Prepared"]


@dataclass(frozen=True)
class Prepared:
    """Everything that the first step needs.

    Args:
        learnt, held_out: decisions with their targets.
        plan: JSON: what the source says of itself, files to keep, and for each held-out decision
            the context of its teacher where it is another.
    """

    learnt: Lesson
    held_out: Lesson
    plan: dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """Files in the run's folder, by the task vector's name: one run may train several times.

    The lesson is written last: where it is there, the plan is there, too.
    """

    lesson: Path | None
    plan: Path | None
    checkpoint: Path | None
    contexts: Path | None

    @classmethod
    def of(cls, folder: Path | None, name: str) -> Kept:
        if folder is None:
            return cls(None, None, None, None)
        return cls(
            folder / f"{name}.lesson.safetensors",
            folder / f"{name}.plan.json",
            folder / f"{name}.checkpoint.safetensors",
            folder / f"{name}.contexts",
        )

    def load(self) -> Prepared | None:
        """What was prepared before, or None.

        Raises:
            InputError: its files are damaged.
        """
        if self.lesson is None or self.plan is None or not self.lesson.exists():
            return None
        found = load_lesson(self.lesson)
        try:
            plan = json.loads(self.plan.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(
                f"The plan {self.plan} cannot be read ({error}); start the training anew."
            ) from error
        return Prepared(found["learnt"], found.get("held_out", Lesson([])), plan)

    def save(self, prepared: Prepared) -> Prepared:
        """Write what was prepared and return it."""
        if self.lesson is not None and self.plan is not None:
            write_atomic(self.plan, json.dumps(prepared.plan).encode())
            lessons = {"learnt": prepared.learnt, "held_out": prepared.held_out}
            save_lesson(self.lesson, {n: x for n, x in lessons.items() if x.decisions})
        return prepared

    def drop(self) -> None:
        """Delete the files: the task vector is in the library."""
        for file in (self.lesson, self.plan, self.checkpoint):
            if file is not None:
                file.unlink(missing_ok=True)
        if self.contexts is not None:
            shutil.rmtree(self.contexts, ignore_errors=True)
