"""The gated delta rule from a frozen state, one position at a time.

Shape letters: B rows, T positions, J query-key heads, H value heads, K and E widths of a query-key
and of a value head.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EPSILON", "WIDTHS", "check_delta", "gated_delta_rule"]

WIDTHS = (16, 32, 64, 128)
"""Widths of query-key and value heads that the kernels take."""

EPSILON = 1e-6
"""Added to the square sum under the root where queries and keys are normalised."""


def gated_delta_rule(
    q_BTJK: Tensor,
    k_BTJK: Tensor,
    v_BTHE: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    state_BHKE: Tensor,
    lengths_B: Tensor | None = None,
    scale: float | None = None,
    normalise: bool = False,
) -> Tensor:
    """Read and update an associative state, and return what each position reads.

    `S_t = exp(g_t) S_{t-1} + k_t (x) beta_t (v_t - exp(g_t) S_{t-1}' k_t)`, `o_t = scale S_t' q_t`
    (Yang et al., Gated Delta Networks, arXiv:2412.06464, section 3). `S_0` is constant: no gradient
    reaches it.

    Args:
        q_BTJK: value head `h` reads query-key head `h // (H / J)`.
        k_BTJK: keys.
        v_BTHE: values.
        g_BTH: logarithm of the decay, at most 0.
        beta_BTH: share of the old value that is overwritten.
        state_BHKE: the state before the first position.
        lengths_B: whole numbers of 0 to T, for rows padded on the right; padding is never read, its
            output is zero and its gradient too. All of T where not given.
        scale: `K ** -0.5` where not given.
        normalise: bring queries and keys to length one first, `x / sqrt(|x|^2 + 1e-6)`.

    Returns:
        `[B, T, H, E]` in the dtype of `v_BTHE`; sums are in float32, or float64 for float64.

    Raises:
        ValueError: shapes that do not belong together.
    """
    check_delta(q_BTJK, k_BTJK, v_BTHE, g_BTH, beta_BTH, state_BHKE)
    rows, width, heads, _ = v_BTHE.shape
    wide = torch.promote_types(v_BTHE.dtype, torch.float32)
    real_BT = torch.ones(rows, width, dtype=torch.bool, device=v_BTHE.device)
    if lengths_B is not None:
        real_BT = torch.arange(width, device=v_BTHE.device) < lengths_B[:, None]

    def clean(tensor: Tensor) -> Tensor:
        padding = ~real_BT.reshape(rows, width, *[1] * (tensor.dim() - 2))
        return tensor.to(wide).masked_fill(padding, 0.0)

    q, k, v, g, beta = map(clean, (q_BTJK, k_BTJK, v_BTHE, g_BTH, beta_BTH))
    if normalise:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON) for x in (q, k))
    q, k = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    q = q * (q.shape[3] ** -0.5 if scale is None else scale)
    state = state_BHKE.detach().to(wide)
    read = []
    for t in range(width):
        state = state * g[:, t, :, None, None].exp()
        known_BHE = torch.einsum("bhke,bhk->bhe", state, k[:, t])
        new_BHE = beta[:, t, :, None] * (v[:, t] - known_BHE)
        state = state + k[:, t, :, :, None] * new_BHE[:, :, None, :]
        read.append(torch.einsum("bhke,bhk->bhe", state, q[:, t]))
    return torch.stack(read, dim=1).to(v_BTHE.dtype)


def check_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> None:
    """Refuse shapes that do not belong together."""
    rows, width, heads, out = v.shape
    keys, wide = q.shape[2], q.shape[3]
    wanted = {
        "q": (q, (rows, width, keys, wide)),
        "k": (k, (rows, width, keys, wide)),
        "g": (g, (rows, width, heads)),
        "beta": (beta, (rows, width, heads)),
        "state": (state, (rows, heads, wide, out)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; with v {list(v.shape)} it must be "
                f"{list(shape)}."
            )
    if heads % keys:
        raise ValueError(f"{heads} value heads cannot share {keys} query-key heads evenly.")
