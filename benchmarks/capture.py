"""Activations of many prompts: captured in the engine against transformers' hooks in this process.

    workbench bench capture [--json] [--prompts 64] [--tokens 128] [--rounds 3]

Both read the mean of the residual stream behind every block over each prompt's second half, of random
token ids. First the two are compared; then they are timed in turn, models loaded and engine ready.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _home import own_workbench
from _results import RESULTS, publish
from torch import Tensor

from workbench.data.templates import Sample
from workbench.engines.vllm.client import VllmEngine
from workbench.engines.vllm.settings import CAPTURE
from workbench.extract.readers import EngineReader, ModelReader, Reader
from workbench.models.loading import load_model

ROUNDING = {"float32": 1e-3, "bfloat16": 5e-2}


def main() -> None:
    """Compare, time, print, and append to the results file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--prompts", type=int, default=64, help="prompts; 256 on a GPU")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each; 256 on a GPU")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both; medians are told")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to append to")
    asked = parser.parse_args()
    os.environ[CAPTURE] = "1"
    with own_workbench() as workbench:
        engine = workbench.engine()
        assert isinstance(engine, VllmEngine)
        loaded = load_model(workbench.model())
        there = EngineReader(engine, loaded.info, loaded.tokenizer)
        samples = random_samples(loaded.model.config.vocab_size, asked.prompts, asked.tokens)
        numbers = measured(ModelReader(loaded), there, samples, asked.rounds)
        numbers |= {"dtype": engine.describe()["dtype"], "tokens": asked.tokens}
    publish("capture", numbers, as_json=asked.json, results=asked.results)


def random_samples(vocabulary: int, prompts: int, tokens: int) -> list[Sample]:
    """Ids that share no beginning, so that no cache helps either side."""
    ids = torch.randint(
        0, vocabulary, (prompts, tokens), generator=torch.Generator().manual_seed(0)
    )
    half = tokens // 2
    return [Sample(tuple(row[:half]), tuple(row[half:])) for row in ids.tolist()]


def measured(here: Reader, there: Reader, samples: list[Sample], rounds: int) -> dict[str, Any]:
    """Compare, then time in turn; seconds for all prompts."""
    wanted_LND, found_LND = (read(reader, samples) for reader in (here, there))
    error = float((found_LND - wanted_LND).norm() / wanted_LND.norm())
    if error > ROUNDING["bfloat16" if torch.cuda.is_available() else "float32"]:
        raise SystemExit(f"What was captured differs from the hooks' by {error:.2g}.")
    seconds: dict[str, list[float]] = {"hooks": [], "engine": []}
    for number in range(rounds):
        ways = [("hooks", here), ("engine", there)]
        for name, reader in ways if number % 2 else reversed(ways):
            started = time.perf_counter()
            read(reader, samples)
            seconds[name].append(time.perf_counter() - started)
    ratios = [h / e for h, e in zip(seconds["hooks"], seconds["engine"], strict=True)]
    return {
        "prompts": len(samples),
        "error": error,
        **{f"{name}_seconds": [round(s, 3) for s in found] for name, found in seconds.items()},
        "ratio": statistics.median(ratios),
    }


def read(reader: Reader, samples: list[Sample]) -> Tensor:
    """The means `[L, N, D]`."""
    return reader.means(samples, "completion-mean", lambda share, words: None)[0]


if __name__ == "__main__":
    main()
