"""TIES of whole models, out of core: count magnitudes, then merge and write, part by part.

The share of a whole model is found without holding or sorting it: one pass counts magnitudes, and
where the counts were kept, there is none. Memory does not grow with the model.

Shape letters: K terms, P elements of a part, B bins.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from vectors.errors import ShapeMismatch
from vectors.store.checkpoint import DTYPES, Checkpoint, Slot, WeightFile
from vectors.tasks.delta import delta, raw_view
from vectors.tasks.election import elected, rules
from vectors.tasks.histograms import BINS, LOW, Histogram
from vectors.tasks.memo import Memo
from vectors.tasks.merge import apply
from vectors.tasks.methods import ties
from vectors.tasks.methods.ties import TiesParameters
from vectors.tasks.parts import PART, Part, Span, Walk, is_float, on_all_cores, spans_of
from vectors.tasks.sources import Term
from vectors.tasks.stack import Stack, Survey, not_finite
from vectors.tasks.trim import rank_of

__all__ = ["MOST_LOOSE", "WHOLE", "Cuts", "Ties", "write_at", "write_ties"]

MOST_LOOSE = 1 << 23
TABLE_ROOM = (1 << 32) - 1
WHOLE = ""  # the name under which a histogram of all tensors is kept

Cuts = Mapping[str, np.ndarray]


def write_ties(
    checkpoint: Checkpoint,
    terms: Sequence[Term],
    weights: Sequence[float],
    options: TiesParameters,
    folder: Path,
    memo: Memo | None = None,
) -> Iterator[str]:
    """Write the files of `checkpoint` with the merged numbers to `folder`; yield each tensor's name.

    The result has the bits of `vectors.tasks.merge`, whatever the number of threads.

    Args:
        terms: in the order of their keys.
        memo: where histograms are kept and looked for.

    Raises:
        InputError: values that are not finite.
        ShapeMismatch: a term that changes a tensor of integers.
    """
    yield from Ties(checkpoint, terms, weights, options, memo).write(folder)


class Ties:
    """One merge: what all of its parts need to know.

    `count`, `look` and `fuse` go through the weights; what does so elsewhere than on the processor
    replaces these three, and must give the same numbers.
    """

    span: int | None = None  # elements of a span, where it is not for the processor
    threads: int | None = None  # that go through the spans, where there is one for each core

    def __init__(
        self,
        checkpoint: Checkpoint,
        terms: Sequence[Term],
        weights: Sequence[float],
        options: TiesParameters,
        memo: Memo | None,
    ) -> None:
        self.files, self.terms, self.weights = checkpoint.files, terms, tuple(weights)
        self.options, self.memo = options, memo
        self.walk = Walk(checkpoint, terms)
        self.slots = [s for file in self.files for s in file.slots if is_float(s)]
        whole = options.scope == "tensor" or any(term.whole for term in terms)
        self.spans = spans_of(self.slots, whole=whole, most=self.span)
        self._own = threading.local()

    @cached_property
    def _fast(self) -> ModuleType:
        from vectors.tasks import fast  # noqa: PLC0415  # imports the compiler

        return fast

    def write(self, folder: Path) -> Iterator[str]:
        """Merge every tensor into the files in `folder`."""
        with self.walk.reader:
            cuts = self.cuts()
            majority = None
            if self.options.zero_sum == "majority" and self.options.scope == "global":
                tallies = on_all_cores(
                    lambda span: self.fuse(span, cuts, 0, None), self.spans, self.threads
                )
                majority = _sign(sum(tally for _, tally in tallies))
            for file in self.files:
                yield from self._write_file(file, folder, cuts, majority)

    def _write_file(
        self, file: WeightFile, folder: Path, cuts: Cuts, majority: int | None
    ) -> Iterator[str]:
        with (folder / file.path.name).open("xb", buffering=0) as out:
            out.write(file.header)
            for slot in file.slots:
                if not is_float(slot):
                    self._copy(slot, out.fileno())
                    yield slot.name
            mine = {slot.name for slot in file.slots}
            spans = [span for span in self.spans if span.slot.name in mine]
            left = Counter(span.slot.name for span in spans)

            def work(span: Span) -> int:
                winner = majority
                if self.options.zero_sum == "majority" and winner is None:
                    winner = _sign(self.fuse(span, cuts, 0, None))
                return self.fuse(span, cuts, winner, out.fileno())

            for span, _ in on_all_cores(work, spans, self.threads):
                left[span.slot.name] -= 1
                if not left[span.slot.name]:
                    yield span.slot.name

    def _copy(self, slot: Slot, out: int) -> None:
        """Copy a tensor that cannot be merged, once it is known that no term changes it."""
        if slot.end == slot.start:
            return
        if slot.dtype not in DTYPES:
            dtype, size = torch.uint8, slot.end - slot.start
        else:
            dtype = DTYPES[slot.dtype]
            size = (slot.end - slot.start) // dtype.itemsize
        known = Slot(slot.name, "U8", (size,), slot.start, slot.end)
        for part in self.walk.parts(Span(known, 0, slot.end - slot.start), range(len(self.terms))):
            if (part.tuned != part.base).any():
                raise ShapeMismatch(
                    f"'{slot.name}' is of {dtype} and a term changes it; integers cannot be "
                    "merged, so use that term alone, linearly, at weight 1."
                )
            write_at(out, part.base, slot.start + part.start)

    # Counting

    def cuts(self) -> Cuts:
        """The bits of the smallest magnitude that each term keeps, by tensor or of all."""
        scope = self.options.scope
        found: list[dict[str, Histogram] | None] = [None] * len(self.terms)
        sizes = self._sizes()
        if self.memo is not None:
            for k, term in enumerate(self.terms):
                kept = self.memo.load(term.key, scope)
                if kept is not None and {n: h.size for n, h in kept.items()} == sizes:
                    found[k] = kept
        missing = [k for k, kept in enumerate(found) if kept is None]
        if missing:
            for k, counted in zip(missing, self.count(missing), strict=True):
                found[k] = counted
                if self.memo is not None:
                    self.memo.save(self.terms[k].key, scope, counted)
        whole = [kept for kept in found if kept is not None]
        cuts = {name: np.zeros(len(whole), np.uint32) for name in sizes}
        unclear: list[tuple[int, str, int, int]] = []
        for k, histograms in enumerate(whole):
            for name, histogram in histograms.items():
                rank = rank_of(self.options.density, histogram.size, self.options.rank)
                number, within = histogram.find(rank)
                bits = histogram.pick(number, within)
                if bits is None:
                    unclear.append((k, name, number, within))
                else:
                    cuts[name][k] = bits
        for (k, name, _, _), bits in zip(unclear, self.look(unclear), strict=True):
            cuts[name][k] = bits
        return cuts

    def _sizes(self) -> dict[str, int]:
        sizes: Counter[str] = Counter()
        for span in self.spans:
            sizes[self.group(span)] += span.stop - span.start
        return dict(sizes)

    def group(self, span: Span) -> str:
        return WHOLE if self.options.scope == "global" else span.slot.name

    def count(self, rows: Sequence[int]) -> list[dict[str, Histogram]]:
        """The histograms of the terms numbered `rows`."""
        if self.options.scope == "tensor":
            made: list[dict[str, Histogram]] = [{} for _ in rows]
            for span, tables in on_all_cores(
                lambda span: self._tables(span, rows), self.spans, self.threads
            ):
                for row, table in enumerate(tables):
                    made[row][span.slot.name] = table
            return made
        lock, totals = threading.Lock(), [_Counts() for _ in rows]
        every: list[list[_Counts]] = []

        def work(span: Span) -> None:
            mine = getattr(self._own, "counts", None)
            if mine is None:
                mine = self._own.counts = [_Counts() for _ in rows]
                with lock:
                    every.append(mine)
            self._count_span(span, rows, mine)

        for _ in on_all_cores(work, self.spans, self.threads):
            pass
        for mine in every:
            for total, counts in zip(totals, mine, strict=True):
                total.add(counts)
        return [{WHOLE: total.histogram()} for total in totals]

    def _tables(self, span: Span, rows: Sequence[int]) -> list[Histogram]:
        counts = [_Counts() for _ in rows]
        self._count_span(span, rows, counts)
        return [one.histogram() for one in counts]

    def _count_span(self, span: Span, rows: Sequence[int], counts: Sequence[_Counts]) -> None:
        dtype = DTYPES[span.slot.dtype]
        changing = [row for row, k in enumerate(rows) if self.terms[k].changes(span.slot.name)]
        for row in set(range(len(rows))) - set(changing):
            counts[row].expect(span.stop - span.start)
            counts[row].table_B[0] += span.stop - span.start
        if not changing:
            return
        loose_P = np.empty(PART, np.uint32)
        for part in self.walk.parts(span, [rows[row] for row in changing]):
            for place, row in enumerate(changing):
                counts[row].expect(len(part.base) // dtype.itemsize)
                if dtype == torch.bfloat16:
                    old_P, new_P = (x.view(np.uint16) for x in (part.base, part.tuned[place]))
                    found = self._fast.count_bf16(old_P, new_P, counts[row].table_B, loose_P)
                else:
                    bits_P = _delta_bits(part, place, dtype)
                    found = self._fast.count_fp32(bits_P, counts[row].table_B, loose_P)
                if found < 0:
                    raise not_finite(span.slot.name, self.terms[rows[row]].key)
                counts[row].keep(loose_P[:found])

    def look(self, unclear: Sequence[tuple[int, str, int, int]]) -> list[int]:
        """The bits of the magnitudes whose bins have more in them than was kept."""
        found: list[list[np.ndarray]] = [[] for _ in unclear]

        def work(span: Span) -> None:
            dtype = DTYPES[span.slot.dtype]
            asked = [i for i, row in enumerate(unclear) if row[1] == self.group(span)]
            if not asked:
                return
            rows = sorted({unclear[i][0] for i in asked})
            for part in self.walk.parts(span, rows):
                for i in asked:
                    bits_P = _delta_bits(part, rows.index(unclear[i][0]), dtype) & 0x7FFFFFFF
                    found[i].append(bits_P[bits_P >> LOW == unclear[i][2]])

        if unclear:
            for _ in on_all_cores(work, self.spans, self.threads):
                pass
        picked = []
        for (_, _, _, rank), parts in zip(unclear, found, strict=True):
            whole = np.concatenate(parts)
            place = len(whole) - rank
            picked.append(int(np.partition(whole, place)[place]))
        return picked

    # Merging

    def fuse(self, span: Span, cuts: Cuts, majority: int | None, out: int | None) -> int:
        """Merge a span, write it to `out` if there is one, and return the sum of its signs."""
        dtype, cuts_K = DTYPES[span.slot.dtype], cuts[self.group(span)]
        merge = self._fuse_bf16 if dtype == torch.bfloat16 else self._fuse_any
        tally = 0
        for part in self.walk.parts(span, range(len(self.terms))):
            merged, signs = merge(span.slot, part, cuts_K, majority)
            tally += signs
            if out is not None:
                write_at(out, merged, span.slot.start + part.start * dtype.itemsize)
        return tally

    def _fuse_bf16(
        self, slot: Slot, part: Part, cuts_K: np.ndarray, majority: int | None
    ) -> tuple[np.ndarray, int]:
        out = getattr(self._own, "out", None)
        if out is None:
            out = self._own.out = np.empty(PART, np.uint16)
        out_P = out[: len(part.base) // 2]
        signs = self._fast.fuse_bf16(
            part.base.view(np.uint16),
            part.tuned.view(np.uint16),
            cuts_K,
            *rules(self.weights, self.options, majority),
            out_P,
        )
        return out_P.view(np.uint8), signs

    def _fuse_any(
        self, slot: Slot, part: Part, cuts_K: np.ndarray, majority: int | None
    ) -> tuple[np.ndarray, int]:
        """The plain way, for other types than bf16."""
        dtype = DTYPES[slot.dtype]
        base_P = part.tensor(None, dtype)
        tuned_KP = [part.tensor(k, dtype) for k in range(len(self.terms))]
        stack = Stack(
            slot.name,
            tuple(term.key for term in self.terms),
            self.weights,
            tuple(delta(base_P, tuned_P) for tuned_P in tuned_KP),
            Survey(tuple(cuts_K.view(np.float32).tolist()), majority),
        )
        options = self.options.model_copy(update={"scope": "global"})
        signs = int(elected(ties.trimmed(stack, options), options).double().sum())
        merged = ties.merge(stack, options)
        only = tuned_KP[0] if len(tuned_KP) == 1 else None
        return raw_view(apply(base_P, only, stack, merged)), signs


class _Counts:
    """A histogram in the making."""

    def __init__(self) -> None:
        # Half the width stays nearer to the processor; emptied before it could overflow.
        self.table_B = np.zeros(BINS, np.uint32)
        self._total_B: np.ndarray | None = None
        self._room = TABLE_ROOM
        self._loose: list[np.ndarray] | None = []
        self._held = 0

    def expect(self, count: int) -> None:
        """Make room for `count` more."""
        if count > self._room:
            self._total_B = self.counts_B()
            self.table_B[:] = 0
            self._room = TABLE_ROOM
        self._room -= count

    def counts_B(self) -> np.ndarray:
        """All that was counted, int64."""
        counts_B = self.table_B.astype(np.int64)
        return counts_B if self._total_B is None else counts_B + self._total_B

    def keep(self, loose: np.ndarray) -> None:
        """Keep loose magnitudes, unless there are too many by now."""
        if self._loose is not None and len(loose):
            self._held += len(loose)
            self._loose = [*self._loose, loose.copy()] if self._held <= MOST_LOOSE else None

    def add(self, other: _Counts) -> None:
        """Take in the counts of another thread."""
        self._total_B = self.counts_B() + other.counts_B()
        self.table_B[:] = 0
        if other._loose is None:
            self._loose = None
        for loose in other._loose or ():
            self.keep(loose)

    def histogram(self) -> Histogram:
        """What was counted."""
        return Histogram.of(self.counts_B(), self._loose)


def _delta_bits(part: Part, row: int, dtype: torch.dtype) -> np.ndarray:
    return delta(part.tensor(None, dtype), part.tensor(row, dtype)).numpy().view(np.uint32)


def _sign(tally: int) -> int:
    return (tally > 0) - (tally < 0)


def write_at(out: int, data: np.ndarray, offset: int) -> None:
    """Write all of `data` at a place of a file; any thread may."""
    done = 0
    while done < len(data):
        done += os.pwrite(out, data[done:].data, offset + done)
