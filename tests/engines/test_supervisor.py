"""What the supervisor says of a server that does not become ready, without an engine."""

from __future__ import annotations

import http.server
import json
import threading
import time

import pytest

from workbench.engines.vllm.registration import Registration, read, write
from workbench.engines.vllm.supervisor import Supervisor

CORE = "(EngineCore pid=812) ERROR 11-26 18:52:19 [core.py:1510] "
SERVER = "(APIServer pid=790) "
SELFTEST = "The self-test failed at block 3 of 30: the edit did nothing; do not use this engine."
ENDS = [
    f"{SERVER}Traceback (most recent call last):",
    *(f'{SERVER}  File "/lib/vllm/entrypoints/launcher.py", line {n}, in run' for n in range(60)),
    f"{SERVER}RuntimeError: Engine core initialization failed. See root cause above. Failed core "
    "proc(s): {}",
]


def traceback(error, prefix=CORE):
    return [
        f"{prefix}EngineCore failed to start.",
        f"{prefix}Traceback (most recent call last):",
        f'{prefix}  File "/lib/vllm/v1/engine/core.py", line 1484, in run_engine_core',
        f"{prefix}    engine_core = EngineCoreProc(*args, **kwargs)",
        f"{prefix}{error}",
    ]


@pytest.fixture
def supervise(tmp_path):
    """A supervisor of a server at `url`, which starts."""

    def make(url="http://127.0.0.1:9"):
        path = tmp_path / "engine.json"
        registration = Registration(
            base="0", model="m", checkpoint="c", url=url, token="t", owner="1:0.00"
        )
        write(path, registration)
        return Supervisor(path, registration, [])

    return make


def test_an_error_of_ours_is_the_reason_however_long_the_log_goes_on(supervise):
    supervisor = supervise()
    supervisor.tail.extend(traceback(f"vectors.errors.SteeringNotApplied: {SELFTEST}"))
    supervisor.tail.extend(ENDS * 2)
    assert supervisor._reason(1) == f"vLLM ended with exit code 1: {SELFTEST}"


@pytest.mark.parametrize("error", ["ValueError: No room for 3 blocks.", "KeyError: 'head'"])
def test_of_other_errors_the_first_process_to_fail_is_the_reason(supervise, error):
    supervisor = supervise()
    supervisor.tail.extend([*traceback(error), *ENDS])
    assert supervisor._reason(1) == f"vLLM ended with exit code 1: {error}"


def test_without_another_error_the_last_line_is_the_reason(supervise):
    supervisor = supervise()
    assert supervisor._reason(-9) == "vLLM ended with signal 9: it said nothing"
    supervisor.tail.extend(ENDS)
    assert "Engine core initialization failed" in supervisor._reason(1)
    supervisor.tail.clear()
    supervisor.tail.append("INFO 11-26 18:52:19 [api_server.py:1] loading")
    assert supervisor._reason(1) == "vLLM ended with exit code 1: loading"


def test_an_error_that_a_request_met_is_not_the_end_of_an_engine_that_served(supervise):
    supervisor = supervise()
    supervisor.say(state="ready")
    supervisor.tail.extend(traceback("vectors.errors.StoreCorrupt: The vector 'a' is damaged."))
    supervisor.tail.extend([*traceback("MemoryError: no memory"), *ENDS])
    assert supervisor._reason(1) == "vLLM ended with exit code 1: MemoryError: no memory"


@pytest.fixture
def answering():
    """Start a server that gives one answer to everything; return its address."""
    servers = []

    def start(status, body):
        class Fixed(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, format, *args):
                pass

        servers.append(http.server.HTTPServer(("127.0.0.1", 0), Fixed))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (
            500,
            json.dumps({"error": {"message": "no method workbench_hello", "code": 500}}),
            "hello",
        ),
        (503, json.dumps({"detail": "The engine is not there."}), "The engine is not there."),
        (500, "Internal Server Error", "Internal Server Error"),
        (500, "[]", "500 ([])"),
        (401, json.dumps({"error": "Unauthorized"}), "Unauthorized"),
        (404, "{}", "without the workbench's plugin"),
    ],
)
def test_a_handshake_that_fails_ends_the_start_at_once(supervise, answering, status, body, said):
    supervisor = supervise(answering(status, body))
    supervisor._shake_hands()
    told = read(supervisor.path)
    assert supervisor.stopping.is_set() and told is not None and told.state == "failed"
    assert said in told.error and told.error.endswith("; run 'workbench doctor'.")


def test_the_log_says_why_a_handshake_failed(supervise, answering):
    supervisor = supervise(answering(500, "Internal Server Error"))
    supervisor.tail.extend(
        traceback("vectors.errors.BackendUnavailable: Tested with 1, not with 2.")
    )
    supervisor._shake_hands()
    assert supervisor.registration.error.endswith(": Tested with 1, not with 2.")


def test_a_handshake_that_is_answered_and_one_that_is_not_yet(supervise, answering):
    waiting = supervise()
    waiting._shake_hands()
    assert waiting.registration.state == "starting" and not waiting.stopping.is_set()
    ready = supervise(answering(200, json.dumps({"workers": [{"blocks": 4}]})))
    ready._shake_hands()
    assert ready.registration.state == "ready" and ready.registration.hello == {"blocks": 4}
    assert ready.registration.ready_at <= time.time()
