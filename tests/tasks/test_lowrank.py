"""Low-rank factors against the full decomposition, and the errors that they state.

Shape letters: O outputs, I inputs.
"""

from __future__ import annotations

import pytest
import torch

from vectors.errors import InputError, ShapeMismatch
from vectors.tasks.lowrank import low_rank


def falling(shape: tuple[int, int], decay: float) -> torch.Tensor:
    """A matrix whose singular values are `decay^i`."""
    rng = torch.Generator().manual_seed(0)
    count = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, count, generator=rng).double()).Q for n in shape)
    return (u * decay ** torch.arange(count) @ v.T).float()


def really_lost(delta_OI: torch.Tensor, found: object) -> float:
    up, down = found.up_OR.double(), found.down_RI.double()  # type: ignore[attr-defined]
    return float((delta_OI.double() - up @ down).norm() / delta_OI.double().norm())


@pytest.mark.parametrize("shape", [(150, 90), (64, 200), (7, 3), (1, 5)])
@pytest.mark.parametrize("rank", [1, 6, 1000])
def test_a_rank_gives_the_best_factors_of_it(shape: tuple[int, int], rank: int) -> None:
    delta_OI = falling(shape, 0.9)
    found = low_rank(delta_OI, rank=rank)
    assert found.rank == min(rank, *shape)
    assert (found.up_OR.shape, found.down_RI.shape) == (
        (shape[0], found.rank),
        (found.rank, shape[1]),
    )
    s = torch.linalg.svdvals(delta_OI.double())
    best = float((s[rank:] ** 2).sum().sqrt() / s.norm())
    assert found.error == pytest.approx(really_lost(delta_OI, found), abs=1e-12)
    assert best - 1e-6 <= found.error <= best * 1.001 + 1e-6
    assert found.least == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("error", [0.5, 0.1, 0.01, 0.0])
def test_an_error_gives_the_smallest_rank_that_keeps_it(error: float) -> None:
    delta_OI = falling((300, 160), 0.97)
    found = low_rank(delta_OI, error=error)
    s = torch.linalg.svdvals(delta_OI.double())
    rest = [float((s[r:] ** 2).sum().sqrt() / s.norm()) for r in range(161)]
    fewest = next(r for r in range(161) if rest[r] <= max(error, 1e-7) + 1e-9)
    assert abs(found.rank - fewest) <= (1 if error else 0)
    assert found.error <= error + 1e-6


def test_rank_bounds_what_an_error_asks_for() -> None:
    delta_OI = falling((300, 160), 0.97)
    found = low_rank(delta_OI, rank=5, error=0.01)
    assert found.rank == 5
    assert found.error > 0.01


def test_a_lora_comes_back_at_its_own_rank() -> None:
    rng = torch.Generator().manual_seed(1)
    delta_OI = torch.randn(120, 4, generator=rng) @ torch.randn(4, 80, generator=rng)
    found = low_rank(delta_OI, error=1e-5)
    assert found.rank == 4
    torch.testing.assert_close(found.up_OR @ found.down_RI, delta_OI, atol=1e-4, rtol=1e-4)


def test_seed_and_zero() -> None:
    delta_OI = falling((150, 90), 0.9)
    one, two = (low_rank(delta_OI, rank=4, seed=3) for _ in range(2))
    assert torch.equal(one.up_OR, two.up_OR) and torch.equal(one.down_RI, two.down_RI)
    nothing = low_rank(torch.zeros(5, 4), rank=2)
    assert (nothing.rank, nothing.error, nothing.up_OR.shape) == (0, 0.0, (5, 0))


def test_refusals() -> None:
    with pytest.raises(ShapeMismatch, match=r"this tensor is \[4\]"):
        low_rank(torch.ones(4), rank=1)
    with pytest.raises(InputError, match="which rank"):
        low_rank(torch.ones(4, 4))
    with pytest.raises(InputError, match="at least 1, not 0"):
        low_rank(torch.ones(4, 4), rank=0)
    with pytest.raises(InputError, match="below 1, not 1"):
        low_rank(torch.ones(4, 4), error=1)
    with pytest.raises(InputError, match="not finite"):
        low_rank(torch.full((4, 4), float("nan")), rank=1)
