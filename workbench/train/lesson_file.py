"""A lesson on disk, so that a run that was killed learns on from the very same decisions.

<name>.safetensors      one row for each learnt position, decisions one after another
    ids_NK, log_probs_NK, log_rest_N
    metadata["workbench"]   JSON: the decisions, each with its tokens and kind
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vectors.errors import InputError
from vectors.formats.atomic import write_atomic
from workbench.train.batches import Decision
from workbench.train.lesson import Lesson
from workbench.train.losses import SoftTargets

__all__ = ["load_lesson", "save_lesson"]

COLUMNS = ("ids_NK", "log_probs_NK", "log_rest_N")


def save_lesson(path: Path, lessons: dict[str, Lesson]) -> None:
    """Write lessons with targets under their names; a reader finds the old file or the new one.

    Raises:
        OutOfSpace: the file cannot be written.
    """
    tensors, about = {}, {}
    for name, lesson in lessons.items():
        about[name] = [asdict(decision) for decision in lesson.decisions]
        joined = SoftTargets.join(list(lesson.targets or ()))
        tensors.update({f"{name}.{column}": getattr(joined, column) for column in COLUMNS})
    write_atomic(path, save(tensors, metadata={"workbench": json.dumps(about)}))


def load_lesson(path: Path) -> dict[str, Lesson]:
    """Return the lessons that `save_lesson` wrote, equal to the bit.

    Raises:
        InputError: the file is not one of these.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["workbench"])
            found = {}
            for name, rows in about.items():
                joined = SoftTargets(*(file.get_tensor(f"{name}.{column}") for column in COLUMNS))
                for row in rows:
                    row.update({key: tuple(row[key]) for key in ("context_ids", "decision_ids")})
                decisions = [Decision(**row) for row in rows]
                lengths = [len(decision.decision_ids) for decision in decisions]
                found[name] = Lesson(decisions, joined.split(lengths))
        return found
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"The decisions in {path} cannot be read ({error}); start the training anew."
        ) from error
