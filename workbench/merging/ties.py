"""TIES of whole models on a CUDA device: the counts, cuts and bits of `vectors.tasks.streams`.

Where base and terms fit on the device they cross the bus once: magnitudes are counted as they
arrive, and the merge then runs on what is there, in place of the first term. Where they do not,
they cross a second time. Nothing waits for the device but the cuts and the results.

Shape letters: K terms, P elements of a part, B bins, L loose magnitudes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from steer_kernels import merge as kernels
from torch import Tensor

from vectors.store.checkpoint import Checkpoint
from vectors.tasks.election import Rules, rules
from vectors.tasks.histograms import Histogram
from vectors.tasks.memo import Memo
from vectors.tasks.methods.ties import TiesParameters
from vectors.tasks.parts import Span, on_all_cores
from vectors.tasks.sources import Term
from vectors.tasks.stack import not_finite
from vectors.tasks.streams import MOST_LOOSE, WHOLE, Cuts, Ties, write_at
from workbench.merging.crossing import Crossing, Held, free_bytes, held_in, on_stream

__all__ = ["SPAN", "THREADS", "DeviceTies"]

SPAN = 1 << 24  # elements that go at a time
THREADS = 16
BALLOTS, GAINS, AMOUNTS = "\0ballots", "\0gains", "\0amounts"  # no tensor is called so
_Constants = tuple[Rules, tuple[bool, bool, bool], Mapping[str, Tensor]]
MOST_COUNTED = (1 << 31) - 1  # in one table, whose places have 32 bits


class DeviceTies(Ties):
    """One merge on `device`.

    Args:
        held: what stays on the device; found by its free memory if nothing is said.
        base: the base's tensors, if they are on the device already.
    """

    span = SPAN
    threads = THREADS

    def __init__(
        self,
        checkpoint: Checkpoint,
        terms: Sequence[Term],
        weights: Sequence[float],
        options: TiesParameters,
        memo: Memo | None,
        device: torch.device,
        held: Held | None = None,
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(checkpoint, terms, weights, options, memo)
        if held is None:
            elements = sum(span.stop - span.start for span in self.spans)
            held = held_in(free_bytes(device), elements, len(terms), THREADS, base=base is not None)
        self.held: Held = held
        self.crossing = Crossing(self.spans, self.walk.reader, terms, device, held, base)
        self._device = device
        self._launching = threading.Lock()  # the first launch compiles
        self._known: dict[int | None, _Constants] = {}

    # Counting

    def count(self, rows: Sequence[int]) -> list[dict[str, Histogram]]:
        """The histograms of the terms numbered `rows`."""
        made: list[dict[str, Histogram]] = [{} for _ in rows]
        with on_stream(self.crossing.work):
            often = {k: _Often(self._device) for k in rows}
        if self.options.scope == "tensor":

            def work(span: Span) -> list[Histogram]:
                with on_stream(self.crossing.work):
                    counts = [
                        _Counted(self._device, span.stop - span.start, often[k]) for k in rows
                    ]
                self._take_span(span, rows, counts)
                return [self._finished(c, rows[row], [span]) for row, c in enumerate(counts)]

            for span, tables in on_all_cores(work, self.spans, self.threads):
                for row, table in enumerate(tables):
                    made[row][span.slot.name] = table
            return made
        with on_stream(self.crossing.work):
            counts = [_Counted(self._device, MOST_LOOSE, often[k]) for k in rows]
        for _ in on_all_cores(
            lambda span: self._take_span(span, rows, counts), self.spans, self.threads
        ):
            pass
        for row, k in enumerate(rows):
            made[row][WHOLE] = self._finished(counts[row], k, self.spans)
        return made

    def _take_span(self, span: Span, rows: Sequence[int], counts: Sequence[_Counted]) -> None:
        changing = [row for row, k in enumerate(rows) if self.terms[k].changes(span.slot.name)]
        for row in set(range(len(rows))) - set(changing):
            with self._launching:
                counts[row].still += span.stop - span.start
        for part in self.crossing.parts(span, [rows[row] for row in changing]) if changing else ():
            with self._launching, on_stream(self.crossing.work):
                for row in changing:
                    counts[row].take(part.base_P, part.tuned_KP[rows[row]])

    def _finished(self, counts: _Counted, k: int, spans: Sequence[Span]) -> Histogram:
        with on_stream(self.crossing.work):
            histogram = counts.histogram()
        if histogram is None:
            raise not_finite(self._where_not_finite(k, spans), self.terms[k].key)
        return histogram

    def _where_not_finite(self, k: int, spans: Sequence[Span]) -> str:
        """The name of a tensor that the term moves by what is not finite."""
        for span in spans:
            with on_stream(self.crossing.work):
                counts = _Counted(self._device, 0, _Often(self._device))
            self._take_span(span, [k], [counts])
            with on_stream(self.crossing.work):
                if counts.histogram() is None:
                    return span.slot.name
        return spans[0].slot.name

    def look(self, unclear: Sequence[tuple[int, str, int, int]]) -> list[int]:
        """The bits of the magnitudes whose bins have more in them than was kept."""
        if not unclear:
            return []
        order = sorted(range(len(unclear)), key=lambda i: unclear[i][1])
        groups: dict[str, list[int]] = {}
        for place, i in enumerate(order):
            groups.setdefault(unclear[i][1], []).append(place)
        with on_stream(self.crossing.work):
            shape = (len(unclear), kernels.FINE)
            counts_UF = torch.zeros(shape, dtype=torch.int64, device=self._device)
            asked = [[unclear[i][0] for i in order], [unclear[i][2] for i in order]]
            rows_U, numbers_U = torch.tensor(asked, dtype=torch.int32).to(self._device)

        def work(span: Span) -> None:
            places = groups.get(self.group(span))
            if places is None:
                return
            mine = slice(places[0], places[-1] + 1)
            given = rows_U[mine], numbers_U[mine], counts_UF[mine]
            rows = [unclear[order[place]][0] for place in places]
            for part in self.crossing.parts(span, rows):
                with self._launching, on_stream(self.crossing.work):
                    kernels.look(part.base_P, part.tuned_KP, *given)

        for _ in on_all_cores(work, self.spans, self.threads):
            pass
        with on_stream(self.crossing.work):
            found_UF = counts_UF.cpu().numpy()
        picked = [0] * len(unclear)
        for i, found_F in zip(order, found_UF, strict=True):
            _, _, number, rank = unclear[i]
            place = int(np.searchsorted(np.cumsum(found_F[::-1]), rank))
            # Those without low bits are the smallest of their bin.
            low = kernels.FINE - 1 - place if place < kernels.FINE else 0
            picked[i] = (number * kernels.FINE) | low
        return picked

    # Merging

    def fuse(self, span: Span, cuts: Cuts, majority: int | None, out: int | None) -> int:
        """Merge a span, write it to `out` if there is one, else return the sum of its signs."""
        if out is None:
            with on_stream(self.crossing.work):
                tally = torch.zeros(1, dtype=torch.int64, device=self._device)
            for _ in self.merged(span, cuts, majority, tally):
                pass
            with on_stream(self.crossing.work):
                return int(tally)
        for start, merged_P in self.merged(span, cuts, majority):
            first = span.slot.start + 2 * start
            self.crossing.fetch(merged_P, lambda at, raw, f=first: write_at(out, raw, f + at))
        return 0

    def merged(
        self, span: Span, cuts: Cuts, majority: int | None, tally: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the first element and the merged bits of each part of a span, on the device.

        Args:
            tally: where the elected signs are added up, in place of the merge.
        """
        rule, plain, sent = self._constants(cuts, majority)
        cuts_K = sent[self.group(span)]
        for part in self.crossing.parts(span, range(len(self.terms))):
            out_P = part.tuned_KP[0] if tally is None else None
            with self._launching, on_stream(self.crossing.work):
                kernels.fuse_bf16(
                    part.base_P, part.tuned_KP, cuts_K, sent[BALLOTS], sent[GAINS], sent[AMOUNTS],
                    float(rule.fixed), rule.by_count, rule.largest, float(rule.winner),
                    float(rule.scale), out_P, tally, plain,
                )  # fmt: skip
            if out_P is not None:
                self.crossing.forget(span)
                yield part.start, out_P

    def merged_everywhere(self, cuts: Cuts) -> dict[str, Tensor]:
        """The merged bits by name, on the device, where the first term was; all must be held there.

        Waits for nothing: what follows on another stream has to wait for the device.
        """
        for span in self.spans:
            for _ in self.merged(span, cuts, None):
                pass
        return self.crossing.tensors_of(0)

    def _constants(self, cuts: Cuts, majority: int | None) -> _Constants:
        """The rules, which of their products are by 1, and what the kernel reads, sent once."""
        with self._launching, on_stream(self.crossing.work):
            if majority not in self._known:
                rule = rules(self.weights, self.options, majority)
                rows = {name: cuts_K.view(np.float32) for name, cuts_K in cuts.items()}
                rows |= zip((BALLOTS, GAINS, AMOUNTS), rule[:3], strict=True)
                sent_GK = torch.from_numpy(np.stack(list(rows.values()))).to(self._device)
                ones = [bool((x_K == 1).all()) for x_K in rule[:3]]
                sent = dict(zip(rows, sent_GK, strict=True))
                self._known[majority] = rule, (ones[0], ones[1], ones[2]), sent
        return self._known[majority]


