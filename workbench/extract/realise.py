"""Turn instructions into completions: the model's own replies under each of the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vectors.errors import NotSteerable
from workbench.data.contrast import ContrastPair, ContrastSet
from workbench.data.templates import context_ids
from workbench.models.loading import LoadedModel

__all__ = ["realise"]

TOKENS = 48
BATCH = 16


@torch.inference_mode()
def realise(
    loaded: LoadedModel,
    contrast: ContrastSet,
    report: Callable[[float, str], None] = lambda share, words: None,
) -> ContrastSet:
    """Return the set with each pair's instructions replaced by the replies that they led to.

    The replies are greedy and the instruction is left out of the pair that is returned, so the
    direction is read where it will be used: in a context that does not ask for the behaviour.

    Raises:
        NotSteerable: the model answers the same under both instructions.
    """
    asked = [
        (p.prompt, instruction)
        for p in contrast.pairs
        for instruction in (p.positive_instruction, p.negative_instruction)
    ]
    replies: list[str] = []
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        replies += _replies(loaded, batch)
        report(start / len(asked), f"answering under instructions, {start} of {len(asked)}")
    pairs = [
        ContrastPair(prompt=p.prompt, positive=positive, negative=negative, tags=p.tags)
        for p, positive, negative in zip(contrast.pairs, replies[::2], replies[1::2], strict=True)
        if positive and negative and positive != negative
    ]
    if len(pairs) < len(contrast.pairs) // 2:
        raise NotSteerable(
            f"Under the instructions of '{contrast.name}' the model answers the same on both sides for "
            f"{len(contrast.pairs) - len(pairs)} of {len(contrast.pairs)} prompts; make them clearer."
        )
    return ContrastSet(contrast.name, tuple(pairs), contrast.about, contrast.builtin)


def _replies(loaded: LoadedModel, batch: Sequence[tuple[str, str]]) -> list[str]:
    tokenizer: Any = loaded.tokenizer
    contexts = [
        context_ids(
            tokenizer,
            [{"role": "system", "content": instruction}, {"role": "user", "content": prompt}],
        )
        for prompt, instruction in batch
    ]
    longest = max(map(len, contexts))
    device = next(loaded.model.parameters()).device
    pad = tokenizer.pad_token_id
    ids_BT = torch.tensor([[pad] * (longest - len(c)) + list(c) for c in contexts], device=device)
    mask_BT = torch.tensor(
        [[0] * (longest - len(c)) + [1] * len(c) for c in contexts], device=device
    )
    out_BT = loaded.model.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=pad,
    )
    texts = tokenizer.batch_decode(out_BT[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in texts]
