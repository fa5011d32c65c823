"""vLLM with the package installed: without the workbench's settings it refuses what is ours, with them
it steers as the documentation says.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vectors.errors import InputError
from vectors.steering.controls import random_direction
from vectors.store import Library
from vectors.types import SteeringVector
from workbench.engines.vllm.offline import offline_environment
from workbench.engines.vllm.settings import BASE, LIBRARY, library_and_base
from workbench.models.catalog import find_model
from workbench.settings import Home

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

DOCS = Path(__file__).parents[2] / "docs" / "requests.md"
ASKED = {
    "steer": {"steer": "cheerful=0.2"},
    "capture": {"capture": "last", "capture_id": "mine1"},
    "project": {"project": "cheerful", "capture_id": "mine1"},
}
SCRIPT = f"""
import json, sys
from vllm import LLM, SamplingParams
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError

def words(act):
    try:
        return act()
    except VLLMValidationError as error:
        return str(error)

def generate(extra):
    params = SamplingParams(max_tokens=4, temperature=0, detokenize=False, extra_args=extra)
    prompt = {{"prompt_token_ids": [5, 6, 7]}}
    return list(llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids)

if __name__ == "__main__":
    options = {{"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}}
    llm = LLM(sys.argv[1], max_model_len=128, **options)
    found = {{key: words(lambda: generate(extra)) for key, extra in {ASKED}.items()}}
    found |= {{"plain": generate(None), "other": generate({{"somebody's": "own"}})}}
    beams = CompletionRequest(model="", prompt="x", use_beam_search=True, vllm_xargs={ASKED["steer"]})
    found["beams"] = words(lambda: beams.to_beam_search_params(4, {{}}) and "answered")
    print("\\n" + json.dumps(found))
"""


def ran(script, folder, *arguments, **more):
    path = folder / "script.py"
    path.write_text(script)
    environment = {name: v for name, v in os.environ.items() if not name.startswith("WORKBENCH_")}
    environment |= {
        # Each further process takes as long again to start.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        **more,
    }
    command = [sys.executable, str(path), *arguments]
    out = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    # vLLM writes its log there, too.
    return next(line for line in reversed(out.stdout.splitlines()) if line.startswith("{"))


def test_without_settings_what_is_ours_is_refused_and_all_else_is_answered(tiny_folder, tmp_path):
    found = json.loads(ran(SCRIPT, tmp_path, str(tiny_folder)))
    for key in ASKED:
        assert f"without the workbench's settings and cannot '{key}'" in found[key]
        assert "workbench serve" in found[key] and "offline_environment" in found[key]
    assert len(found["plain"]) == 4 and found["other"] == found["plain"]
    assert "leave 'use_beam_search' out" in found["beams"]


def test_the_example_of_the_documentation_runs_as_it_stands(tiny_folder, tmp_path):
    (code,) = re.findall(r"## Offline.*?```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    home = Home.at(tmp_path / "home")
    shutil.copytree(tiny_folder, home.models / "tiny")
    model = find_model(home, "tiny")
    directions = {b: random_direction(model.width, b) for b in range(model.blocks)}
    vector = SteeringVector(model.base, directions, dict.fromkeys(directions, 8.0), 2)
    Library(home.library).save_vector("cheerful", vector)
    named = {"WORKBENCH_HOME": str(home.root), "WORKBENCH_MODEL": "tiny"}
    receipt = ast.literal_eval(ran(code, tmp_path, **named))
    assert receipt["requests"] == 1 and receipt["decode"] > 0 and not receipt["problem"]


def test_the_environment_is_what_the_plugin_reads(tmp_path):
    assert offline_environment(tmp_path, "0" * 64) == {
        "WORKBENCH_BASE": "0" * 64,
        "WORKBENCH_LIBRARY": str(tmp_path),
        "VLLM_PLUGINS": "workbench_steering",
    }


@pytest.mark.parametrize(("given", "lacking"), [(BASE, LIBRARY), (LIBRARY, BASE)])
def test_one_setting_without_the_other_is_told_by_name(monkeypatch, given, lacking):
    monkeypatch.delenv(lacking, raising=False)
    monkeypatch.setenv(given, "x")
    with pytest.raises(InputError, match=f"and {lacking} is not; take both"):
        library_and_base()
