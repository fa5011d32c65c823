"""Contract: the real vLLM server, steered. One engine on the tiny model for the whole file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vectors.errors import InputError, NameNotFound, SteeringNotApplied
from vectors.steering.controls import random_direction
from vectors.types import SteeringVector
from workbench.data.templates import Sample
from workbench.engines.base import Projections, Reply, Request, Sampling
from workbench.engines.vllm.capture.found import Span, read_projections
from workbench.engines.vllm.paths import CAPTURES

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
LONG = "Tell me a story about the sea. " * 20


@pytest.fixture(scope="module")
def engine(tiny_workbench):
    base, width = tiny_workbench.model().base, tiny_workbench.model().width
    for number, name in enumerate(("north", "east")):
        directions = {b: random_direction(width, 10 * number + b) for b in range(4)}
        vector = SteeringVector(base, directions, dict.fromkeys(directions, 8.0), 2)
        tiny_workbench.library.save_vector(name, vector)
    return tiny_workbench.engine()


def ask(text="Hello there", steer="", tokens=12, **sampling):
    return Request(
        ({"role": "user", "content": text},),
        steer,
        sampling=Sampling(tokens, **{"temperature": 0.0, **sampling}),
    )


def conditional(condition, phase="decode"):
    term = {"name": "north", "dose": 3.0, "phase": phase}
    return json.dumps({"terms": [term], "condition": {"name": "east", **condition}})


def texts(replies):
    return [reply.text for reply in replies]


def test_steering_changes_the_text_and_carries_its_receipt(engine):
    plain, steered = engine.generate([ask(), ask(steer="north=3.0")])
    assert plain.text != steered.text
    assert plain.receipt is None
    receipt = steered.receipt
    assert receipt.requests == 1 and receipt.rows == 1
    assert receipt.prompt > 0 and receipt.prompt + receipt.cached + receipt.decode > 12


def test_dose_zero_is_the_base_bit_for_bit(engine):
    plain, zero = engine.generate([ask()]), engine.generate([ask(steer="north=0")])
    assert texts(plain) == texts(zero)


def test_mixed_batch_gives_each_what_it_gives_alone(engine):
    asked = [
        ask(),
        ask(steer="north=2.0"),
        ask(steer="north=-2.0,east=1.0"),
        ask(steer="east=2.0:0-3"),
    ]
    alone = [engine.generate([request])[0].text for request in asked]
    assert texts(engine.generate(asked)) == alone
    assert len(set(alone)) == 4


def test_a_steered_prompt_never_poisons_the_prefix_cache(engine):
    clean = engine.generate([ask(LONG)])[0].text
    for dose in (2.0, -2.0):
        engine.generate([ask(LONG + " ", f"north={dose}")])
        engine.generate([ask(LONG, f"north={dose}")])
    assert engine.generate([ask(LONG)])[0].text == clean
    once = engine.generate([ask(LONG, "north=2.0")])[0]
    again = engine.generate([ask(LONG, "north=2.0")])[0]
    assert once.text == again.text != clean
    assert again.receipt.least == again.receipt.prompt + again.receipt.cached + again.receipt.decode


def test_phases_touch_their_positions_alone(engine):
    prompt, decode = engine.generate([ask(steer="north=2/prompt"), ask(steer="north=2/decode")])
    assert prompt.receipt.decode == 0 < prompt.receipt.prompt
    assert decode.receipt.prompt == 0 < decode.receipt.decode


def test_steering_that_touches_nothing_is_an_error(engine):
    with pytest.raises(SteeringNotApplied, match="no position"):
        engine.generate([ask(steer="north=2/decode", tokens=1)])


def test_steered_scores_are_those_of_transformers(engine, tiny_workbench):
    from workbench.engines.transformers import TransformersEngine

    w = tiny_workbench
    plain = TransformersEngine(w.model(), w.library, w.home)
    rng = torch.Generator().manual_seed(0)
    pairs = [
        (
            torch.randint(4, 260, (n,), generator=rng).tolist(),
            torch.randint(4, 260, (m,), generator=rng).tolist(),
        )
        for n, m in ((5, 3), (40, 17), (150, 1))
    ]
    for steer in ("", "north=0.7", "north=0.5:0-3,east=-0.5:1", "east=1.0/prompt"):
        ours, theirs = engine.score(pairs, steer=steer), plain.score(pairs, steer=steer)
        assert ours == pytest.approx(theirs, abs=2e-2, rel=2e-4), steer


def test_tables_hold_the_likeliest_tokens(engine):
    context, completion = [10, 20, 30], [40, 50]
    table = engine.tables([(context, completion)], top=5)[0]
    assert len(table) == 2 and all(5 <= len(row) <= 6 for row in table)
    score = engine.score([(context, completion)])[0]
    assert sum(row[t] for row, t in zip(table, completion, strict=True)) == pytest.approx(score)


def test_captured_means_are_those_of_transformers(engine, tiny_workbench):
    from workbench.models.capture import block_means
    from workbench.models.loading import load_model

    rng = torch.Generator().manual_seed(1)
    samples = [
        Sample(*(tuple(torch.randint(4, 260, (n,), generator=rng).tolist()) for n in lengths))
        for lengths in ((5, 3), (40, 17), (150, 1), (40, 17))
    ]
    wanted_LND, norms_LN = block_means(load_model(tiny_workbench.model()).model, samples)
    spans = [Span([*s.context, *s.completion], len(s.context), len(s) - 1) for s in samples]
    found = engine.capture(spans)
    assert [captured.count for captured in found] == [3, 17, 1, 17]
    for n, captured in enumerate(found):
        close = {"rtol": 1e-2, "atol": 1e-2 * float(wanted_LND[:, n].abs().max())}
        torch.testing.assert_close(captured.mean_LD, wanted_LND[:, n], **close)
        torch.testing.assert_close(captured.norm_L, norms_LN[:, n], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"capture": "3-90", "capture_id": "a"}, "positions 0 to 19"),
        ({"capture": "3:9", "capture_id": "a"}, "blocks 0 to 3"),
        ({"capture": "all", "capture_id": "a"}, "write positions"),
        ({"capture": "3"}, "capture_id"),
        ({"capture": "3", "capture_id": "../x"}, "letters and digits"),
    ],
)
def test_a_bad_capture_is_refused_in_a_sentence(engine, asked, words):
    reply = post(engine, {"prompt": list(range(10, 30)), "vllm_xargs": asked})
    assert reply.status_code == 400 and words in reply.json()["error"]["message"]


def test_what_capture_cannot_do_is_refused(engine):
    asked = {"capture": "decode", "capture_id": "b"}
    body = {"prompt": [10, 20], "vllm_xargs": asked, "max_tokens": 4}
    for more, words in (
        ({"n": 2}, "n=1"),
        ({"stop": "x"}, "stop"),
        ({"use_beam_search": True}, "beam"),
    ):
        reply = post(engine, body | more)
        assert reply.status_code == 400 and words in reply.text, reply.text
    missing = engine._http.get(f"{CAPTURES}/nobody")
    assert missing.status_code == 404 and "unknown" in missing.text


def test_every_token_of_a_reply_is_projected(engine):
    request = dataclasses.replace(ask(tokens=8), project="north")
    steered = dataclasses.replace(request, steer="north=3.0/decode")
    plain, along = engine.generate([request, steered])
    *_, streamed = engine.stream(steered)
    assert streamed.projections == along.projections
    for reply in (plain, along):
        found = reply.projections
        assert len(found.tokens) == reply.tokens == len(found.values) + 1
    mean = [sum(r.projections.values) / len(r.projections.values) for r in (plain, along)]
    assert mean[1] - mean[0] > 1.5, "the vector itself is added there"


def test_projections_come_while_the_reply_is_written(engine):
    request = dataclasses.replace(ask(tokens=900, seed=3, temperature=1.0), project="north")
    pieces = list(engine.stream(request))
    reply = pieces[-1]
    early = [n for n, piece in enumerate(pieces) if isinstance(piece, Projections)]
    text = [n for n, piece in enumerate(pieces) if isinstance(piece, str)]
    known = [len(pieces[n].values) for n in early]
    assert known == sorted(set(known)) and known[-1] == len(reply.projections.values) == 899
    # Some are there long before the end, and text goes on behind them.
    assert len([n for n in early if n < text[-1]]) >= 3 and known[0] < 450
    for n in early:
        found, so_far = pieces[n], "".join(p for p in pieces[:n] if isinstance(p, str))
        assert found.values == reply.projections.values[: len(found.values)]
        assert found.tokens == reply.projections.tokens[: len(found.tokens)]
        assert len(found.values) < len(found.tokens)
        # A character that takes several tokens, or is none, is no token's own.
        assert "".join(found.tokens) == so_far.replace("\N{REPLACEMENT CHARACTER}", "")
    assert "".join(pieces[n] for n in text) == reply.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_stream_stays_openais_and_ends_with_what_a_fetch_gives(engine, path):
    chat = path.endswith("chat/completions")
    body = {"model": engine.model, "max_tokens": 60, "temperature": 0, "stream": True}
    body |= {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": [10, 20, 30]}
    events = [list(sse(engine, path, body))]
    body["vllm_xargs"] = {"project": "north", "capture_id": f"sse{int(chat)}"}
    events.append(list(sse(engine, path, body)))
    values, chunks = [], [[], []]
    for number, found in enumerate(events):
        assert found[-1] == "[DONE]"
        for event in found[:-1]:
            chunk = json.loads(event)
            if told := chunk.pop("workbench", None):
                assert told["projections"]["first"] == len(values)
                values += told["projections"]["values"]
                assert set(told) == {"projections"} and set(told["projections"]) == {
                    "first",
                    "values",
                }
            chunks[number].append({k: v for k, v in chunk.items() if k not in ("id", "created")})
    # vLLM may put what two steps wrote into one chunk.
    assert [text(c) for c in chunks] == [text(chunks[0])] * 2
    assert chunks[0][0] == chunks[1][0] and chunks[0][-1].keys() == chunks[1][-1].keys()
    data = engine._captured([f"sse{int(chat)}"])
    assert read_projections(data, f"sse{int(chat)}") == values and len(values) == 59


def test_many_streams_get_each_its_own_and_who_leaves_leaves_nothing(engine):
    vectors = ["north", "east", "north:1", "east:3", "north", "east"]
    asked = [
        dataclasses.replace(ask(f"Number {n}", tokens=60), project=vector)
        for n, vector in enumerate(vectors)
    ]
    alone = engine.generate(asked)
    gone: list[str] = []

    def run(n):
        if n < len(asked):
            *early, reply = engine.stream(asked[n])
            values = [p.values for p in early if isinstance(p, Projections)]
            return reply, values[-1]
        name = f"gone{n}"
        extra = {"project": "north", "capture_id": name}
        body = {"model": engine.model, "prompt": [10, n], "max_tokens": 1900, "stream": True}
        with contextlib.closing(
            sse(engine, "/v1/completions", body | {"vllm_xargs": extra})
        ) as found:
            for event in found:
                if "workbench" in json.loads(event):
                    gone.append(name)
                    break
        return None

    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(run, range(9)))
    for (reply, values), whole in zip(found[: len(asked)], alone, strict=True):
        assert values == reply.projections.values
        assert reply.text == whole.text
        assert values == pytest.approx(whole.projections.values, abs=1e-3)

    def left() -> int:
        assert sorted(gone) == ["gone6", "gone7", "gone8"]
        limit = time.monotonic() + 60
        while running(engine) and time.monotonic() < limit:
            time.sleep(0.1)
        # What runs next tells the worker who has gone.
        engine.generate([ask(tokens=2)])
        answers = [engine._http.get(f"{CAPTURES}/{name}") for name in gone]
        for name, answer in zip(gone, answers, strict=True):
            if answer.status_code == 200:
                # While this process got no core, the reply was written to the end.
                assert len(read_projections(answer.content, name)) == 1899
            else:
                assert answer.status_code == 404 and "unknown" in answer.text
        return sum(answer.status_code == 404 for answer in answers)

    for _ in range(6):
        if left():
            return
        gone.clear()
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(run, range(6, 9)))
    pytest.fail("no reply was left before its end")


def test_a_cancelled_stream_keeps_what_came(engine):
    request = dataclasses.replace(ask(tokens=1000), project="north")
    came = []

    def enough():
        return len(came) > 1

    for piece in engine.stream(request, enough):
        if isinstance(piece, Projections):
            came.append(piece)
    assert piece.finish == "cancelled" and 0 < piece.tokens + len(piece.projections.tokens) < 1000
    assert piece.projections.values == came[-1].values
    assert len(piece.projections.values) <= len(piece.projections.tokens)


def sse(engine, path, body):
    with engine._http.stream("POST", path, json=body) as reply:
        assert reply.status_code == 200 and "event-stream" in reply.headers["content-type"]
        for line in reply.iter_lines():
            assert not line or line.startswith("data: "), line
            if line:
                yield line.removeprefix("data: ")


def text(chunks):
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(c.get("text") or (c.get("delta") or {}).get("content") or "" for c in choices)


def running(engine):
    """How many requests the engine works on."""
    found = engine._http.get("/metrics").text
    lines = [line for line in found.splitlines() if line.startswith("vllm:num_requests_running{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"project": "nobody"}, "nobody"),
        ({"project": "north:9"}, "block 9"),
        ({"project": "north:x"}, "name a vector"),
        ({"project": "north", "capture": "3"}, "send two requests"),
        ({"project": "north", "steer": conditional({"above": 0})}, "send two requests"),
        (
            # The same in JSON, with a letter of the key escaped.
            {"project": "north", "steer": conditional({"above": 0}).replace('"co', '"\\u0063o')},
            "send two requests",
        ),
    ],
)
def test_a_bad_projection_is_refused_in_a_sentence(engine, asked, words):
    extra = {"capture_id": "p1", **asked}
    reply = post(engine, {"prompt": [10, 20], "vllm_xargs": extra})
    assert reply.status_code == 400 and words in reply.text, reply.text


def post(engine, body):
    return engine._http.post("/v1/completions", json={"model": engine.model, **body})


def test_stream_ends_with_the_reply(engine):
    pieces = list(engine.stream(ask(steer="north=1.0")))
    assert isinstance(pieces[-1], Reply)
    assert "".join(pieces[:-1]) == pieces[-1].text
    assert pieces[-1].weights == "base" and pieces[-1].tokens == 12


def test_same_seed_same_text(engine):
    one, two = (engine.generate([ask(temperature=1.0, seed=7)])[0].text for _ in range(2))
    other = engine.generate([ask(temperature=1.0, seed=8)])[0].text
    assert one == two != other


@pytest.mark.parametrize(
    ("steer", "words"),
    [
        ("nobody=0.2", "nobody"),
        ("north=0.2:99", "block 99"),
        ("north=nan", "finite"),
        ("north=99", "stay within"),
        ("north", "steering term"),
        ("north=0.2/later", "phase"),
        ('{"terms": [{"name": "north", "dose": "x"}]}', "dose"),
        ('{"terms": [{"name": "north", "dose": 1, "evil": 1}]}', "evil"),
    ],
)
def test_bad_steering_is_refused_in_a_sentence(engine, steer, words):
    with pytest.raises(InputError, match=words):
        engine.generate([ask(steer=steer)])


def test_the_json_form_steers_like_the_grammar(engine):
    said = engine.generate([ask(steer="north=2.0:1/prompt")])[0]
    json_form = '{"terms": [{"name": "north", "dose": 2.0, "blocks": [1], "phase": "prompt"}]}'
    assert engine.generate([ask(steer=json_form)])[0].text == said.text


def test_a_condition_lets_the_prompt_decide(engine):
    plain, always, never, ever = engine.generate(
        [
            ask(),
            ask(steer="north=3.0/decode"),
            ask(steer=conditional({"above": 1})),
            ask(steer=conditional({"below": 1})),
        ]
    )
    assert never.text == plain.text != always.text == ever.text
    assert never.receipt.declined == 1 and ever.receipt.declined == 0
    found = never.receipt.projection
    assert found == ever.receipt.projection != 0 and -1 < found < 1
    for side, text in (("above", always.text), ("below", plain.text)):
        steer = conditional({side: found - 1e-4})
        again = [
            engine.generate([ask(steer=steer)])[0] for _ in range(2)
        ]  # the second finds a cache
        assert [reply.text for reply in again] == [text, text]


@pytest.mark.parametrize(
    ("steer", "words"),
    [
        (conditional({}), "'above' and 'below'"),
        (conditional({"above": 0, "below": 0}), "'above' and 'below'"),
        (conditional({"above": 2}), "condition.above"),
        (conditional({"above": 0, "block": 9}), "block 9"),
        (conditional({"above": 0, "name": "nobody"}), "nobody"),
        (conditional({"above": 0}, "all"), "phase decode"),
    ],
)
def test_a_bad_condition_is_refused_in_a_sentence(engine, steer, words):
    with pytest.raises(InputError, match=words):
        engine.generate([ask(steer=steer)])


def test_a_vector_of_another_base_is_refused(engine, tiny_workbench):
    _, vector = tiny_workbench.library.load_vector("north")
    tiny_workbench.library.save_vector("foreign", dataclasses.replace(vector, base="f" * 64))
    with pytest.raises(InputError, match="belongs to base"):
        engine.generate([ask(steer="foreign=0.2")])


def test_a_prompt_longer_than_the_window_is_refused(engine):
    with pytest.raises(InputError, match="window"):
        engine.generate([ask("x" * 5000)])


def test_service_tells_of_bad_input_before_any_work(tiny_workbench):
    with pytest.raises(NameNotFound, match="nobody"):
        tiny_workbench.generate("hi", steer="nobody=0.2")
    with pytest.raises(InputError, match="empty"):
        tiny_workbench.generate("  ")
    with pytest.raises(InputError, match="temperature"):
        tiny_workbench.generate("hi", temperature=9)
