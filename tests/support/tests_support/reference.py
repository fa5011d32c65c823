"""What transformers says of a steered sequence, its decoder layers edited by hooks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from vectors.steering.operators import apply_edit, combine, edit_of
from vectors.store import Library
from workbench.engines.vllm.spec import resolve_request
from workbench.models.blocks import decoder_blocks

__all__ = ["Run", "reference_of"]

Run = Callable[..., tuple[Tensor, Tensor]]
"""`run(kind, ids, steer, start=0, dtype=torch.float32)`: each token's log-probabilities `[T, V]`, and the
residual stream behind every block `[L, T, D]`; positions from `start` on are steered."""


def reference_of(folders: Mapping[str, Path], library: Library, base: str) -> Run:
    """A runner of the checkpoints in `folders`; each is loaded once."""

    @functools.cache
    def model(kind: str, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(folders[kind], dtype=dtype).eval()

    def run(
        kind: str, ids: list[int], steer: str, start: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        resolved = resolve_request(steer, library, base) if steer else None
        layers = decoder_blocks(model(kind, dtype))
        by_block: dict[int, list[Any]] = {}
        for i in resolved.injections if resolved else ():
            vector = library.vector_by_digest(i.vector)
            args = vector.directions[i.block], vector.mean_norms[i.block], i.dose
            by_block.setdefault(i.block, []).append(edit_of(i.operator, *args))
        start = max(start, resolved.start if resolved else 0)

        def edited(edit: Any) -> Any:
            def hook(module: Any, inputs: Any, output: Any) -> Any:
                h_1TD = output[0] if isinstance(output, tuple) else output
                h_1TD = h_1TD.clone()
                h_1TD[0, start:] = apply_edit(h_1TD[0, start:], edit)
                return (h_1TD, *output[1:]) if isinstance(output, tuple) else h_1TD

            return hook

        streams = []

        def read(module: Any, inputs: Any, output: Any) -> None:
            streams.append((output[0] if isinstance(output, tuple) else output)[0])

        with ExitStack() as stack, torch.no_grad():
            for block, edits in by_block.items():
                hook = layers[block].register_forward_hook(edited(combine(edits)))
                stack.callback(hook.remove)
            for layer in layers:
                stack.callback(layer.register_forward_hook(read).remove)
            logits_TV = model(kind, dtype)(torch.tensor([ids])).logits[0]
        return logits_TV.log_softmax(-1), torch.stack(streams).float()

    return run
