"""The library: a commit against hash, write and fsync; fsck against the hash; 10,000 entries."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from _results import append

from vectors.store import Library
from vectors.store.manifests import Manifest
from vectors.tasks.delta import raw_bytes

BASE = "ba" * 32
SHARD = 1 << 22  # elements of a tensor: 8 MB of bf16
MEGABYTE = 1e6


def timed(work: Callable[[], Any], times: int) -> float:
    """The shortest of several runs, in seconds."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def fine_tune(megabytes: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base and a fine-tune in bf16, seeded: deviations 0.02, and a tenth of that for the change."""
    rng = torch.Generator().manual_seed(0)
    base, tuned, left = {}, {}, int(megabytes * MEGABYTE / 2)
    while left:
        count = min(left, SHARD)
        name = f"t{len(base):03d}"
        weights = torch.randn(count, generator=rng) * 0.02
        base[name] = weights.bfloat16()
        tuned[name] = (base[name].float() + torch.randn(count, generator=rng) * 0.002).bfloat16()
        left -= count
    return base, tuned


def commit(folder: Path, megabytes: float, times: int) -> dict[str, Any]:
    """A commit of a fine-tune, and the plain alternative: hash, write and fsync of its raw bytes."""
    base, tuned = fine_tune(megabytes)

    def plain() -> None:
        with (folder / "plain").open("wb") as file:
            for tensor in tuned.values():
                data = raw_bytes(tensor)
                hashlib.sha256(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        (folder / "plain").unlink()

    def ours() -> None:
        library = Library(folder / "library")
        library.save_task("tuned", BASE, base, tuned)
        entries.append(library.disk_use(library.get("tuned")))
        shutil.rmtree(folder / "library")

    entries: list[int] = []
    plain()
    plain_s, ours_s = timed(plain, times), timed(ours, times)
    library = Library(folder / "exact")
    entry = library.save_task("tuned", BASE, base, tuned)
    wrong = sum(
        not torch.equal(library.tuned_tensor(entry.manifest, n, base[n]), tuned[n]) for n in tuned
    )
    shutil.rmtree(folder / "exact")
    size = sum(t.nbytes for t in tuned.values())
    return {
        "case": "commit",
        "raw_mb": size / MEGABYTE,
        "kept_mb": entries[-1] / MEGABYTE,
        "plain_s": plain_s,
        "commit_s": ours_s,
        "ratio": ours_s / plain_s,
        "mismatches": wrong,
    }


def check(folder: Path, megabytes: float, times: int) -> dict[str, Any]:
    """fsck of large objects, and the bare hash of the same files on all cores."""
    library = Library(folder / "check")
    rng = np.random.default_rng(0)
    parts = [rng.bytes(8 << 20) for _ in range(max(1, int(megabytes * MEGABYTE) >> 23))]
    for number, part in enumerate(parts):
        library._save(f"n{number}", _attached(library, part))
    paths = [path for path, _ in library.objects.scan()]

    def bare() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda path: _hash(path), paths))

    bare()
    bare_s, ours_s = timed(bare, times), timed(library.fsck, times)
    clean, size = library.fsck().clean, library.objects.total()
    shutil.rmtree(folder / "check")
    return {
        "case": "fsck",
        "mb": size / MEGABYTE,
        "hash_mb_s": size / MEGABYTE / bare_s,
        "fsck_mb_s": size / MEGABYTE / ours_s,
        "ratio": ours_s / bare_s,
        "clean": clean,
    }


def many(folder: Path, count: int, times: int) -> dict[str, Any]:
    """List, show, log, history and diff in a library of many entries."""
    root = folder / "many"
    library = Library(root)
    entries = [_attached(library, b"%d" % number) for number in range(2)]
    db = sqlite3.connect(root / "store.db", isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    for number in range(count):
        # Without waiting for the disk 10,000 times: only reading is measured here.
        data = entries[0].model_copy(update={"info": {"number": number}}).to_json()
        digest = hashlib.sha256(data).hexdigest()
        library.manifests.path(digest).write_bytes(data)
        _name(db, number, digest)
    db.execute("COMMIT")
    db.close()
    library.list()  # notes what lists show
    wide = [_wide(library, number, count) for number in range(2)]
    for number, manifest in enumerate(wide):
        library._save(f"wide-{number}", manifest)
    name = f"name-{count // 2:05d}"
    found = {
        "list_s": timed(library.list, times),
        "show_s": timed(lambda: library.get(name), times),
        "log_s": timed(lambda: library.log(100), times),
        "history_s": timed(lambda: library.history(name), times),
        "diff_s": timed(lambda: library.diff(name, "name-00001"), times),
        "diff_wide_s": timed(lambda: library.diff("wide-0", "wide-1"), times),
    }
    assert len(library.list()) == count + 2
    assert len(library.diff("wide-0", "wide-1").tensors) == count
    shutil.rmtree(root)
    return {"case": "many", "entries": count, **found, "slowest_s": max(found.values())}


def _attached(library: Library, data: bytes) -> Manifest:
    stored = library.objects.write(data)
    return Manifest.of(kind="contrast-set", base=None, files={"a.json": stored}, info={})


def _name(db: sqlite3.Connection, number: int, digest: str) -> None:
    name, created = f"name-{number:05d}", "2026-11-22T10:00:00.000+00:00"
    row = db.execute("INSERT INTO names (name, kind) VALUES (?, 'contrast-set')", (name,))
    db.execute("INSERT INTO refs VALUES (?, 1, ?, ?)", (row.lastrowid, digest, created))
    db.execute(
        """INSERT INTO reflog (created, action, name, revision, digest, detail)
           VALUES (?, 'save', ?, 1, ?, '')""",
        (created, name, digest),
    )


def _wide(library: Library, seed: int, count: int) -> Manifest:
    """A task vector of very many tensors, none of which is read."""
    stored = library.objects.write(zstandard.compress(bytes(4)))
    tensors = {
        f"layer.{number}": {
            "hash": stored,
            "shape": [2],
            "dtype": "BF16",
            "encoding": "xor",
            "content": hashlib.sha256(b"%d.%d" % (seed, number)).hexdigest(),
            "norm": float(number + seed),
            "changed": 1,
        }
        for number in range(count)
    }
    body = {"kind": "task-vector", "base": BASE, "tensors": tensors}
    return Manifest.model_validate(body)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=269.0, help="size of the fine-tune")
    parser.add_argument("--entries", type=int, default=10_000, help="entries of the library")
    parser.add_argument("--times", type=int, default=3, help="runs; the best is reported")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        rows = [
            commit(folder, given.megabytes, given.times),
            check(folder, given.megabytes, given.times),
            many(folder, given.entries, given.times),
        ]
    result = {
        "cases": rows,
        "machine": {
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "sqlite": sqlite3.sqlite_version,
            "zstandard": zstandard.__version__,
        },
    }
    append("store", {"cases": rows})
    if given.json:
        print(json.dumps(result))
        return
    for row in rows:
        facts = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(", ".join(facts))
    print(result["machine"])


if __name__ == "__main__":
    main()
