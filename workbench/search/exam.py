"""What is measured of weights in memory: held-out margins, and the loss on general text.

Shape letters: N tokens of all completions of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from workbench.data.contrast import ContrastPair, ContrastSet
from workbench.data.templates import sample
from workbench.runs.process import Progress
from workbench.search.behaviours import check_measurable, some_held_out
from workbench.search.live import LiveModel
from workbench.search.marks import Marks
from workbench.train.batches import Decision, check_decisions, collate
from workbench.train.config import TrainConfig
from workbench.train.examples import Example, teach
from workbench.train.held_out import held_out_loss
from workbench.train.lesson import Lesson
from workbench.train.logits import whole_logits
from workbench.train.window import vocabulary_of, window_of
from workbench.verify.measure import read_prompts

__all__ = ["Exam"]

TEXTS = 12
"""Neutral texts, as many as a verification reads."""
BATCH = 8
CONFIG = TrainConfig.parse({})


@dataclass
class Exam:
    """The questions, put to whatever weights `live` has; make it while they are the base's.

    Args:
        live: the model in memory.
        sets: the behaviours, by the name that the marks are to have.
        general: whether the loss on general text is measured.
        pairs: how many held-out pairs of each set are read at most; all of them by default.
    """

    live: LiveModel
    sets: dict[str, ContrastSet]
    progress: Progress
    general: bool = True
    pairs: int | None = None
    _lesson: Lesson | None = field(default=None, init=False)
    _sides: dict[str, list[Decision]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name, contrast in self.sets.items():
            self._sides[name] = self._decisions(
                some_held_out(check_measurable(contrast), self.pairs)
            )
        if self.general:
            self._lesson = self._neutral()

    @torch.no_grad()
    def take(self) -> Marks:
        """Measure the weights that are in the model now.

        Raises:
            Cancelled: somebody asked the run to stop.
        """
        margins: dict[str, list[float]] = {}
        for name, decisions in self._sides.items():
            scored = self._scored(decisions)
            margins[name] = [a - b for a, b in zip(scored[::2], scored[1::2], strict=True)]
        if self._lesson is None:
            return Marks(margins)
        self.progress.check()
        return Marks(margins, held_out_loss(self.live.model, self._lesson, CONFIG, 1).general)

    def _scored(self, decisions: Sequence[Decision]) -> list[float]:
        """Log p(completion | context) of each decision."""
        model: Any = self.live.model
        order = sorted(range(len(decisions)), key=lambda i: len(decisions[i].decision_ids))
        found = [0.0] * len(decisions)
        for start in range(0, len(order), BATCH):
            self.progress.check()
            chosen = order[start : start + BATCH]
            batch = collate((decisions[i] for i in chosen), model.device)
            logp_NV = whole_logits(model, batch).float().log_softmax(-1)
            logp_N = logp_NV.gather(1, batch.labels_N[:, None])[:, 0]
            lengths = [len(decisions[i].decision_ids) for i in chosen]
            for i, logp_T in zip(chosen, logp_N.split(lengths), strict=True):
                found[i] = float(logp_T.sum())
        return found

    def _decisions(self, pairs: Sequence[ContrastPair]) -> list[Decision]:
        return [
            self._decision(pair.prompt, text, line)
            for line, pair in enumerate(pairs, start=1)
            for text in (pair.positive, pair.negative)
        ]

    def _decision(self, prompt: str, text: str, line: int) -> Decision:
        window = self.live.info.served_window
        one = sample(self.live.tokenizer, prompt, text, window=window)
        return Decision(one.context, one.completion, "replay", line)

    def _neutral(self) -> Lesson:
        model: Any = self.live.model
        rows = read_prompts("neutral")[:TEXTS]
        decisions = [self._decision(row["prompt"], row["text"], i) for i, row in enumerate(rows, 1)]
        check_decisions(decisions, window_of(model), vocabulary_of(model))
        examples = [Example(decision) for decision in decisions]
        return Lesson(
            decisions, teach(model, examples, {}, CONFIG.top_k, self.progress.part(0.05, 0.1))
        )
