"""What training did to the recurrent layers: how fast they forget, and what their states became.

Shape letters: H heads, K and E widths of a head's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.train.batches import Decision, collate
from workbench.train.frozen import freeze_context

__all__ = ["decay_movement", "read_states", "state_movement"]


def decay_movement(base: dict[str, Tensor], trained: dict[str, Tensor]) -> list[dict[str, Any]]:
    """For every `A_log` and `dt_bias`, how far training moved it: mean, norm relative to base, heads.

    A negative change of `A_log` is slower forgetting: the decay of a step is
    `exp(-exp(A_log) softplus(a + dt_bias))` (Yang et al., arXiv:2412.06464).
    """
    rows = []
    for name, before in base.items():
        if name.rsplit(".", 1)[-1] in ("A_log", "dt_bias"):
            change = trained[name].double() - before.double()
            size = before.double().norm().item()
            rows.append(
                {
                    "name": name,
                    "mean": change.mean().item(),
                    "relative": change.norm().item() / size if size else 0.0,
                    "heads": change.flatten().tolist(),
                }
            )
    return rows


@torch.no_grad()
def read_states(
    model: PreTrainedModel, contexts: Sequence[tuple[int, ...]]
) -> list[dict[str, Tensor]]:
    """The recurrent states `[1, H, K, E]` after each context, by layer; empty for attention models."""
    found = []
    for context in contexts:
        batch = collate([Decision(context, (context[-1], context[-1]))], model.device)
        cache = freeze_context(model, batch.context_ids_BP, batch.context_mask_BP).cache
        kept = cache.rows([len(context) - 1])[0]
        found.append({n: t.double().cpu() for n, t in kept.items() if "recurrent_states" in n})
    return found


def state_movement(
    before: Sequence[dict[str, Tensor]], after: Sequence[dict[str, Tensor]]
) -> list[dict[str, Any]]:
    """How the states after the same contexts differ between two models, layer by layer.

    `relative` is `||S' - S|| / ||S||`, `heads` the same head by head. `shared` is the mean cosine
    between the changes of different contexts: near 1 the change is one direction whatever was read,
    near 0 it depends on the context. `control` is the same cosine between the base's own states,
    which a change must exceed to mean anything. `rank_one` is the share of a change's squared norm
    in its first singular direction, mean over heads and contexts.
    """
    rows = []
    for name in before[0] if before else ():
        old = torch.cat([states[name] for states in before])
        change = torch.cat([states[name] for states in after]) - old
        singular = torch.linalg.svdvals(change).square()
        total = singular.sum(-1)
        share = torch.where(total > 0, singular[..., 0] / total.clamp(min=1e-300), 0.0)
        rows.append(
            {
                "layer": int(name.split(".")[0]),
                "relative": (change.norm() / old.norm()).item(),
                "heads": (_by_head(change) / _by_head(old)).nan_to_num(0.0, 0.0).tolist(),
                "shared": _mean_cosine(change),
                "control": _mean_cosine(old),
                "rank_one": share.mean().item(),
            }
        )
    return rows


def _by_head(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=(0, 2, 3))


def _mean_cosine(rows: Tensor) -> float | None:
    flat = torch.nn.functional.normalize(rows.flatten(1), dim=1)
    count = len(flat)
    if count < 2:
        return None
    return ((flat @ flat.T).sum().item() - flat.square().sum().item()) / (count * (count - 1))
