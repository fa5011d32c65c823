"""Extract a steering vector: activations, directions, diagnostics, the best block, the doses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vectors.errors import InputError, NotSteerable
from vectors.steering.diagnostics import FEWEST_TO_TELL, Separation, separation, steerable
from vectors.steering.directions import direction
from vectors.types import Method, SteeringVector
from workbench.data.contrast import ContrastPair, ContrastSet
from workbench.data.templates import Sample, sample
from workbench.extract.readers import Reader
from workbench.extract.realise import asking, realise
from workbench.models.capture import Position
from workbench.settings import package_version

__all__ = ["Extraction", "extract"]

SUGGESTED_DOSE = 0.2
# The last blocks separate well and steer badly: hardly anything is left to act on the addition.
USABLE_DEPTH = (0.25, 0.85)

Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Extraction:
    """A vector, and how well each block of it tells the held-out pairs apart."""

    vector: SteeringVector
    blocks: tuple[Separation, ...]
    steerable: str
    words: str
    contrast: ContrastSet
    seconds: float

    def summary(self) -> dict[str, Any]:
        """The result as JSON, for charts and tables."""
        rows = [
            {"block": b, **asdict(found), "norm": self.vector.mean_norms[b]}
            for b, found in enumerate(self.blocks)
        ]
        return {
            "best_block": self.vector.best_block,
            "steerable": self.steerable,
            "words": self.words,
            "blocks": rows,
            "suggested_dose": SUGGESTED_DOSE,
            "contrast": {
                "name": self.contrast.name,
                "digest": self.contrast.digest,
                "train": len(self.contrast.train),
                "held_out": len(self.contrast.held_out),
            },
            "seconds": self.seconds,
        }


def extract(
    reader: Reader,
    contrast: ContrastSet,
    *,
    method: Method = Method.MEAN_DIFFERENCE,
    position: Position = "completion-mean",
    report: Report = lambda share, words: None,
) -> Extraction:
    """Return the steering vector of `contrast` for the model.

    Directions are read from the training pairs; everything that is said of them is measured on the
    held-out pairs.

    Raises:
        InputError: a position at which both sides of a pair are the same.
        NotSteerable: the two sides do not differ.
        PromptTooLong: a pair does not fit the model's window.
    """
    if position == "prompt-last":
        raise InputError(
            "At the prompt's last token both sides of a pair have read the same, so there is no "
            "direction; choose completion-mean or last."
        )
    started = time.monotonic()
    asked = asking(contrast)
    contrast = realise(reader, contrast, report) if contrast.by_instruction else contrast
    pairs = [*contrast.train, *contrast.held_out]
    sides = [_samples(reader, pairs, side) for side in ("positive", "negative")]
    means_LND, norms_LN = reader.means([*sides[0], *sides[1]], position, report)
    pos_LND, neg_LND = means_LND.chunk(2, dim=1)
    n = len(contrast.train)
    directions: dict[int, Tensor] = {}
    found: list[Separation] = []
    for block in range(len(means_LND)):
        directions[block] = direction(method, pos_LND[block, :n], neg_LND[block, :n])
        found.append(separation(directions[block], pos_LND[block, n:], neg_LND[block, n:]))
        report(1.0, f"measuring block {block}")
    train_norms_LN = torch.cat([norms_LN[:, :n], norms_LN[:, len(pairs) : len(pairs) + n]], 1)
    best = best_block(found)
    verdict = steerable(found[best], len(contrast.held_out))
    info = {
        "method": str(method),
        "position": position,
        "model": reader.info.name,
        "contrast": {
            "name": contrast.name,
            "digest": contrast.digest,
            "pairs": len(pairs),
            **asked,
        },
        "steerable": verdict,
        "suggested_dose": SUGGESTED_DOSE,
        "held_out": asdict(found[best]),
        "versions": {
            x: package_version(x) for x in ("torch", "transformers", "steering-workbench")
        },
    }
    vector = SteeringVector(
        base=reader.info.base,
        directions=directions,
        mean_norms={b: float(train_norms_LN[b].mean()) for b in directions},
        best_block=best,
        info=info,
    )
    words = _words(contrast, verdict, best, found[best])
    return Extraction(vector, tuple(found), verdict, words, contrast, time.monotonic() - started)


def best_block(found: Sequence[Separation]) -> int:
    """The block of the middle of the model that separates the held-out pairs best.

    Raises:
        NotSteerable: there is no block.
    """
    if not found:
        raise NotSteerable("The model has no block to steer.")
    low, high = (round(share * (len(found) - 1)) for share in USABLE_DEPTH)
    return max(range(low, high + 1), key=lambda b: found[b].rank)


def _samples(reader: Reader, pairs: Sequence[ContrastPair], side: str) -> list[Sample]:
    window = reader.info.window
    return [sample(reader.tokenizer, p.prompt, getattr(p, side), window=window) for p in pairs]


def _words(contrast: ContrastSet, verdict: str, best: int, found: Separation) -> str:
    shown = (
        f"block {best} puts {found.pair_accuracy:.0%} of {len(contrast.held_out)} held-out pairs in "
        f"the right order (AUROC {found.auroc:.2f})"
    )
    if verdict == "yes":
        return f"'{contrast.name}' has a clear direction: {shown}."
    if verdict == "marginal":
        return f"'{contrast.name}' has a weak direction: {shown}; more or clearer pairs would help."
    if len(contrast.held_out) < FEWEST_TO_TELL:
        return (
            f"'{contrast.name}' is too small to tell: {shown}, and a coin may order so few; give at "
            "least 20 pairs."
        )
    return (
        f"'{contrast.name}' is not steerable on this model as it stands: {shown}; its pairs pull in "
        "different directions, so steering would be luck. Make the two sides differ in one thing."
    )
