"""Reading and checking requests for chat completions from OpenAI's clients."""

import os
from typing import Any

import msgspec

from r1s_jax.io import service
from r1s_jax.io.errors import BadInput
from r1s_jax.io.json import parse_object
from r1s_jax.io.schema import check
from r1s_jax.protocol.dialect import Message

MOST_ANSWERS = 16
_MOST_STOPS = 4  # OpenAI's limit
# OpenAI's fields that do not change the answer here; they are accepted and ignored.
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "parallel_tool_calls", "reasoning_effort", "verbosity"),
    *("web_search_options", "prediction", "modalities"),
}
_WHOLE = {"max_tokens", "max_completion_tokens", "seed", "n"}
# Fields of OpenAI and similar servers that would change the answer and are not supported, each with
# its neutral values, which are accepted since some clients send them by default.
_NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "audio": (),
    "thinking": ({"type": "disabled"},),
    "extra_body": ({},),
    # Of vLLM, SGLang and llama.cpp.
    "top_k": (-1, 0),
    "min_p": (0,),
    "top_a": (0,),
    "typical_p": (1,),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "length_penalty": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "mirostat": (0,),
}


class Refused(service.Refused):
    """A request that is not answered, with the fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "",
    ):
        super().__init__(status, message)
        self.param, self.code = param, code
        self.kind = kind or ("server_error" if status >= 500 else "invalid_request_error")

    def json(self) -> dict[str, Any]:
        """The body of the reply."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


class _Part(msgspec.Struct):
    type: str
    text: str | None = None


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ChatRequest(msgspec.Struct, kw_only=True):
    """The supported fields of a request; None leaves the choice to the server."""

    messages: list[_Message]
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in stops if text]

    @property
    def limit(self) -> int | None:
        """The most tokens that the policy may write."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def drawn_seed(self) -> int:
        """The request's seed, or a random one."""
        return int.from_bytes(os.urandom(4)) if self.seed is None else self.seed

    def conversation(self) -> list[Message]:
        """The messages as {"role": system, user or assistant, "content"}; raises Refused."""
        if not self.messages:
            raise Refused(400, "messages: expected at least one", param="messages")
        messages = [_message(i, message) for i, message in enumerate(self.messages)]
        if messages[-1]["role"] != "user":
            raise Refused(400, "messages: the last one must be the user's", param="messages")
        if not messages[-1]["content"].strip():
            where = f"messages[{len(messages) - 1}].content"
            raise Refused(400, f"{where}: expected a question, found nothing", param=where)
        return messages


def read_request(raw: bytes) -> ChatRequest:
    """Reads the body of a request; raises Refused if it is invalid or not supported."""
    try:
        body = parse_object(raw, "the request")
        body = {n: _whole_number(n, v) for n, v in body.items() if v is not None}
        request = check(body, ChatRequest, "the request")
    except BadInput as error:
        raise Refused(400, str(error)) from None
    names = {*ChatRequest.__struct_fields__, *_IGNORED, *_NOT_SERVED}
    for name in body:
        if name not in names:
            raise Refused(400, f"Unrecognized request argument: {name[:60]}", param=name[:60])
        if name in _NOT_SERVED and body[name] not in _NOT_SERVED[name]:
            raise Refused(400, f"{name} is not supported by this server", param=name)
    _check_ranges(request)
    return request


def _whole_number(name: str, value: Any) -> Any:
    """Accepts 5.0 for 5, since some clients write whole numbers so."""
    whole = name in _WHOLE and isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def _check_ranges(request: ChatRequest) -> None:
    def within(name: str, low: float, high: float) -> None:
        value = getattr(request, name)
        if value is not None and not low <= value <= high:
            raise Refused(400, f"{name} must be from {low:g} to {high:g}, got {value}", param=name)

    within("temperature", 0, 2)
    within("top_p", 0, 1)
    within("max_tokens", 1, 2**31)
    within("max_completion_tokens", 1, 2**31)
    within("n", 1, MOST_ANSWERS)
    within("seed", -(2**63), 2**63 - 1)
    if isinstance(request.stop, list) and len(request.stop) > _MOST_STOPS:
        raise Refused(400, f"stop: at most {_MOST_STOPS} texts", param="stop")
    if request.stream_options is not None and not request.stream:
        raise Refused(400, "stream_options is only for stream: true", param="stream_options")


def _message(place: int, message: _Message) -> Message:
    where = f"messages[{place}]"
    role = "system" if message.role == "developer" else message.role
    if role not in ("system", "user", "assistant"):
        raise Refused(
            400, f"{where}.role: {message.role[:40]!r} is not supported", param=f"{where}.role"
        )
    content = message.content
    if isinstance(content, list):
        if any(part.type != "text" or part.text is None for part in content):
            raise Refused(400, f"{where}.content: only text is read", param=f"{where}.content")
        content = "\n".join(part.text or "" for part in content)
    if content is None and role != "assistant":
        raise Refused(400, f"{where}.content: expected a text", param=f"{where}.content")
    return {"role": role, "content": content or ""}