class _Often:
    """The bins that magnitudes of one term have mostly fallen into so far; no count depends on it."""

    def __init__(self, device: torch.device) -> None:
        self.slots_B = torch.full((kernels.BINS,), kernels.OFTEN, dtype=torch.int16, device=device)
        self.often_H = torch.arange(kernels.OFTEN, dtype=torch.int32, device=device)
        self._places_H = self.often_H.to(torch.int16)
        self._parts = 0

    def learn(self, counts: _Counted) -> None:
        """Look at the counts after the first part, the second, the fourth, and so on."""
        self._parts += 1
        if self._parts & (self._parts - 1):
            return
        top_H = counts.counts_B().topk(kernels.OFTEN).indices
        self.slots_B.fill_(kernels.OFTEN)
        self.slots_B[top_H] = self._places_H
        self.often_H.copy_(top_H)


class _Counted:
    """A histogram in the making on the device."""

    def __init__(self, device: torch.device, loose: int, often: _Often) -> None:
        self._often = often
        shape = (kernels.COPIES, kernels.BINS)
        self.table_CB = torch.zeros(shape, dtype=torch.int32, device=device)
        self.loose_L = torch.empty(min(loose, MOST_LOOSE), dtype=torch.int32, device=device)
        self.tallies_3 = torch.zeros(kernels.TALLIES, dtype=torch.int64, device=device)
        self.still = 0  # elements that are known not to move
        self._total_B: Tensor | None = None
        self._room = MOST_COUNTED

    def take(self, base_P: Tensor, tuned_P: Tensor) -> None:
        """Count a part."""
        if len(base_P) > self._room:
            self._total_B = self.counts_B()
            self.table_CB.zero_()
            self._room = MOST_COUNTED
        self._room -= len(base_P)
        kernels.count_bf16(
            base_P, tuned_P, self.table_CB, self.loose_L, self.tallies_3,
            self._often.slots_B, self._often.often_H,
        )  # fmt: skip
        self._often.learn(self)

    def histogram(self) -> Histogram | None:
        """What was counted; None if a difference was not finite."""
        counts_B = self.counts_B().cpu().numpy()
        zero, held, infinite = self.tallies_3.tolist()
        if infinite:
            return None
        counts_B[0] += zero + self.still
        if held > MOST_LOOSE:
            return Histogram.of(counts_B, None)
        return Histogram.of(counts_B, [self.loose_L[:held].cpu().numpy().view(np.uint32)])

    def counts_B(self) -> Tensor:
        """All that was counted, but for what does not move."""
        counts_B = self.table_CB.sum(0, dtype=torch.int64)
        return counts_B if self._total_B is None else counts_B + self._total_B
