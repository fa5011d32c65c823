"""The operator for LoRAs on a CPU against a loop over tokens, and the settings of the slots."""

from __future__ import annotations

import shutil

import pytest
import torch

from vectors.errors import InputError
from workbench.engines.vllm.lora_cpu import add_lora, groups_of
from workbench.engines.vllm.registration import Registration, write
from workbench.engines.vllm.server import path_of
from workbench.engines.vllm.settings import HELD, LORA_RANK, LORA_SLOTS, LoraSlots
from workbench.engines.vllm.watchdog import mark
from workbench.service import Workbench


@pytest.mark.parametrize(
    "slots",
    [[], [-1], [0], [1, 1, 1], [-1, 0, 0, -1, -1, 2, 1, 1, 2], [2, 2, 0, 0, -1], [0, 1, 0, 1, -1]],
)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_every_token_gets_its_own_lora_and_the_base_none(slots, scale):
    generator = torch.Generator().manual_seed(len(slots))
    widths, width, rank = (5, 3, 7), 11, 4
    downs = tuple(torch.randn(3, 1, rank, width, generator=generator) for _ in widths)
    ups = tuple(torch.randn(3, 1, o, rank, generator=generator) for o in widths)
    in_TI = torch.randn(len(slots), width, generator=generator)
    before_TO = torch.randn(len(slots), sum(widths), generator=generator)
    out_TO = before_TO.clone()
    add_lora(
        out_TO, in_TI, downs, ups, widths, groups_of(torch.tensor(slots, dtype=torch.long)), scale
    )
    wanted_TO = before_TO.double()
    for token, slot in enumerate(slots):
        if slot >= 0:
            parts = [u[slot, 0].double() @ d[slot, 0].double() @ in_TI[token].double()
                     for u, d in zip(ups, downs, strict=True)]  # fmt: skip
            wanted_TO[token] += scale * torch.cat(parts)
    torch.testing.assert_close(out_TO.double(), wanted_TO, rtol=1e-5, atol=1e-5)
    untouched = [token for token, slot in enumerate(slots) if slot < 0]
    assert torch.equal(out_TO[untouched], before_TO[untouched])


def test_slots_are_off_by_default_and_read_from_the_environment(monkeypatch):
    assert LoraSlots.of_environment().options() == []
    monkeypatch.setenv(LORA_SLOTS, "3")
    monkeypatch.setenv(LORA_RANK, "32")
    found = LoraSlots.of_environment()
    assert found == LoraSlots(3, 32)
    assert found.options()[:5] == ["--enable-lora", "--max-loras", "3", "--max-lora-rank", "32"]
    assert found.options()[6:] == list(HELD)
    assert found.holding(100) == LoraSlots(3, 128) and found.holding(None) == found
    assert LoraSlots().holding(16) == LoraSlots(4, 64) and LoraSlots().holding(9999).rank == 512


@pytest.mark.parametrize(
    ("name", "value"),
    [(LORA_SLOTS, "-1"), (LORA_SLOTS, "many"), (LORA_RANK, "0"), (LORA_RANK, "17")],
)
def test_bad_slots_are_refused_in_a_sentence(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=name):
        LoraSlots.of_environment()


def test_an_engine_without_slots_is_told_before_any_work(tmp_path, tiny_folder):
    root = tmp_path / "own"
    shutil.copytree(tiny_folder, root / "models" / "tiny")
    with Workbench(root, "tiny") as wb:
        base = wb.model().base
        row = Registration(
            base=base, model="tiny", checkpoint="", url="", token="", owner=mark(),
            state="ready", hello={"lora": {"slots": 0, "rank": 0}},
        )  # fmt: skip
        write(path_of(wb.home, base), row)
        with pytest.raises(InputError, match="no LoRA slots; start it with 'workbench serve"):
            wb.weights("nobody=1", "lora")
    with (
        Workbench(root, "tiny", "transformers") as wb,
        pytest.raises(InputError, match="Only vLLM"),
    ):
        wb.weights("nobody=1", "lora")
