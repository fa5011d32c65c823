"""The gradient taken apart by positions: exact, and the table of one layer as derived."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from workbench.runs.flow_report import table_rows
from workbench.runs.gradients import gradients_run
from workbench.runs.parameters import checked
from workbench.runs.process import Progress
from workbench.service import Workbench
from workbench.train import Decision
from workbench.train.claims import claims, layer_table
from workbench.train.flow import gradient_flow
from workbench.train.states import decay_movement, read_states, state_movement


def decisions(count: int = 2) -> list[Decision]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, 128, (count, 16), generator=generator).tolist()
    return [Decision(tuple(row[:11]), tuple(row[11:])) for row in rows]


def one_layer() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shared = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    config = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, **shared
    )
    return LlamaForCausalLM(config).eval()


def test_one_layer_gives_the_table_that_was_derived():
    rows = {
        row["weight"]: row
        for row in table_rows(gradient_flow(one_layer(), decisions()).to_json()["weights"])
    }
    from_context = {name for name, row in rows.items() if row["context"] > 0}
    assert from_context == {"self_attn.k_proj", "self_attn.v_proj"}
    assert all(row["decision"] > 0 for row in rows.values()) and len(rows) == 7
    # In one layer, freezing the context takes away just what came from it.
    for row in gradient_flow(one_layer(), decisions()).weights:
        if row.decision is not None:
            assert row.frozen == pytest.approx(row.decision, rel=1e-4), row.name


def test_in_a_deep_model_context_reaches_every_weight_below_the_last_layer(model):
    flow = gradient_flow(model, decisions())
    last = max(row.layer for row in flow.weights if row.layer is not None)
    matrices = [row for row in flow.weights if row.context is not None]
    assert all(row.context > 0 for row in matrices if row.layer < last)
    silent = {row.name.split(".", 3)[3] for row in matrices if row.context == 0}
    assert silent == {
        "self_attn.q_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    }


def test_the_parts_are_those_of_a_plain_sum_over_positions(llama):
    (decision,) = decisions(1)
    name = "model.layers.1.mlp.up_proj.weight"
    module = llama.model.layers[1].mlp.up_proj
    seen = {}
    module.register_forward_hook(
        lambda m, i, o: seen.update(x=i[0].detach(), y=o) or o.retain_grad()
    )
    ids = torch.tensor([[*decision.context_ids, *decision.decision_ids]])
    logits = llama(ids, use_cache=False).logits[0, 10:-1]
    F.cross_entropy(logits, torch.tensor(decision.decision_ids)).backward()
    parts = [
        sum(torch.outer(seen["y"].grad[0, t], seen["x"][0, t]) for t in range(*span))
        for span in ((0, 10), (10, 16))
    ]
    llama.zero_grad(set_to_none=True)
    for hook in list(module._forward_hooks):
        del module._forward_hooks[hook]
    (row,) = [row for row in gradient_flow(llama, [decision]).weights if row.name == name]
    assert row.context == pytest.approx(parts[0].norm().item(), rel=1e-4)
    assert row.decision == pytest.approx(parts[1].norm().item(), rel=1e-4)
    assert row.whole == pytest.approx((parts[0] + parts[1]).norm().item(), rel=1e-4)


def test_shares_stand_beside_the_share_of_layers(hybrid):
    flow = gradient_flow(hybrid, decisions())
    shares = flow.shares()
    assert shares["layers"] == {"gdn": 0.75, "attention": 0.25}
    for row in shares.values():
        assert sum(row.values()) == pytest.approx(1)
    squares = sum(row.whole**2 for row in flow.weights if row.kind == "gdn")
    both = squares + sum(row.whole**2 for row in flow.weights if row.kind == "attention")
    assert shares["whole"]["gdn"] == pytest.approx(squares / both)
    names = {row.name.rsplit(".", 1)[-1] for row in flow.weights if row.kind == "gdn"}
    assert {"A_log", "dt_bias"} <= names
    assert flow.memory[3] < flow.memory[1] and flow.memory[2] < flow.memory[1]


def test_movement_tells_one_direction_from_many(hybrid, llama):
    contexts = [decision.context_ids for decision in decisions(4)]
    before = read_states(hybrid, contexts)
    assert read_states(llama, contexts) == [{}] * 4 and state_movement([{}], [{}]) == []
    still = state_movement(before, before)
    assert [row["layer"] for row in still] == [0, 1, 2]
    assert all(row["relative"] == 0 for row in still)
    generator = torch.Generator().manual_seed(0)
    name = next(iter(before[0]))
    one = torch.outer(*torch.randn(2, 16, generator=generator, dtype=torch.float64))
    shaped = [{**states, name: states[name] + one} for states in before]
    (row,) = [r for r in state_movement(before, shaped) if r["layer"] == 0][:1]
    assert row["shared"] == pytest.approx(1) and row["rank_one"] == pytest.approx(1)
    noise = [
        {name: s[name] + torch.randn(s[name].shape, generator=generator, dtype=torch.float64)}
        for s in before
    ]
    row = state_movement([{name: s[name]} for s in before], noise)[0]
    assert abs(row["shared"]) < 0.1 and row["rank_one"] < 0.5
    base = {"x.A_log": torch.ones(4), "x.weight": torch.ones(4)}
    moved = decay_movement(base, {"x.A_log": torch.full((4,), 0.5), "x.weight": torch.zeros(4)})
    assert moved == [{"name": "x.A_log", "mean": -0.5, "relative": 0.5, "heads": [-0.5] * 4}]


def verdict(result: dict[str, Any], word: str) -> bool | None:
    (found,) = [claim["holds"] for claim in claims(result) if word in claim["says"]]
    return found


def test_the_derived_table_holds_in_one_layer_and_is_contradicted_in_three(llama):
    none = {"decay": [], "states": []}
    one = gradient_flow(one_layer(), decisions()).to_json() | none
    deep = gradient_flow(llama, decisions()).to_json() | none
    assert verdict(one, "key and value matrices") is True
    assert verdict(deep, "key and value matrices") is False
    rows = layer_table(deep["weights"])
    assert [row["layer"] for row in rows] == [0, 1, 2]
    assert [row["q_proj"] > 0 for row in rows] == [True, True, False]
    assert all(0 < row["v_proj"] < 1 for row in rows)
    assert verdict(deep, "saves the memory") is True
    wrong = deep["memory"] | {"2": deep["memory"]["1"]}
    assert verdict(deep | {"memory": wrong}, "saves the memory") is False
    for word in ("recurrent layers", "A_log", "one direction"):
        assert verdict(deep, word) is None


def test_a_share_near_the_claimed_one_holds_and_another_does_not(hybrid):
    result = gradient_flow(hybrid, decisions()).to_json() | {"decay": [], "states": []}
    for share, holds in ((0.7, True), (0.5, False), (0.95, False)):
        part = {"gdn": share, "attention": 1 - share}
        shares = result["shares"] | {"whole": part, "frozen": part}
        assert verdict(result | {"shares": shares}, "flows through") is holds
    parts = [result["shares"][name]["gdn"] for name in ("whole", "frozen")]
    assert verdict(result, "flows through") is all(abs(part - 0.75) <= 0.1 for part in parts)


def test_decays_and_states_are_judged_by_what_moved(hybrid):
    contexts = [decision.context_ids for decision in decisions(4)]
    before = read_states(hybrid, contexts)
    flow = gradient_flow(hybrid, decisions(1)).to_json()
    generator = torch.Generator().manual_seed(0)
    noise = {n: torch.randn(s.shape, generator=generator).double() for n, s in before[0].items()}
    # Heads 0 and 1 of four move; every context by the same, or each by its own multiple of noise.
    heads = torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None, None]
    shaped = [{n: s + heads * noise[n] for n, s in states.items()} for states in before]
    each = [
        {n: s + torch.randn(s.shape, generator=generator) for n, s in states.items()}
        for states in before
    ]
    base = {f"layers.{i}.A_log": torch.zeros(4) for i in range(3)}
    slower = {name: torch.tensor([-1.0, -1.0, 0.5, 0.0]) for name in base}
    faster = {name: -change for name, change in slower.items()}

    def judge(after: Any, logs: dict[str, Tensor], word: str) -> bool | None:
        states, decay = state_movement(before, after), decay_movement(base, logs)
        return verdict(flow | {"decay": decay, "states": states}, word)

    assert judge(shaped, slower, "A_log") is True
    assert judge(shaped, faster, "A_log") is False
    assert judge(shaped, base, "A_log") is False
    assert judge(shaped, base, "one direction") is True
    assert judge(each, base, "one direction") is False
    assert judge(before, base, "one direction") is False


def test_the_run_writes_a_report(tiny_home, tmp_path):
    with Workbench(tiny_home, "tiny", "transformers") as wb:
        asked = {"model": "tiny", "engine": "transformers", "decisions": 2}
        result = gradients_run(wb, checked("gradients", asked, wb), Progress(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert page.count("<td>does not hold</td>") == 1 and page.count("<td>cannot be told</td>") == 3
    assert page.count("<svg") == 7 and "self_attn.q_proj" in page
    assert set(result["memory"]) == {"1", "2", "3"} and json.dumps(result)
