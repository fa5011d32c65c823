"""A fine-tuned Hugging Face checkpoint folder, held against the base that it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vectors.errors import ModelMismatch, ShapeMismatch
from vectors.store.checkpoint import Checkpoint
from vectors.tasks.delta import raw_bytes

__all__ = ["Renamed", "check_same_model", "is_tied", "tuned_tensors"]

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


class Renamed(Mapping[str, Tensor]):
    """Tensors of a checkpoint, some of them under other names; each look-up reads one tensor."""

    def __init__(self, tensors: Mapping[str, Tensor], where: Mapping[str, str]) -> None:
        self._tensors, self._where = tensors, dict(where)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._where[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def tuned_tensors(base: Checkpoint, tuned: Checkpoint, source: str) -> Mapping[str, Tensor]:
    """Return the tuned model's tensors under the base's names, each of the base's there once.

    An output head that one of the two leaves out because it is the embedding's own is put in or
    left out accordingly, if its bits are the embedding's; nothing else may be lacking or more.

    Raises:
        ShapeMismatch: tensors of the base that are missing, or tensors that it does not have.
    """
    where = {name: name for name in tuned}
    more, less = set(tuned) - set(base), set(base) - set(tuned)
    if more == {HEAD} and not less:
        embedding = _embedding(tuned)
        if embedding is not None and _equal(tuned[HEAD], tuned[embedding]):
            del where[HEAD]
            more = set()
    elif less == {HEAD} and not more:
        embedding = _embedding(base)
        if embedding is not None and _equal(base[HEAD], base[embedding]):
            where[HEAD] = embedding
            less = set()
    if more or less:
        kind = "lacks" if less else "has"
        some = ", ".join(f"'{name[:80]}'" for name in sorted(less or more)[:3])
        raise ShapeMismatch(
            f"{source} {kind} {len(less or more)} tensors that the base "
            f"{'has' if less else 'does not have'} ({some}); use the checkpoint of a model that "
            "was fine-tuned from this base."
        )
    return Renamed(tuned, where)


def check_same_model(base_dir: Path, tuned_dir: Path) -> None:
    """Raise ModelMismatch where the two folders differ in architecture or vocabulary.

    Equal shapes do not make equal tokens: the numbers of the tokens have to be the same too.
    """
    ours, theirs = (_json(folder / "config.json") for folder in (base_dir, tuned_dir))
    for key in ("model_type", "vocab_size"):
        if key in ours and key in theirs and ours[key] != theirs[key]:
            raise ModelMismatch(
                f"{tuned_dir} has {key} {theirs[key]!r:.60} and the base {ours[key]!r:.60}; "
                "give the base that it was fine-tuned from with --model."
            )
    tokens = [_vocabulary(folder) for folder in (base_dir, tuned_dir)]
    if all(tokens) and tokens[0] != tokens[1]:
        other = sum(tokens[1].get(token) != number for token, number in tokens[0].items())
        raise ModelMismatch(
            f"{tuned_dir} has another vocabulary than the base ({other} tokens differ); "
            "a task vector needs the same one."
        )


def is_tied(base_dir: Path) -> bool:
    """Whether the base's output head is its embedding."""
    config = _json(base_dir / "config.json")
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else config
    return bool(inner.get("tie_word_embeddings", config.get("tie_word_embeddings", True)))


def _embedding(tensors: Checkpoint) -> str | None:
    found = [n for n in tensors if n.endswith(EMBEDDINGS)]
    return found[0] if len(found) == 1 else None


def _equal(one: Tensor, two: Tensor) -> bool:
    same = one.shape == two.shape and one.dtype == two.dtype
    return same and raw_bytes(one) == raw_bytes(two)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _vocabulary(folder: Path) -> dict[str, int]:
    """Token to number, from tokenizer.json; empty where there is none that lists its tokens."""
    found = _json(folder / "tokenizer.json")
    inner, added = found.get("model"), found.get("added_tokens")
    known = inner.get("vocab") if isinstance(inner, dict) else None
    tokens = dict(known) if isinstance(known, dict) else {}
    for row in added if isinstance(added, list) else []:
        if isinstance(row, dict) and isinstance(row.get("content"), str):
            tokens[row["content"]] = row.get("id")
    return tokens
