"""A small process between the workbench and vLLM that makes sure that nothing is left behind.

It lives as long as its standard input is open: the one who started it holds the other end, so a
kill -9 of that process closes it too. Then, or on a signal, or when vLLM dies, it ends the whole
tree. The processes of the tree watch the supervisor in turn (`watchdog`). Everything it knows it
writes to the registration file, which others read.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import httpx
import psutil

from workbench.engines.vllm.paths import HELLO
from workbench.engines.vllm.registration import Registration, write
from workbench.engines.vllm.watchdog import SUPERVISOR, mark

__all__ = ["main"]

PR_SET_CHILD_SUBREAPER = 36
STAGES = (
    (re.compile(r"Application startup complete"), "shaking hands"),
    (re.compile(r"[Ww]arm(ing)?[ -]?up|KV cache size|num_gpu_blocks"), "warming up"),
    (
        re.compile(r"[Ll]oading (safetensors|weights|model)|Starting to load model"),
        "loading weights",
    ),
    (re.compile(r"Initializing a V1 LLM engine|Waiting for .* engine"), "starting the engine"),
    (re.compile(r"vLLM (API server )?version|version [0-9.]+"), "reading the model's settings"),
)
NOT_REASONS = re.compile(r"^\s*(File |at |\^|~|Traceback|During handling)|^\s*$")
PREFIX = re.compile(r"^(\([^)]*\)\s?)?([A-Z]+ \d\d-\d\d [\d:]+ \[[^]]*\]\s?)?")
"""What vLLM writes before a line: the process, and of its log the level, the time and the place."""
OURS = re.compile(r"vectors\.errors\.\w+: (.+)")
ELSEWHERE = re.compile(r"[Ss]ee (root cause|stack trace)")
"""Errors that only say that another process has failed."""
TAIL = 400
"""Lines that are kept: vLLM's own tracebacks, one for each process, follow the one with the reason."""


class Supervisor:
    """Starts one vLLM server, reports on it, ends it."""

    def __init__(self, path: Path, registration: Registration, command: list[str]) -> None:
        self.path = path
        self.registration = registration
        self.command = command
        self.tail: deque[str] = deque(maxlen=TAIL)
        self.stopping = threading.Event()
        # One client for all tries: each new one reads the certificates of all authorities.
        self.http = httpx.Client(timeout=5, trust_env=False)

    def say(self, **changes: Any) -> None:
        """Update the registration, for all who watch."""
        self.registration = self.registration.model_copy(update=changes)
        with contextlib.suppress(OSError):
            write(self.path, self.registration)

    def run(self) -> int:
        """Supervise until the server ends or nobody needs it."""
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self.stopping.set())
        threading.Thread(target=self._watch_owner, daemon=True).start()
        self.say(supervisor=mark(), stage="starting Python")
        server = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, SUPERVISOR: mark()},
            start_new_session=True,
        )
        threading.Thread(target=self._read_log, args=(server,), daemon=True).start()
        while not self.stopping.wait(0.25):
            if server.poll() is not None:
                time.sleep(0.3)
                self.say(state="failed", error=self._reason(server.returncode))
                break
            if self.registration.state == "starting":
                self._shake_hands()
        self._end_tree()
        if self.registration.state != "failed":
            self.path.unlink(missing_ok=True)
        return 0

    def _watch_owner(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while sys.stdin.buffer.read(1):
                pass
        self.stopping.set()

    def _read_log(self, server: subprocess.Popen[str]) -> None:
        stage = 0
        with open(self.path.with_suffix(".log"), "w") as log:
            for line in server.stdout or ():
                log.write(line)
                log.flush()
                self.tail.append(line.rstrip()[:500])
                if self.registration.state != "starting":
                    continue
                for rank, (pattern, name) in enumerate(reversed(STAGES), start=1):
                    if rank > stage and pattern.search(line):
                        stage = rank
                        self.say(stage=name)

    def _shake_hands(self) -> None:
        url = self.registration.url
        try:
            reply = self.http.get(
                url + HELLO, headers={"authorization": f"Bearer {self.registration.token}"}
            )
        except httpx.HTTPError:
            return
        if reply.status_code == 200:
            workers = reply.json()["workers"]
            self.say(state="ready", stage="ready", hello=workers[0], ready_at=time.time())
        elif reply.status_code == 404:
            self._refuse(
                "vLLM started without the workbench's plugin (vLLM swallows plugins that fail "
                "to load)"
            )
        elif reply.status_code >= 400:
            self._refuse(
                "vLLM started and its workers answer the workbench's handshake with "
                f"{reply.status_code}",
                _message(reply),
            )

    def _refuse(self, words: str, told: str = "") -> None:
        """End a server that will never be ready; an error of ours in its log says best why."""
        if ours := self._ours():
            words = f"{words}: {ours}"
        else:
            words += f" ({told}); run 'workbench doctor'." if told else "; run 'workbench doctor'."
        self.say(state="failed", error=words)
        self.stopping.set()

    def _reason(self, code: int) -> str:
        lines = [line for line in list(self.tail) if not NOT_REASONS.search(PREFIX.sub("", line))]
        errors = [line for line in lines if re.search(r"Error|error:|ERROR", line)]
        told = [line for line in errors if not ELSEWHERE.search(line)]
        last = PREFIX.sub("", (told or errors or lines or ["it said nothing"])[-1])[:300]
        # Once it serves, an error of ours may have been a request's and not its end.
        if self.registration.state == "starting":
            last = self._ours() or last
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"vLLM ended with {how}: {last}"

    def _ours(self) -> str:
        """The sentence of the last error of ours in the log, or nothing."""
        # A copy: the thread that reads the log goes on adding to it.
        found = [match[1] for line in list(self.tail) if (match := OURS.search(line))]
        return found[-1] if found else ""

    def _end_tree(self) -> None:
        tree = psutil.Process().children(recursive=True)
        for process in tree:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=4)
        # Whoever lost its parent meanwhile was handed to us, the subreaper.
        for process in {*alive, *psutil.Process().children(recursive=True)}:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=4)


def _message(reply: httpx.Response) -> str:
    """What an answer says went wrong, in vLLM's form, FastAPI's or plain text."""
    try:
        body = reply.json()
        return str(body["error"]["message"] if "error" in body else body["detail"])[:300]
    except (ValueError, KeyError, TypeError):
        return reply.text[:300] or "nothing more"


def main() -> int:
    """`python -m workbench.engines.vllm.supervisor REGISTRATION COMMAND...`"""
    path = Path(sys.argv[1])
    registration = Registration.model_validate(json.loads(path.read_text()))
    return Supervisor(path, registration, sys.argv[2:]).run()


if __name__ == "__main__":
    sys.exit(main())
