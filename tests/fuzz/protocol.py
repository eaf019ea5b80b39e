"""Dialects, tool calls of a policy, sums of rewards, and requests to a served policy."""

import json
from pathlib import Path
from typing import Any

from tests.fuzz.reader import MOST_CHARACTERS, Reader


def _dialect(folder: Path) -> None:
    _write_dialect(folder, "tool_call")


def _write_dialect(folder: Path, name: str) -> None:
    from r1s_jax.protocol.dialects import FILE, make_dialect

    (folder / FILE).write_text(json.dumps(make_dialect(name, "on", "Q: {question}").as_dict()))


def _read_dialect(folder: Path) -> Any:
    from r1s_jax.protocol.dialects import read_dialect

    dialect = read_dialect(folder)
    return dialect and (dialect.plain("who"), dialect.reply([["Town   text"]]), dialect.as_dict())


def _calls(folder: Path) -> None:
    call = {"name": "search", "arguments": {"query": "the town of Bakori"}}
    (folder / "call.json").write_text(json.dumps(call))


def _read_calls(folder: Path) -> Any:
    """Text of the policy between its tags is outside input as well and must get a reply."""
    from r1s_jax.protocol.dialects import make_dialect

    dialect = make_dialect("tool_call")
    text = (folder / "call.json").read_bytes().decode("utf-8", "replace")
    (call,) = dialect.calls(f"<tool_call>{text}</tool_call><|im_end|>")
    assert len(dialect.reply([call.problem])) < 300
    return call


def _chat(folder: Path) -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Who wrote Dune?"}]}],
        "temperature": 0.5,
        "stop": ["x"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": 3,
    }
    (folder / "chat.json").write_text(json.dumps(body))


def _read_chat(folder: Path) -> Any:
    from r1s_jax.serving.chat import Refused, read_request

    try:
        chat = read_request((folder / "chat.json").read_bytes())
        return chat.conversation(), chat.stops, chat.limit, chat.temperature, chat.seed
    except Refused as refused:
        assert refused.status == 400 and json.dumps(refused.json())
        raise Refused(400, f"chat.json: {refused}") from None


def _sums(folder: Path) -> None:
    texts = ["stage2 + 0.2*retrieved_gold - 0.1*repeated_queries", "f1 - 2*searches_over(3)"]
    (folder / "sums.json").write_text(json.dumps(texts))


def _read_sums(folder: Path) -> Any:
    from r1s_jax.io.json import parse
    from r1s_jax.rewards.composed import parse as read_sum
    from r1s_jax.rewards.registry import RewardError

    texts = parse((folder / "sums.json").read_bytes(), "sums.json")
    try:
        return [read_sum(text, RewardError) for text in texts if isinstance(text, str)]
    except RewardError as error:
        raise RewardError(f"sums.json: {error}"[:MOST_CHARACTERS]) from error
    except TypeError:  # not iterable: the damage concerns the test, not the reader
        return None


READERS = {
    "dialect": Reader(_dialect, _read_dialect),
    "calls": Reader(_calls, _read_calls),
    "reward sums": Reader(_sums, _read_sums, weight=4),
    "chat request": Reader(_chat, _read_chat),
}
