"""Find the decoder blocks of a model by structure, not by a list of names."""

from __future__ import annotations

from collections import Counter

from torch import nn

from vectors.errors import ModelNotSupported

__all__ = ["decoder_blocks"]


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of `model` in order: block `b` is entry `b`.

    They are the longest `nn.ModuleList` named `layers`, `h` or `blocks` whose members each hold an
    MLP beside a mixer; vision and audio towers lie under names that say so and are left out.

    Raises:
        ModelNotSupported: no such list, or two of the same length.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        tower = any(word in part for part in parts for word in ("vis", "audio", "encoder", "mtp"))
        if (
            isinstance(module, nn.ModuleList)
            and parts[-1] in ("layers", "h", "blocks")
            and not tower
        ):
            found[name] = module
    if not found:
        raise ModelNotSupported(
            f"{type(model).__name__} has no list of decoder layers that the workbench can find; "
            "use a decoder-only language model."
        )
    length = Counter({name: len(layers) for name, layers in found.items()})
    (name, longest), *others = length.most_common(2)
    if others and others[0][1] == longest:
        raise ModelNotSupported(
            f"{type(model).__name__} has two lists of {longest} layers ('{name}' and "
            f"'{others[0][0]}'); the workbench cannot tell which are the decoder's."
        )
    return found[name]
