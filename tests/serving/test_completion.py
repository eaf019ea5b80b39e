"""Reading of requests, before sampling."""

import asyncio
import dataclasses
import json
import time
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r1s_jax.data.questions import Question
from r1s_jax.data.tiny_world import PROMPT
from r1s_jax.io.errors import UserError
from r1s_jax.models.pretrained import Pretrained
from r1s_jax.protocol.r1_searcher import R1Searcher
from r1s_jax.protocol.search_r1 import SearchR1
from r1s_jax.rollout.engine import Engine
from r1s_jax.serving.completion import Completion, Desk, Limits
from tests.fakes import WebRetriever
from tests.makers import MODEL, ROLLOUT

QUESTION = "Who wrote Dune?<|endoftext|>"


def bytes_that_merge() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that merges some pairs across the ends of separately encoded pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(">", "\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}"), (">", "<")]
    tokens = [*alphabet, *map("".join, merges), "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def make_desk(dialect=None, *, retrieve_first: bool = False, length: int = 700) -> Desk:
    tokenizer = bytes_that_merge()
    config = dataclasses.replace(
        ROLLOUT,
        max_length=length,
        max_prompt_length=length - 1,
        max_documents_length=160,
        retrieve_first=retrieve_first,
    )
    policy = Pretrained(
        dataclasses.replace(MODEL, vocab_size=len(tokenizer), max_position=length),
        {},
        tokenizer,
        (tokenizer.eos_token_id,),
        dialect or R1Searcher(prompt=PROMPT),
    )
    engine = Engine(policy, config, compute_dtype=np.dtype("float32"))
    engine.broker.begin(WebRetriever())
    jobs = SimpleNamespace(
        engine=engine, config=engine.config, rows=1, slots_busy=0, queued=0, waiting=1
    )
    jobs.greedy_only = False
    return Desk(jobs, "m", Limits())


def body(text: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}]}).encode()


@pytest.mark.parametrize("dialect", [R1Searcher(prompt=PROMPT), SearchR1()], ids=lambda d: d.name)
def test_a_first_search_has_the_tokens_of_the_engine(dialect, monkeypatch):
    desk = make_desk(dialect, retrieve_first=True)
    engine = desk.serving_loop.engine
    request = desk.read(body(QUESTION))
    search, forced = desk.search(request)
    assert search.query == QUESTION and len(search.documents) == 2
    monkeypatch.setattr(engine, "config", dataclasses.replace(engine.config, retrieve_first=True))
    (flight,) = engine.begin([Question(1, QUESTION, ("a",))], samples=1, step=0)
    served = request.tokens + forced
    assert served == list(flight.tokens)
    again = engine.encode(engine.decode(forced))
    assert again != forced and engine.decode(again) == engine.decode(forced)


def test_a_first_search_needs_room():
    desk = make_desk(retrieve_first=True, length=320)
    text = "x" * (316 - len(desk.read(body("x")).tokens))
    with pytest.raises(UserError, match=r"tokens; .* may take 320 tokens"):
        desk.read(body(text))
    request = make_desk(length=320).read(body(text))
    assert len(request.tokens) < 318


@pytest.mark.parametrize(
    ("characters", "encoded", "words"),
    [(700 * 32 + 1, 0, "22,401 characters"), (20_000, 5600, "more than 700 tokens")],
)
def test_text_that_is_surely_too_long_is_not_encoded(characters, encoded, words, monkeypatch):
    desk, sizes = make_desk(), []
    engine, encode = desk.serving_loop.engine, desk.serving_loop.engine.encode
    monkeypatch.setattr(engine, "encode", lambda text: sizes.append(len(text)) or encode(text))
    monkeypatch.setattr(engine, "start_tokens", lambda text: 1 / 0)
    with pytest.raises(UserError, match=words) as refused:
        desk.read(body("x" * characters))
    assert refused.value.status == 400 and refused.value.code == "context_length_exceeded"
    assert sum(sizes) == encoded


@pytest.mark.parametrize("retrieve_first", [False, True])
def test_a_client_that_hangs_up_early_leaves_no_jobs_and_no_places(retrieve_first):
    desk, submitted = make_desk(retrieve_first=retrieve_first), []
    desk.serving_loop.submit = submitted.extend

    async def ask(leaves: bool) -> None:
        completion = Completion(desk, time.monotonic())
        await completion.read(body("x"))
        deltas = completion.deltas()
        assert (await anext(deltas))[1]["role"] == "assistant" and desk._promised == 1
        coming = asyncio.ensure_future(anext(deltas))
        if leaves:
            await asyncio.sleep(0)  # the searches or the jobs are about to start
            completion.leave()
        for _ in range(20):
            await asyncio.sleep(0.01)
            if coming.done() and not coming.cancelled() and not coming.exception():
                coming = asyncio.ensure_future(anext(deltas))
        coming.cancel()
        with suppress(asyncio.CancelledError):
            await coming
        assert len(submitted) == (not leaves) and desk._promised == 0

    asyncio.run(ask(True))
    asyncio.run(ask(False))
