"""Answers sampled in shared slots equal answers sampled alone and those of the host loop."""

import dataclasses
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from r1s_jax.data.tiny_world import PROMPT, build_tokenizer
from r1s_jax.models.pretrained import Pretrained
from r1s_jax.protocol.r1_searcher import R1Searcher
from r1s_jax.rollout.trajectory import Finish
from r1s_jax.serving.jobs import Busy, Job, Update
from r1s_jax.serving.loop import ServingLoop
from tests.fakes import EchoRetriever, GatedRetriever, RaisingRetriever
from tests.host_loop import HostLoop
from tests.makers import (
    MODEL,
    QUESTIONS,
    ROLLOUT,
    scripted_policy,
    searching_params,
    with_devices,
)

CONFIG = dataclasses.replace(ROLLOUT, slots=4, prefill_rows=2)
FLOAT32 = np.dtype("float32")


def random_policy() -> Pretrained:
    tokenizer = build_tokenizer()
    ends = (tokenizer.eos_token_id,)
    return Pretrained(MODEL, searching_params(), tokenizer, ends, R1Searcher(prompt=PROMPT))


@pytest.fixture(scope="module")
def serving_loop():
    serving_loop = ServingLoop(random_policy(), EchoRetriever(), CONFIG, compute_dtype=FLOAT32)
    yield serving_loop
    serving_loop.close()


class Heard:
    """A listener that records the updates of a job."""

    def __init__(self):
        self.tokens, self.mask, self.searches = [], [], []
        self.finish, self.over = Finish.NONE, threading.Event()

    def __call__(self, update: Update) -> None:
        self.tokens += update.tokens
        self.mask += update.mask
        self.searches += [(s.query, s.outcome) for s in update.searches]
        if update.finish:
            self.finish = update.finish
            self.over.set()


def requests_of(serving_loop: ServingLoop, count: int = 16) -> list[dict]:
    """Requests with all kinds of sampling settings."""
    prompts = [serving_loop.engine.prompt_tokens(q.question) for q in QUESTIONS]
    return [
        {
            "prompt": prompts[i % len(prompts)],
            "seed": i,
            "temperature": (0.0, 1.0, 0.7)[i % 3],
            "top_p": (1.0, 0.9)[i % 2],
        }
        for i in range(count)
    ]


def answered(serving_loop: ServingLoop, requests: list[dict], group: int) -> list[Heard]:
    heard = [Heard() for _ in requests]
    both = enumerate(zip(heard, requests, strict=True), start=group)
    serving_loop.submit([Job(update=h, group=number, **request) for number, (h, request) in both])
    for h in heard:
        assert h.over.wait(60)
    return heard


def test_sixteen_answers_at_once_equal_each_answer_alone(serving_loop):
    requests = requests_of(serving_loop)
    together = answered(serving_loop, requests, group=100)
    alone = [
        answered(serving_loop, [request], group=200 + i)[0] for i, request in enumerate(requests)
    ]
    for a, b in zip(together, alone, strict=True):
        assert (a.tokens, a.mask, a.finish) == (b.tokens, b.mask, b.finish)
    assert any(h.searches for h in together)
    assert len({h.finish for h in together}) > 1


def test_answers_equal_those_of_the_host_loop(serving_loop):
    requests = requests_of(serving_loop)
    for request, heard in zip(requests, answered(serving_loop, requests, group=300), strict=True):
        how = {"temperature": request["temperature"], "top_p": request["top_p"]}
        loop = HostLoop(
            model=MODEL,
            params=searching_params(),
            config=dataclasses.replace(CONFIG, **how),
            compute_dtype=FLOAT32,
            eos_ids=serving_loop.engine.eos_ids,
            broker=serving_loop.engine.broker,
            decode=serving_loop.engine.decode,
        )
        list(loop.run(request["prompt"], jax.random.fold_in(jax.random.key(request["seed"]), 0)))
        assert loop.tokens[len(request["prompt"]) :] == heard.tokens
        assert loop.finish == heard.finish


