"""Attention of a decision to a frozen prefix and to itself, as a plain masked softmax.

Shape letters: B rows, H query heads, G key-value heads, T decision positions, P prefix positions,
J = P + T keys, K width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["WIDTHS", "check_attention", "frozen_prefix_attention"]

WIDTHS = (16, 32, 64, 128, 256)
"""Widths of a head that the kernels take."""


def frozen_prefix_attention(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    prefix_k_BGPK: Tensor,
    prefix_v_BGPK: Tensor,
    prefix_lengths_B: Tensor | None = None,
    lengths_B: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend from each decision position to the whole prefix and to the decision up to itself.

    `o_t = sum_j softmax_j(scale q_t . k_j) v_j` over the prefix's keys and the decision's keys
    `j <= t`. The prefix is constant: no gradient reaches it (method.md 2, full attention).

    Args:
        q_BHTK: query head `h` reads key-value head `h // (H / G)`.
        k_BGTK: keys of the decision.
        v_BGTK: values of the decision.
        prefix_k_BGPK: padded on the left, where it is never read.
        prefix_v_BGPK: padded on the left, where it is never read.
        prefix_lengths_B: whole numbers of 0 to P; all of P where not given.
        lengths_B: whole numbers of 0 to T, for decisions padded on the right; padding is never
            read, its output is zero and its gradient too. All of T where not given.
        scale: `K ** -0.5` where not given.

    Returns:
        `[B, H, T, K]` in the dtype of `q_BHTK`; sums are in float32, or float64 for float64.

    Raises:
        ValueError: shapes that do not belong together.
    """
    check_attention(q_BHTK, k_BGTK, v_BGTK, prefix_k_BGPK, prefix_v_BGPK)
    heads, width = q_BHTK.shape[1], q_BHTK.shape[2]
    prefix, device = prefix_k_BGPK.shape[2], q_BHTK.device
    wide = torch.promote_types(q_BHTK.dtype, torch.float32)
    at_T, at_P = torch.arange(width, device=device), torch.arange(prefix, device=device)
    real_BT = torch.ones(len(q_BHTK), width, dtype=torch.bool, device=device)
    real_BP = torch.ones(len(q_BHTK), prefix, dtype=torch.bool, device=device)
    if lengths_B is not None:
        real_BT = at_T < lengths_B[:, None]
    if prefix_lengths_B is not None:
        real_BP = at_P >= prefix - prefix_lengths_B[:, None]
    real_BJ = torch.cat([real_BP, real_BT], dim=1)

    def joined(prefix_BGPK: Tensor, own_BGTK: Tensor) -> Tensor:
        all_BGJK = torch.cat([prefix_BGPK.detach(), own_BGTK], dim=2).to(wide)
        clean_BGJK = all_BGJK.masked_fill(~real_BJ[:, None, :, None], 0.0)
        return clean_BGJK.repeat_interleave(heads // own_BGTK.shape[1], dim=1)

    padding_BT = ~real_BT[:, None, :, None]
    clean_q_BHTK = q_BHTK.to(wide).masked_fill(padding_BT, 0.0)
    scores_BHTJ = clean_q_BHTK @ joined(prefix_k_BGPK, k_BGTK).transpose(-1, -2)
    scores_BHTJ = scores_BHTJ * (q_BHTK.shape[3] ** -0.5 if scale is None else scale)
    past_TJ = torch.cat(
        [at_P.new_ones(width, prefix, dtype=torch.bool), at_T <= at_T[:, None]], dim=1
    )
    seen_BTJ = past_TJ & (real_BJ[:, None] | padding_BT[:, 0])
    weights_BHTJ = scores_BHTJ.masked_fill(~seen_BTJ[:, None], float("-inf")).softmax(dim=-1)
    out_BHTK = weights_BHTJ @ joined(prefix_v_BGPK, v_BGTK)
    return out_BHTK.masked_fill(padding_BT, 0.0).to(q_BHTK.dtype)


def check_attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> None:
    """Refuse shapes that do not belong together."""
    rows, heads, width, wide = q.shape
    groups, prefix = k.shape[1], prefix_k.shape[2]
    wanted = {
        "k": (k, (rows, groups, width, wide)),
        "v": (v, (rows, groups, width, wide)),
        "prefix_k": (prefix_k, (rows, groups, prefix, wide)),
        "prefix_v": (prefix_v, (rows, groups, prefix, wide)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; with q {list(q.shape)} it must be "
                f"{list(shape)}."
            )
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key-value heads evenly.")
