"""How far the student is from what it should say.

Shape letters: N learnt positions, V vocabulary, K tokens that the teacher's distribution keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vectors.errors import ShapeMismatch

__all__ = ["SoftTargets", "soft_loss", "token_loss"]


NEVER = -1e4


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's distribution at N positions: its K likeliest tokens, and the rest as one bucket.

    Args:
        ids_NK: int32 `[N, K]`.
        log_probs_NK: float16 `[N, K]`.
        log_rest_N: float32 `[N]`, log of what all other tokens have together; -inf where K = V.
    """

    ids_NK: Tensor
    log_probs_NK: Tensor
    log_rest_N: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor, k: int) -> SoftTargets:
        """Keep the `k` likeliest tokens of each row, or all where there are fewer."""
        logits_NV = logits_NV.float()
        top = logits_NV.topk(min(k, logits_NV.shape[1]), dim=1)
        rest_N1 = _rest(logits_NV, top.indices)
        total_N1 = torch.logaddexp(rest_N1, top.values.logsumexp(1, keepdim=True))
        log_probs_NK = (top.values - total_N1).half()
        return cls(top.indices.int(), log_probs_NK, (rest_N1 - total_N1).squeeze(1))

    @classmethod
    def certain(cls, labels_N: Tensor, k: int, vocabulary: int) -> SoftTargets:
        """All probability on the labels: `soft_loss` is then the cross-entropy of these tokens.

        The other K - 1 tokens, and the rest, have `exp(NEVER) = 0`; minus infinity would give NaN.
        """
        others_K = torch.arange(min(k, vocabulary), device=labels_N.device)
        ids_NK = ((labels_N[:, None] + others_K) % vocabulary).int()
        log_probs_NK = torch.full(ids_NK.shape, NEVER, dtype=torch.float16, device=labels_N.device)
        log_probs_NK[:, 0] = 0.0
        whole = ids_NK.shape[1] == vocabulary
        log_rest_N = torch.full_like(labels_N, -torch.inf if whole else NEVER, dtype=torch.float32)
        return cls(ids_NK, log_probs_NK, log_rest_N)

    @classmethod
    def join(cls, parts: Sequence[SoftTargets], device: torch.device | str = "cpu") -> SoftTargets:
        """Return the positions of all parts, in order, on one device."""
        return cls(
            torch.cat([part.ids_NK for part in parts]).to(device),
            torch.cat([part.log_probs_NK for part in parts]).to(device),
            torch.cat([part.log_rest_N for part in parts]).to(device),
        )

    def split(self, lengths: Sequence[int]) -> list[SoftTargets]:
        """Return the positions of each decision on the CPU; the inverse of `join`."""
        columns = (self.ids_NK, self.log_probs_NK, self.log_rest_N)
        parts = zip(*(column.cpu().split(list(lengths)) for column in columns), strict=True)
        # A view would keep the whole batch alive, and cost its size when stored.
        return [SoftTargets(*(tensor.clone() for tensor in part)) for part in parts]

    def __len__(self) -> int:
        return len(self.log_rest_N)


def soft_loss(logits_NV: Tensor, targets: SoftTargets, weights_N: Tensor | None = None) -> Tensor:
    """Return the mean over positions of the divergence of the student from the teacher.

    `KL(t || s) = sum_i t_i (log t_i - log s_i)`, i running over the teacher's K tokens and one
    bucket for all others; exact where K = V, and otherwise a lower bound of the full divergence
    (Kullback and Leibler 1951, theorem 4.1: grouping loses information). The teacher is normalised
    again, because float16 rounds it.

    Args:
        logits_NV: the student's, any floating dtype; computed in float32 at least.
        targets: the teacher's, N positions in the same order.
        weights_N: where given, the result is the sum weighted by these instead of the mean.

    Returns:
        A scalar in nats for each token.

    Raises:
        ShapeMismatch: other positions than the student's.
    """
    _check(logits_NV, len(targets))
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    ids_NK = targets.ids_NK.long()
    student = logits_NV.gather(1, ids_NK)
    teacher = targets.log_probs_NK.to(logits_NV.dtype)
    if ids_NK.shape[1] < logits_NV.shape[1]:
        student = torch.cat([student, _rest(logits_NV, ids_NK)], dim=1)
        teacher = torch.cat([teacher, targets.log_rest_N[:, None].to(teacher.dtype)], dim=1)
    # The buckets part the vocabulary, so that a softmax over their logits is exact.
    student, teacher = student.log_softmax(1), teacher.log_softmax(1)
    if weights_N is None:
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    each_NK = F.kl_div(student, teacher, reduction="none", log_target=True)
    return (each_NK.sum(1) * weights_N).sum()


def token_loss(logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy `-log s(label)` of sampled tokens, in nats for each token.

    Where `weights_N` is given, the result is the sum weighted by these instead of the mean.

    Raises:
        ShapeMismatch: other positions than the student's.
    """
    _check(logits_NV, len(labels_N))
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if weights_N is None:
        return F.cross_entropy(logits_NV, labels_N)
    each_N = F.cross_entropy(logits_NV, labels_N, reduction="none")
    return (each_N * weights_N).sum()


def _rest(logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Log of the summed exponentials of all other tokens, `[N, 1]`."""
    return logits_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1, keepdim=True)


def _check(logits_NV: Tensor, positions: int) -> None:
    if len(logits_NV) != positions:
        raise ShapeMismatch(
            f"The model gave logits at {len(logits_NV)} positions and the targets have "
            f"{positions}; make the targets from these very decisions."
        )