def test_samples_of_one_group_differ_and_the_seed_decides(serving_loop):
    prompt = serving_loop.engine.prompt_tokens(QUESTIONS[0].question)

    def samples(group: int) -> list[list[int]]:
        heard = [Heard() for _ in range(6)]
        serving_loop.submit([Job(prompt, 5, h, sample=i, group=group) for i, h in enumerate(heard)])
        for h in heard:
            assert h.over.wait(60)
        return [h.tokens for h in heard]

    first = samples(400)
    assert first == samples(401)
    assert len({tuple(tokens) for tokens in first}) > 1


def test_a_limit_cuts_the_same_answer_short(serving_loop):
    requests = requests_of(serving_loop, 6)
    whole = answered(serving_loop, requests, group=500)
    cut = answered(serving_loop, [{**request, "max_tokens": 5} for request in requests], group=510)
    for a, b in zip(whole, cut, strict=True):
        assert sum(b.mask) == min(5, sum(a.mask))
        assert a.tokens[: len(b.tokens)] == b.tokens
        assert b.finish == (a.finish if a.tokens == b.tokens else Finish.LENGTH)


def test_requests_that_do_not_fit_are_refused(serving_loop):
    with pytest.raises(ValueError, match="no room"):
        serving_loop.submit([Job([5] * CONFIG.max_length, 0, Heard())])


@pytest.fixture
def gated():
    retriever = GatedRetriever()
    serving_loop = ServingLoop(
        scripted_policy(), retriever, CONFIG, waiting=2, compute_dtype=FLOAT32
    )
    yield serving_loop, retriever
    retriever.gate.set()
    serving_loop.close()


def until(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came to be")


def test_waiting_for_documents_stops_no_other_and_a_full_queue_refuses(gated):
    serving_loop, retriever = gated
    prompt = serving_loop.engine.prompt_tokens(QUESTIONS[0].question)
    slots = serving_loop.rows
    heard = [Heard() for _ in range(slots + 2)]
    jobs = [Job(prompt, i, h, group=i + 1) for i, h in enumerate(heard)]
    serving_loop.submit(jobs)
    with pytest.raises(Busy, match="waiting"):
        serving_loop.submit([Job(prompt, 9, Heard())])
    until(lambda: all(h.searches for h in heard[:slots]))
    assert [h.searches[0][1] for h in heard[:slots]] == ["pending"] * slots
    assert serving_loop.slots_busy == slots and serving_loop.queued == 2

    serving_loop.cancel(jobs[:2])  # waiting jobs get their slots; their documents are dropped
    until(lambda: all(h.searches for h in heard[slots:]))
    assert serving_loop.queued == 0
    retriever.gate.set()
    for h in heard[2:]:
        assert h.over.wait(30) and h.finish == Finish.FINISHED
        assert [outcome for _, outcome in h.searches] == ["pending", "found"]
        assert h.searches[0][0] in serving_loop.engine.decode(h.tokens)
    assert not any(h.finish for h in heard[:2])


def test_a_failed_search_is_reported_and_the_answer_continues():
    serving_loop = ServingLoop(scripted_policy(), RaisingRetriever(), CONFIG, compute_dtype=FLOAT32)
    (heard,) = answered(serving_loop, requests_of(serving_loop, 1), group=1)
    serving_loop.close()
    assert heard.finish == Finish.FINISHED and heard.searches[-1][1] == "error"
    assert "None" in serving_loop.engine.decode(heard.tokens)
    with pytest.raises(Busy, match="stopping"):
        serving_loop.submit([Job([5], 0, Heard())])


def test_a_failing_broker_is_reported_and_nothing_waits_for_ever(monkeypatch):
    serving_loop = ServingLoop(scripted_policy(), EchoRetriever(), CONFIG, compute_dtype=FLOAT32)
    monkeypatch.setattr(serving_loop.engine.broker, "_result", lambda searches: 1 / 0)
    (heard,) = answered(serving_loop, requests_of(serving_loop, 1), group=1)
    assert heard.finish == Finish.ABORTED and "SearchFailure" in serving_loop.failed
    with pytest.raises(Busy, match="the policy failed"):
        serving_loop.submit([Job([5], 0, Heard())])
    serving_loop.close()


@pytest.mark.slow
def test_the_same_holds_with_slots_on_four_devices():
    code = "import jax, pytest, sys; assert len(jax.devices()) == 4; sys.exit(pytest.main("
    code += f"[{__file__!r}, '-m', 'not slow', '-p', 'no:cacheprovider']))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=with_devices(4), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
