"""Turn instructions into completions: the model's own replies under each of the two."""

from __future__ import annotations

from collections.abc import Callable

from vectors.errors import ContrastSetError, NotSteerable
from workbench.data.contrast import ContrastPair, ContrastSet, check_whole
from workbench.extract.readers import Reader

__all__ = ["asking", "realise"]


def asking(contrast: ContrastSet) -> dict[str, str]:
    """For a vector's notes: the prompt that simply asks, with which verification compares."""
    return (
        {"instruction": contrast.pairs[0].positive_instruction} if contrast.by_instruction else {}
    )


def realise(
    reader: Reader,
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
    replies = reader.answers(asked, report)
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
    try:
        check_whole(contrast.name, pairs)
    except ContrastSetError as error:
        raise NotSteerable(
            f"Of '{contrast.name}' too few prompts are answered differently under the two "
            f"instructions: {error}"
        ) from error
    return ContrastSet(contrast.name, tuple(pairs), contrast.about, contrast.builtin)
