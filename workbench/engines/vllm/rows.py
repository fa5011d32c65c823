"""The rows of the steering table: which are loaded, who uses them, which may be replaced.

A row is everything that one request adds in one phase, at all blocks. Equal steering shares a row.
A row that nobody uses stays until its place is needed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from vectors.errors import BackendUnavailable, BlockNotFound, ShapeMismatch
from vectors.steering.operators import Edit, combine, edit_of
from vectors.types import SteeringVector
from workbench.engines.vllm.edit import EditTable
from workbench.engines.vllm.spec import Injection

__all__ = ["RowBank"]

Key = tuple[Injection, ...]


class RowBank:
    """Gives out rows of `table` and fills them by `load`, which returns a vector by its digest."""

    def __init__(self, table: EditTable, load: Callable[[str], SteeringVector]) -> None:
        self._table = table
        self._load = load
        self._rows: OrderedDict[Key, int] = OrderedDict()
        self._users: Counter[int] = Counter()
        self._blocks: dict[int, tuple[int, ...]] = {}
        self._live: Counter[int] = Counter()
        self._projected: Counter[int] = Counter()
        # The low rows, which can hold every operator, are kept for those that need them, so that
        # how many fit is a matter of counting (see `admission`).
        first = max(1, table.projecting)
        self._limits = {False: range(1, first), True: range(first, table.rows)}
        self._free = {adds: list(limit) for adds, limit in self._limits.items()}
        self.loaded = 0

    @property
    def used(self) -> int:
        """How many rows are in use."""
        return len(self._users)

    def acquire(self, key: Key) -> int:
        """Return the row that does `key`; row 0 where it does nothing. Pair with `release`.

        Raises:
            BackendUnavailable: every row is in use.
            NameNotFound, StoreCorrupt, BlockNotFound, ShapeMismatch: a vector that cannot be used.
        """
        if not key:
            return 0
        row = self._rows.get(key)
        if row is None:
            edits = self._edits(key)
            row = self._place(all(e.adds_only for e in edits.values()))
            self._write(row, edits)
            self._rows[key] = row
            self._blocks[row] = tuple(edits)
        self._rows.move_to_end(key)
        self._users[row] += 1
        if self._users[row] == 1:
            self._count(row, 1)
        return row

    def direction(self, digest: str, block: int) -> tuple[Tensor, float]:
        """A vector's unit direction at a block, `[D]` float32 on the table's device, and the mean norm.

        Raises:
            NameNotFound, StoreCorrupt, BlockNotFound, ShapeMismatch: a vector that cannot be used.
        """
        vector = self._load(digest)
        self._check(digest, vector, block)
        v_D = vector.directions[block].to(self._table.add_LRD.device, dtype=torch.float32)
        return v_D, vector.mean_norms[block]

    def release(self, row: int) -> None:
        """One user less."""
        if not row:
            return
        self._users[row] -= 1
        if not self._users[row]:
            del self._users[row]
            self._count(row, -1)

    def _count(self, row: int, by: int) -> None:
        live = self._table.live
        if live is None:
            return  # recorded graphs edit at every block
        projects = row < self._table.projecting
        for block in self._blocks[row]:
            self._live[block] += by
            self._projected[block] += by * projects
            if self._live[block]:
                live[block] = self._projected[block] > 0
            else:
                live.pop(block, None)

    def _place(self, adds_only: bool) -> int:
        limit = self._limits[adds_only]
        if self._free[adds_only]:
            return self._free[adds_only].pop()
        for key, row in self._rows.items():
            if row in limit and row not in self._users:
                del self._rows[key]
                return row
        raise BackendUnavailable(
            f"All {len(limit)} rows of the steering table are in use by other requests; send the "
            "request again, or start the engine with more --rows."
        )

    def _edits(self, key: Key) -> dict[int, Edit]:
        by_block: dict[int, list[Edit]] = {}
        vectors = {digest: self._load(digest) for digest in {i.vector for i in key}}
        for injection in key:
            vector, block = vectors[injection.vector], injection.block
            self._check(injection.vector, vector, block)
            edit = edit_of(
                injection.operator,
                vector.directions[block],
                vector.mean_norms[block],
                injection.dose,
            )
            by_block.setdefault(block, []).append(edit)
        return {block: combine(edits) for block, edits in sorted(by_block.items())}

    def _check(self, digest: str, vector: SteeringVector, block: int) -> None:
        if vector.width != self._table.width:
            raise ShapeMismatch(
                f"The vector {digest[:12]} has width {vector.width} and this model "
                f"{self._table.width}; extract it again for this model."
            )
        if block not in vector.directions or block >= self._table.blocks:
            raise BlockNotFound(
                f"The vector {digest[:12]} cannot be used at block {block}; this "
                f"model has {self._table.blocks} blocks."
            )

    def _write(self, row: int, edits: dict[int, Edit]) -> None:
        table = self._table
        _put(table.add_LRD, row, {b: e.add_D for b, e in edits.items()})
        if row < table.projecting:
            assert table.read_LPD is not None
            assert table.write_LPD is not None
            assert table.keep_LP is not None
            _put(table.read_LPD, row, {b: e.read_D for b, e in edits.items()})
            _put(table.write_LPD, row, {b: e.write_D for b, e in edits.items()})
            keep = [float(b in edits and edits[b].keep_norm) for b in range(table.blocks)]
            table.keep_LP[:, row] = torch.tensor(keep).to(table.keep_LP)
        self.loaded += 1


def _put(table_LRD: Tensor, row: int, values: dict[int, Tensor | None]) -> None:
    """Fill one row at all blocks by one copy; blocks without a value become zero."""
    blocks, _, width = table_LRD.shape
    row_LD = torch.zeros(blocks, width)
    for block, value_D in values.items():
        if value_D is not None:
            row_LD[block] = value_D
    table_LRD[:, row] = row_LD.to(table_LRD)
