"""Decoders of other families in real vLLM, steered as in transformers; layers are found by structure.

The hybrid runs always, the rest where `WORKBENCH_TEST_FAMILIES` is set: each takes an engine's start.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from tests_support.offline import environment
from tests_support.tiny import make_family

from vectors.steering.controls import random_direction
from vectors.store import Library
from vectors.steering.operators import apply_edit, combine, edit_of
from vectors.types import Phase, SteeringVector
from workbench.engines.vllm.spec import resolve_request
from workbench.models.blocks import decoder_blocks
from workbench.models.loading import AutoModelForCausalLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

OTHERS = ["Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma3"]
KINDS = ["Qwen3_5", *(OTHERS if os.environ.get("WORKBENCH_TEST_FAMILIES") else [])]
BASE = "0" * 64
IDS = torch.randint(4, 500, (90,), generator=torch.Generator().manual_seed(5)).tolist()
AFTER = 40
LATE = '{"terms": [{"name": "axis", "dose": 1.5, "blocks": [1, 3]}], "start": 45}'
STEERS = ["", "axis=1.0:0-3", "axis=-1.5:2", "axis=1:1!ablate", "axis=1.5:2!turn", LATE]
