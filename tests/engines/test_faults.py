"""A short storm of random requests; `workbench bench faults` is the whole one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


def test_random_requests_leak_nothing_and_get_their_own_vectors(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed on this machine")
    out = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--requests", "400", "--json"],
        env={
            **os.environ,
            "TMPDIR": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        },
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    found = json.loads(out.stdout.splitlines()[-1])
    assert found["wrong"] == 0 and found["requests"] == 400
    # The storm was one: all that it is to show has happened.
    assert found["preempted"] > 0 and found["cancelled"] > 20
    assert found["waiting_for_rows"] > 0 and found["rows_loaded"] > 2 * found["rows"]
    assert found["sampled"] > 5 and found["wrong_vectors"] > 3
    assert found["largest_error_nats"] < 1e-4 and found["wrong_smallest_nats"] > 0.01
