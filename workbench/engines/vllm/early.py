"""Have torch's compiler make a value where its inputs are, instead of where it is read.

Left alone, Inductor takes the edit of the residual stream into the norm of the next layer, whose sum
then waits for the number of a token's row and, after that, for the row: two reads of memory that
nothing hides. The edit's inputs are ready much earlier, beside the norm before the layer's MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["early", "teach_compiler"]

_library = torch.library.Library("workbench", "DEF")
_library.define("early(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("early", lambda x: x.clone(), "CompositeExplicitAutograd")


def early(x: Tensor) -> Tensor:
    """Return `x`, which a compiler that was taught writes to memory as soon as it can be known."""
    return torch.ops.workbench.early(x)


def teach_compiler() -> None:
    """Tell Inductor what `early` means; before the first model is compiled, once is enough."""
    from torch._inductor.lowering import (  # noqa: PLC0415  # loads slowly
        clone,
        lowerings,
        register_lowering,
    )

    if torch.ops.workbench.early.default in lowerings:
        return

    @register_lowering(torch.ops.workbench.early)
    def lower(x: Any) -> Any:
        x.realize()
        return clone(x)
