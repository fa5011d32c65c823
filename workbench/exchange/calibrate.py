"""Doses for directions that came without any: the residual stream's norms, measured on the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vectors.formats.foreign import Calibration
from vectors.steering.diagnostics import separation
from workbench.data.contrast import ContrastSet
from workbench.data.templates import sample
from workbench.extract.extract import USABLE_DEPTH
from workbench.extract.readers import ModelReader
from workbench.extract.realise import asking, realise
from workbench.models.capture import block_means
from workbench.models.loading import LoadedModel

__all__ = ["Measured", "measure"]

Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Measured:
    """The calibration, how well each block tells the held-out pairs apart, and the set itself."""

    calibration: Calibration
    blocks: list[dict[str, Any]]
    contrast: ContrastSet


def measure(
    loaded: LoadedModel,
    contrast: ContrastSet,
    directions: Mapping[int, Tensor],
    report: Report = lambda share, words: None,
) -> Measured:
    """Return mean norms over the set's training pairs, and the block that separates the rest best.

    The same norms, measures and choice of a block as when a vector is extracted here.
    """
    asked = asking(contrast)
    contrast = (
        realise(ModelReader(loaded), contrast, report) if contrast.by_instruction else contrast
    )
    pairs = [*contrast.train, *contrast.held_out]
    window = loaded.info.window
    samples = [
        sample(loaded.tokenizer, pair.prompt, side, window=window)
        for side_of in ("positive", "negative")
        for pair in pairs
        for side in (getattr(pair, side_of),)
    ]
    means_LND, norms_LN = block_means(loaded.model, samples, "completion-mean", report)
    pos_LND, neg_LND = means_LND.chunk(2, dim=1)
    n = len(contrast.train)
    train_LN = torch.cat([norms_LN[:, :n], norms_LN[:, len(pairs) : len(pairs) + n]], 1)
    found = {
        b: separation(v_D / v_D.norm(), pos_LND[b, n:], neg_LND[b, n:])
        for b, v_D in directions.items()
    }
    low, high = (share * (loaded.blocks - 1) for share in USABLE_DEPTH)
    usable = [b for b in found if round(low) <= b <= round(high)] or list(found)
    best = max(usable, key=lambda b: found[b].rank)
    norms = {b: float(train_LN[b].mean()) for b in directions}
    info = {
        "model": loaded.info.name,
        "contrast": {
            "name": contrast.name,
            "digest": contrast.digest,
            "pairs": len(pairs),
            **asked,
        },
        "held_out": asdict(found[best]),
    }
    calibration = Calibration(
        base=loaded.info.base, best_block=best, mean_norms=norms, info=info
    )  # fmt: skip
    rows = [{"block": b, **asdict(row), "norm": norms[b]} for b, row in found.items()]
    return Measured(calibration, rows, contrast)
