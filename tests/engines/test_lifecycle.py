"""An engine's life: it is shared, its death is told, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from vectors.errors import BackendUnavailable, Cancelled, EngineFailed, InputError
from vectors.steering.controls import random_direction
from vectors.types import SteeringVector
from workbench.engines.base import Request, Sampling
from workbench.engines.vllm.client import VllmEngine
from workbench.engines.vllm.registration import Registration, find, read, write
from workbench.engines.vllm.server import (
    CPU_DTYPE,
    _cpu_dtype,
    free_port,
    path_of,
    running,
    start_or_attach,
)
from workbench.engines.vllm.watchdog import mark
from workbench.service import Workbench
from workbench.settings import Home

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

LOST = r"went away|stopped|answered 5"
OWNER = """
import sys, time
from workbench.service import Workbench
w = Workbench(sys.argv[1], sys.argv[2])
w.start_engine()
print("started", flush=True)
time.sleep(600)
"""


def of_home(home: Home) -> list[psutil.Process]:
    """Every process that carries the home in its environment, this one apart."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("WORKBENCH_LIBRARY") == str(home.library):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(condition, seconds, what):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.1)


@pytest.fixture
def home(tmp_path):
    return Home.at(tmp_path / "engines-home")


def owner_of(home, folder):
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(home.root), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline().strip() == "started"
    return process


def test_shared_then_its_death_is_told_then_started_again(home, tiny_folder):
    request = Request(({"role": "user", "content": "hello"},), sampling=Sampling(1900, 0.0))
    with Workbench(home.root, str(tiny_folder)) as first:
        with pytest.raises(Cancelled):
            first.engine(cancel=lambda: True)
        # Whoever does not want to wait for it leaves it to the others.
        engine = first.engine()
        second = Workbench(home.root, str(tiny_folder))
        assert second.engine().generate([Request(request.messages, sampling=Sampling(3))])
        assert second.engine_status().url == first.engine_status().url
        assert len(running(home)) == 1
        second.close()
        assert first.engine_status().state == "ready", "whoever attached does not stop it"

        model = first.model()
        directions = {b: random_direction(model.width, b) for b in range(4)}
        vector = SteeringVector(model.base, directions, dict.fromkeys(directions, 8.0), 2)
        first.library.save_vector("north", vector)
        # Looked for beforehand: replies of so small a model are soon over.
        victim = max(of_home(home), key=lambda p: p.memory_info().rss)
        # A batch of which every second one is steered, each with a dose of its own; all are open.
        steers = [f"north={n / 10}" if n % 2 else "" for n in range(6)]
        streams = [engine.stream(dataclasses.replace(request, steer=s)) for s in steers]
        for stream in streams:
            next(stream)
        whole = dataclasses.replace(request, steer="north=1")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(engine.generate, [whole])
            victim.kill()
            with pytest.raises(EngineFailed, match=LOST):
                waiting.result(60)
        cut = 0
        for stream in streams:
            try:
                *_, reply = stream
            except EngineFailed as error:
                assert re.search(LOST, str(error))
                cut += 1
            else:
                # While this process got no core, its reply was written to the end.
                assert reply.tokens == 1900
        assert cut, "every reply was whole before its engine died"
        wait_until(lambda: first.engine_status().state == "failed", 30, "its death was not told")
        assert (
            "vLLM ended" in first.engine_status().error or "stopped" in first.engine_status().error
        )
        again = first.engine().generate([Request(request.messages, sampling=Sampling(3))])
        assert again[0].tokens == 3
    wait_until(lambda: not of_home(home), 20, "processes were left behind")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_when_the_owner_goes(home, tiny_folder, how):
    owner = owner_of(home, tiny_folder)
    wait_until(lambda: len(of_home(home)) >= 2, 60, "vLLM never started")
    os.kill(owner.pid, how)
    owner.wait(20)
    wait_until(lambda: not of_home(home), 30, f"left: {of_home(home)}")
    assert running(home) == []


def test_nothing_is_left_when_the_supervisor_is_killed(home, tiny_folder):
    owner = owner_of(home, tiny_folder)
    base = next(home.engines.glob("*.json")).stem
    path = home.engines / f"{base}.json"
    wait_until(lambda: read(path).supervisor and len(of_home(home)) >= 2, 60, "never started")
    # Past the import of vLLM the plugin watches; before, the dead supervisor is seen at its load.
    os.kill(int(read(path).supervisor.split(":")[0]), signal.SIGKILL)
    wait_until(lambda: not of_home(home), 90, "vLLM outlived its supervisor")
    assert find(path) is None
    owner.kill()
    owner.wait()


def test_a_server_without_our_plugin_is_refused():
    import http.server
    import threading

    class Plain(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Plain)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(EngineFailed, match="no workbench plugin"):
        VllmEngine(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    with pytest.raises(EngineFailed, match="No engine answers"):
        VllmEngine("http://127.0.0.1:9")


def test_a_port_in_use_and_a_dead_registration(home, tiny_folder):
    workbench = Workbench(home.root, str(tiny_folder))
    base = workbench.model().base
    dead = Registration(
        base=base, model="x", checkpoint="x", url="http://127.0.0.1:9", token="", owner="1:0.00"
    )
    write(path_of(home, base), dead)
    assert find(path_of(home, base)) is None
    alive = dead.model_copy(update={"owner": mark()})
    write(path_of(home, base), alive)
    assert find(path_of(home, base)) == alive
    path_of(home, base).unlink()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BackendUnavailable, match="in use"):
            start_or_attach(home, workbench.model(), port=taken.getsockname()[1])


def test_a_free_port_is_given_to_nobody_but_who_names_it():
    port = free_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    with socket.socket() as named:
        named.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        named.bind(("127.0.0.1", port))


def test_the_type_on_a_cpu_may_be_named(home, tiny_folder, monkeypatch):
    model = Workbench(home.root, str(tiny_folder)).model()
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setenv(CPU_DTYPE, dtype)
        assert _cpu_dtype(model) == dtype
    assert _cpu_dtype(dataclasses.replace(model, hybrid=True)) == "bfloat16"
    monkeypatch.setenv(CPU_DTYPE, "float16")
    with pytest.raises(InputError, match="float32 or bfloat16, not 'float16'"):
        start_or_attach(home, model)
    assert running(home) == []
