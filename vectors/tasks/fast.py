"""The inner loops of TIES, compiled: counting magnitudes, and merging bf16.

Each loop does one thing to a block that stays in the processor's nearest cache, so that the
compiler can do 16 elements at a time; nothing is fused or reordered, so the bits are those of the
plain code in `methods/ties.py`. Neither holds the interpreter's lock.

Shape letters: P elements of a part, K terms, B bins, W elements of a block.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["count_bf16", "count_fp32", "fuse_bf16"]

WIDTH = 2048
HALF = np.uint32(16)
LOW = np.uint32(12)  # bits of a magnitude that its bin does not say; see histograms.py
REST = np.uint32((1 << 12) - 1)
INFINITE = np.uint32(0x7F800000)
POSITIVE = np.uint32(0x7FFFFFFF)

compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@compiled
def count_bf16(
    base_P: NDArray[np.uint16],
    tuned_P: NDArray[np.uint16],
    counts_B: NDArray[np.uint32],
    loose_P: NDArray[np.uint32],
) -> int:
    """Count `|tuned - base|` into bins; return how many have low bits, kept in `loose_P`.

    -1 if a difference is not finite.
    """
    size_W = np.empty(WIDTH, np.float32)
    bits_W = size_W.view(np.uint32)
    old_W = np.empty(WIDTH, np.uint32)
    new_W = np.empty(WIDTH, np.uint32)
    old_f_W = old_W.view(np.float32)
    new_f_W = new_W.view(np.float32)
    loose = 0
    for start in range(0, len(base_P), WIDTH):
        width = min(WIDTH, len(base_P) - start)
        base_W = base_P[start : start + width]
        tuned_W = tuned_P[start : start + width]
        for i in range(width):
            old_W[i] = np.uint32(base_W[i]) << HALF
            new_W[i] = np.uint32(tuned_W[i]) << HALF
        for i in range(width):
            size_W[i] = new_f_W[i] - old_f_W[i]
        top = np.uint32(0)
        for i in range(width):
            magnitude = np.uint32(bits_W[i] & POSITIVE)
            bits_W[i] = magnitude
            top = magnitude if magnitude > top else top
        if top >= INFINITE:
            for i in range(width):
                if bits_W[i] >= INFINITE:
                    if base_W[i] != tuned_W[i]:
                        return -1
                    bits_W[i] = np.uint32(0)
        for i in range(width):
            magnitude = bits_W[i]
            counts_B[np.uint32(magnitude >> LOW)] += np.uint32(1)
            if magnitude & REST:
                loose_P[loose] = magnitude
                loose += 1
    return loose


@compiled
def count_fp32(
    bits_P: NDArray[np.uint32], counts_B: NDArray[np.uint32], loose_P: NDArray[np.uint32]
) -> int:
    """Count the bit patterns of fp32 deltas as `count_bf16` does."""
    loose = 0
    for i in range(len(bits_P)):
        magnitude = np.uint32(bits_P[i] & POSITIVE)
        if magnitude >= INFINITE:
            return -1
        counts_B[np.uint32(magnitude >> LOW)] += np.uint32(1)
        if magnitude & REST:
            loose_P[loose] = magnitude
            loose += 1
    return loose


@compiled
def fuse_bf16(
    base_P: NDArray[np.uint16],
    tuned_KP: NDArray[np.uint16],
    cuts_K: NDArray[np.uint32],
    ballots_K: NDArray[np.float32],
    gains_K: NDArray[np.float32],
    amounts_K: NDArray[np.float32],
    fixed: np.float32,
    by_count: bool,
    largest: bool,
    winner: np.float32,
    scale: np.float32,
    out_P: NDArray[np.uint16],
) -> int:
    """Write `base + TIES` to `out_P` and return the sum of the elected signs.

    Term `k` votes with `ballot_k * d_k`, has the value `gain_k` times its vote, and adds `amount_k`
    to the divisor, which is `fixed` unless that is 0. `winner` is the sign of votes that add up
    to 0.
    """
    terms = len(tuned_KP)
    old_W = np.empty(WIDTH, np.uint32)
    new_W = np.empty(WIDTH, np.uint32)
    old_f_W = old_W.view(np.float32)
    new_f_W = new_W.view(np.float32)
    vote_KW = np.empty((terms, WIDTH), np.float32)
    size_W = np.empty(WIDTH, np.float32)
    bits_W = size_W.view(np.uint32)
    sign_W = np.empty(WIDTH, np.float32)
    sum_W = np.empty(WIDTH, np.float32)
    divisor_W = np.empty(WIDTH, np.float32)
    zero, one = np.float32(0), np.float32(1)
    tally = 0
    for start in range(0, len(base_P), WIDTH):
        width = min(WIDTH, len(base_P) - start)
        base_W = base_P[start : start + width]
        out_W = out_P[start : start + width]
        for i in range(width):
            old_W[i] = np.uint32(base_W[i]) << HALF
            sign_W[i] = zero
            sum_W[i] = zero
            divisor_W[i] = fixed
        for k in range(terms):
            tuned_W = tuned_KP[k, start : start + width]
            vote_W = vote_KW[k]
            cut, ballot = cuts_K[k], ballots_K[k]
            for i in range(width):
                new_W[i] = np.uint32(tuned_W[i]) << HALF
            for i in range(width):
                size_W[i] = new_f_W[i] - old_f_W[i]
            for i in range(width):
                kept = (np.uint32(bits_W[i] & POSITIVE) >= cut) & (base_W[i] != tuned_W[i])
                vote_W[i] = size_W[i] * ballot if kept else zero
            if by_count:
                for i in range(width):
                    vote = vote_W[i]
                    sign_W[i] += one if vote > zero else (-one if vote < zero else zero)
            else:
                for i in range(width):
                    sign_W[i] += vote_W[i]
        found = 0
        for i in range(width):
            sign = sign_W[i]
            sign = one if sign > zero else (-one if sign < zero else zero)
            found += np.int32(sign)
            sign_W[i] = sign if sign != zero else winner
        tally += found
        for k in range(terms):
            vote_W = vote_KW[k]
            gain, amount = gains_K[k], amounts_K[k]
            if largest:
                for i in range(width):
                    value = vote_W[i] * gain
                    wins = (vote_W[i] * sign_W[i] > zero) & (abs(value) > abs(sum_W[i]))
                    sum_W[i] = value if wins else sum_W[i]
            else:
                for i in range(width):
                    agrees = vote_W[i] * sign_W[i] > zero
                    sum_W[i] += vote_W[i] * gain if agrees else zero
                    divisor_W[i] += amount if agrees else zero
        if not largest:
            for i in range(width):
                quotient = sum_W[i] / divisor_W[i]
                sum_W[i] = quotient if divisor_W[i] != zero else zero
        for i in range(width):
            sum_W[i] = sum_W[i] * scale
        for i in range(width):
            new_f_W[i] = old_f_W[i] + sum_W[i]
        for i in range(width):
            bits = new_W[i]
            # To the nearest, halves to even.
            bits = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> HALF) & np.uint32(1))) >> HALF
            out_W[i] = base_W[i] if sum_W[i] == zero else np.uint16(bits)
        if terms == 1:
            # Where the only term comes out as it went in, so do its bits.
            for i in range(width):
                same = (sum_W[i] == size_W[i]) & (sum_W[i] != zero)
                out_W[i] = tuned_KP[0, start + i] if same else out_W[i]
    return int(tally)
