"""Start vLLM, find one that runs, stop it: one engine per home and base."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from filelock import FileLock

from vectors.errors import BackendUnavailable, Cancelled, EngineFailed, InputError
from workbench.engines.vllm.gpu import gpu_share, has_cuda
from workbench.engines.vllm.registration import Registration, find, read, write
from workbench.engines.vllm.settings import LORAS, LoraSlots
from workbench.engines.vllm.watchdog import mark
from workbench.models.catalog import Model
from workbench.settings import Home

__all__ = ["EngineServer", "free_port", "running", "start_or_attach"]

CPU_DTYPE = "WORKBENCH_CPU_DTYPE"
START_LIMIT = 600.0
PLUGINS = "workbench_steering,workbench_endpoints"

Watch = Callable[[Registration], None]


class EngineServer:
    """An engine that this process started, or one that another process did."""

    def __init__(self, path: Path, owned: subprocess.Popen[bytes] | None) -> None:
        self.path = path
        self.owned = owned
        if owned is not None:
            atexit.register(self.stop)

    @property
    def registration(self) -> Registration:
        """The present state.

        Raises:
            EngineFailed: the engine is gone; the message has its last words.
        """
        found = read(self.path)
        if found is None or (found.state != "failed" and not found.alive):
            raise EngineFailed(f"The engine has stopped; start it again (its log is {self.log}).")
        if found.state == "failed":
            raise EngineFailed(f"{found.error} Its log is {self.log}.")
        return found

    @property
    def log(self) -> Path:
        """Everything that vLLM printed."""
        return self.path.with_suffix(".log")

    def wait(
        self, watch: Watch = lambda _: None, cancel: Callable[[], bool] = lambda: False
    ) -> Registration:
        """Return once the engine is ready, showing each stage to `watch`.

        Raises:
            EngineFailed: it died or did not become ready in time.
            Cancelled: `cancel` said so; the engine goes on starting.
        """
        limit = time.monotonic() + START_LIMIT
        while time.monotonic() < limit:
            now = self.registration
            watch(now)
            if now.state == "ready":
                return now
            if cancel():
                # Others may wait for it, too; who wants it ended stops it.
                raise Cancelled("Waiting for the engine was cancelled.")
            time.sleep(0.25)
        self.stop()
        raise EngineFailed(f"The engine was not ready after {START_LIMIT:.0f} s; see {self.log}.")

    def stop(self) -> None:
        """End an engine that this process started; others are left alone."""
        if self.owned is None or self.owned.poll() is not None:
            return
        if self.owned.stdin is not None:
            with contextlib.suppress(OSError):
                self.owned.stdin.close()
        with contextlib.suppress(OSError):
            self.owned.send_signal(signal.SIGTERM)
        try:
            self.owned.wait(timeout=12)
        except subprocess.TimeoutExpired:
            self.owned.kill()
            self.owned.wait(timeout=5)


def path_of(home: Home, base: str) -> Path:
    """Where the engine of `base` registers."""
    return home.engines / f"{base[:32]}.json"


def running(home: Home) -> list[Registration]:
    """The engines of this home that live or start."""
    found = [find(path) for path in sorted(home.engines.glob("*.json"))]
    return [registration for registration in found if registration is not None]


def start_or_attach(
    home: Home, model: Model, *, port: int | None = None, loras: LoraSlots | None = None
) -> EngineServer:
    """Attach to the engine of this home and base, or start one; it may still be starting.

    Args:
        loras: room for LoRAs, of an engine that is started; by default what the environment says.

    Raises:
        BackendUnavailable: vLLM is not installed, too little memory, or the port is in use.
    """
    path = path_of(home, model.base)
    with FileLock(path.with_suffix(".lock")):
        if find(path) is not None:
            return EngineServer(path, None)
        if importlib.util.find_spec("vllm") is None:
            raise BackendUnavailable(
                "vLLM is not installed; run 'make setup', or use --engine transformers."
            )
        need_memory(model)
        loras = LoraSlots.of_environment() if loras is None else loras
        chosen = port or free_port()
        if port and _in_use(port):
            raise BackendUnavailable(f"Port {port} is in use; name another with --port.")
        registration = Registration(
            base=model.base,
            model=model.name,
            checkpoint=str(model.folder),
            url=f"http://127.0.0.1:{chosen}",
            token=secrets.token_hex(16),
            owner=mark(),
            started_at=time.time(),
        )
        write(path, registration)
        supervisor = [sys.executable, "-m", "workbench.engines.vllm.supervisor", str(path)]
        process = subprocess.Popen(
            [*supervisor, *_command(model, chosen, loras)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=open(path.with_suffix(".supervisor.log"), "w"),  # noqa: SIM115  # inherited by the child
            env=_environment(home, registration),
            start_new_session=True,
        )
        return EngineServer(path, process)


def need_memory(model: Model) -> None:
    """Refuse a model that would not fit, before the machine swaps itself to death."""
    free = psutil.virtual_memory().available
    need = int(model.bytes * (2.2 if _cpu_dtype(model) == "float32" else 1.3)) + (2 << 30)
    if has_cuda():
        return
    if free < need:
        raise BackendUnavailable(
            f"The engine needs about {need / 2**30:.1f} GB of memory for {model.name} and "
            f"{free / 2**30:.1f} GB are free; close other programs or choose a smaller model."
        )


def _command(model: Model, port: int, loras: LoraSlots) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model.folder), "--served-model-name", model.name]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(model.served_window)]
    command += [
        "--max-logprobs",
        "1000",
        "--generation-config",
        "vllm",
        "--disable-uvicorn-access-log",
    ]
    command += ["--worker-extension-cls", "workbench.engines.vllm.worker.WorkbenchWorker"]
    command += ["--middleware", "workbench.engines.vllm.gate.WeightGate"]
    command += loras.options()
    if has_cuda():
        command += ["--gpu-memory-utilization", str(gpu_share(model.bytes))]
    else:
        # Compiling takes a CPU minutes and gains it little.
        command += ["--enforce-eager", "--max-num-seqs", "64", "--dtype", _cpu_dtype(model)]
    return command


def _environment(home: Home, registration: Registration) -> dict[str, str]:
    cache = home.engines / "cache"
    return {
        **os.environ,
        "WORKBENCH_HOME": str(home.root),
        "WORKBENCH_BASE": registration.base,
        "WORKBENCH_LIBRARY": str(home.library),
        "WORKBENCH_WEIGHTS": str(home.weights),
        LORAS: str(home.loras),
        "WORKBENCH_CHECKPOINT": registration.checkpoint,
        "WORKBENCH_TOKEN": registration.token,
        "VLLM_API_KEY": registration.token,
        "VLLM_PLUGINS": PLUGINS,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "XDG_CACHE_HOME": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _cpu_dtype(model: Model) -> str:
    """What `WORKBENCH_CPU_DTYPE` says; else float32 on a CPU without bfloat16 instructions, where it
    is 3 to 4 times as fast as bfloat16.

    Raises:
        InputError: the variable names another type.
    """
    if model.hybrid:
        # vLLM's CPU kernel for Gated DeltaNet takes bfloat16 alone.
        return "bfloat16"
    if named := os.environ.get(CPU_DTYPE):
        if named not in ("float32", "bfloat16"):
            raise InputError(f"{CPU_DTYPE} is float32 or bfloat16, not {named!r}.")
        return named
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def free_port() -> int:
    """A free port that nobody else is given for a minute: vLLM takes it some ten seconds later."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        probe.listen(1)
        with socket.create_connection(probe.getsockname()):
            # The end that closes first keeps its port for a minute from all who do not name it.
            probe.accept()[0].close()
        return probe.getsockname()[1]


def _in_use(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
