"""What all tests share: a home in a temporary folder, a tiny seeded model, one engine for each model.

The bundled model and the engines' homes live under one cache folder for the session, so that what
takes long is made once.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# A shell's background job ignores Ctrl-C, and what it starts would too; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
if not Path("/dev/nvidiactl").exists():
    # Before anything imports triton: kernels run in its interpreter where there is no GPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# What is compared with transformers to the digit must not depend on the processor's instructions.
os.environ.setdefault("WORKBENCH_CPU_DTYPE", "float32")
if "PYTEST_XDIST_WORKER" in os.environ:
    from tests_support.parallel import share_cores

    share_cores(int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
CHROMIUM = next(
    (p for p in ("chromium", "chromium-browser", "google-chrome") if shutil.which(p)), None
)
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which worker runs which files, where pytest has several and nobody named another way."""
    if config.getvalue("dist") != "load":
        return None
    from tests_support.parallel import Scheduling

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the person's own home."""
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A home for all tests that share a model or an engine."""
    from workbench.settings import Home

    return Home.at(tmp_path_factory.mktemp("session") / "home")


@pytest.fixture(scope="session")
def bundled(session_home: Any) -> Any:
    """The bundled model, fetched once a session, or once a machine where a cache is named."""
    from workbench.models.bundled import BUNDLED, bundled_model
    from workbench.models.catalog import find_model

    cache = os.environ.get("WORKBENCH_TEST_MODELS")
    if cache:
        made = bundled_model(Path(cache))
        shutil.copytree(made, session_home.models / BUNDLED, dirs_exist_ok=True)
    return find_model(session_home, BUNDLED)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded Llama of 4 blocks with a byte-level tokenizer and a chat template."""
    from tests_support.tiny import make_tiny_llama

    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def tiny(session_home: Any, tiny_folder: Path) -> Any:
    """The tiny model, in the session's home under the name `tiny`."""
    from workbench.models.catalog import find_model

    shutil.copytree(tiny_folder, session_home.models / "tiny", dirs_exist_ok=True)
    return find_model(session_home, "tiny")


@pytest.fixture(scope="session")
def tiny_home(session_home: Any, tiny: Any) -> Path:
    """The folder of a home that has the model `tiny`."""
    return session_home.root


@pytest.fixture(scope="session")
def tiny_workbench(session_home: Any, tiny: Any) -> Iterator[Any]:
    """The workbench on the tiny model, its engine shared by all tests."""
    pytest.importorskip("vllm", reason="vLLM is not installed on this machine")
    from workbench.service import Workbench

    with Workbench(session_home.root, "tiny") as workbench:
        yield workbench


@pytest.fixture(scope="session")
def workbench(session_home: Any, bundled: Any) -> Iterator[Any]:
    """The workbench on the bundled model, its engine shared by all tests."""
    pytest.importorskip("vllm", reason="vLLM is not installed on this machine")
    from workbench.service import Workbench

    with Workbench(session_home.root, bundled.name) as found:
        yield found


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium; without one the test is skipped, and under CI it fails."""
    if CHROMIUM is None:
        words = "no Chromium on this machine; install it to run the browser tests"
        if os.environ.get("CI") == "true":
            pytest.fail(words)
        pytest.skip(words)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which(CHROMIUM), args=CHROMIUM_FLAGS
        )
        yield browser
        browser.close()
