"""Which worker of pytest-xdist runs which files: `make test` runs two workers beside each other.

A file runs in one worker, and so do all files of a row below, because they share engines and the
bundled model, which each worker's session makes once. A file that is in no row is right too, only
perhaps slower. What takes long comes first, so that no worker is left with it at the end.
"""

from __future__ import annotations

import os

from xdist.scheduler import LoadScopeScheduling

__all__ = ["Scheduling", "share_cores"]

ROWS = (
    ("tests/browser/test_walk.py", "tests/browser/test_widths.py"),
    (
        "tests/browser/test_bundled.py",
        "tests/runs/test_shuffled.py",
        "tests/models/test_catalog.py",
    ),
    (
        "tests/engines/test_vllm.py",
        "tests/engines/test_requests.py",
        "tests/engines/test_weights.py",
        "tests/runs/test_work.py",
        "tests/test_readme.py",
    ),
    ("tests/engines/test_modes.py",),
    ("tests/engines/test_lifecycle.py",),
    ("tests/engines/test_families.py",),
    ("tests/engines/test_lora.py",),
    ("tests/engines/test_faults.py",),
    ("tests/engines/test_offline.py",),
    ("tests/store/test_remote.py",),
    ("tests/store/test_faults.py",),
)
UNITS = {path: f"row {number}" for number, row in enumerate(ROWS) for path in row}
ORDER = {unit: number for number, unit in enumerate(dict.fromkeys(UNITS.values()))}


class Scheduling(LoadScopeScheduling):
    """Hands out whole rows and files, the long ones first."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return UNITS.get(path, path)

    def _assign_work_unit(self, node: object) -> None:
        # The queue is in order of the number of tests, which says little of how long they take.
        first = min(self.workqueue, key=lambda unit: ORDER.get(unit, len(ORDER)))
        self.workqueue.move_to_end(first, last=False)
        super()._assign_work_unit(node)


def share_cores(workers: int) -> None:
    """Leave each worker, and every process that it starts, its share of the cores.

    Threads beyond the number of cores wait for one another, and vLLM would bind the engines of all
    workers to one and the same core.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
