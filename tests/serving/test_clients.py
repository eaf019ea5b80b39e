"""Third-party clients, used as in their documentation, against a live server.

test_server.py uses OpenAI's Python client throughout.
"""

import json
import shutil
import subprocess
import time
from importlib.util import find_spec

import pytest

from r1s_jax.data.tiny_world import TRADES
from tests.fakes import WebRetriever
from tests.serving.test_server import ASK, serving

NODE = shutil.which("node")
QUESTION = ASK[0]["content"]


@pytest.fixture(scope="module")
def url():
    """A server whose streams contain comments, which it sends during a slow search."""
    named = ("litellm", "langchain_openai", "llama_index", "llm")
    if not any(map(find_spec, named)) and not node_has_openai():
        pytest.skip(f"none of {', '.join(named)} is installed, nor openai for node")
    slow = WebRetriever(lambda: time.sleep(0.1))
    with pytest.MonkeyPatch.context() as patch, serving(slow) as (address, _):
        patch.setattr("r1s_jax.serving.completion._QUIET_S", 0.02)
        yield f"{address}/v1"


def assert_same(whole: str, parts: list[str]) -> None:
    """Checks that the pieces of a stream are the greedy answer."""
    assert whole in TRADES and "".join(parts) == whole


def test_litellm(url, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it uses the network
    litellm = pytest.importorskip("litellm")
    how = dict(model="openai/tiny", api_base=url, api_key="any", messages=ASK, temperature=0)
    whole = litellm.completion(**how)
    stream = litellm.completion(**how, stream=True, stream_options={"include_usage": True})
    parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert_same(whole.choices[0].message.content, parts)
    assert whole.choices[0].message.reasoning_content and whole.usage.completion_tokens == 8


def test_langchain(url):
    openai = pytest.importorskip("langchain_openai")
    model = openai.ChatOpenAI(base_url=url, api_key="any", model="tiny", temperature=0)
    whole = model.invoke(QUESTION)
    assert_same(whole.content, [chunk.content for chunk in model.stream(QUESTION)])
    assert whole.usage_metadata["output_tokens"] == 8


def test_llama_index(url):
    like = pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage

    model = like.OpenAILike(
        api_base=url, api_key="any", model="tiny", is_chat_model=True, temperature=0
    )
    messages = [ChatMessage(role="user", content=QUESTION)]
    parts = [part.delta or "" for part in model.stream_chat(messages)]
    assert_same(model.chat(messages).message.content, parts)


def test_llm(url):
    models = pytest.importorskip("llm.default_plugins.openai_models")
    model = models.Chat("tiny", model_name="tiny", api_base=url)
    whole = model.prompt(QUESTION, stream=False, key="any", temperature=0).text()
    assert_same(whole, list(model.prompt(QUESTION, key="any", temperature=0)))


IN_NODE = """
const OpenAI = require("openai");
const [baseURL, content] = process.argv.slice(1);
const client = new OpenAI({ baseURL, apiKey: "any" });
const how = { model: "tiny", messages: [{ role: "user", content }], temperature: 0 };
(async () => {
  const whole = await client.chat.completions.create(how);
  const parts = [];
  for await (const chunk of await client.chat.completions.create({ ...how, stream: true }))
    parts.push(chunk.choices[0]?.delta?.content || "");
  const model = await client.models.retrieve("tiny");
  console.log(JSON.stringify([whole.choices[0].message.content, parts, model.id]));
})();
"""


def in_node(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [NODE, "-e", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def node_has_openai() -> bool:
    return bool(NODE) and not in_node("require.resolve('openai')").returncode


def test_openai_for_node(url):
    if not node_has_openai():
        pytest.skip("node has no openai here (npm install openai; NODE_PATH)")
    done = in_node(IN_NODE, url, QUESTION)
    assert not done.returncode, done.stderr
    whole, parts, model = json.loads(done.stdout)
    assert_same(whole, parts)
    assert model == "tiny"
