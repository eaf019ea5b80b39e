"""From a question to the prompt of a policy."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from r1s_jax.io.errors import ConfigError, reason
from r1s_jax.protocol.dialect import Dialect, Message
from r1s_jax.protocol.solution import R1_SEARCHER
from r1s_jax.protocol.tool_call import ToolCall

_TEMPLATE_SECONDS = 20.0


def renderer(dialect: Dialect, tokenizer: Any) -> Callable[[str], str]:
    """Makes the prompt of a question in the dialect, with the chat template if there is one.

    Raises ConfigError if the dialect needs a chat template and there is none.
    """
    whole = dialect.prompt is not None and dialect.prompt_is_whole
    if not tokenizer.chat_template and dialect.tools:
        raise ConfigError(f"dialect {dialect.name} needs a chat template; the tokenizer has none")
    if whole or not tokenizer.chat_template:
        return dialect.plain
    return chat_renderer(tokenizer, dialect)


def chat_renderer(tokenizer: Any, dialect: Dialect = R1_SEARCHER) -> Callable[[str], str]:
    """Renders a question with the tokenizer's chat template and the dialect's messages."""

    def render(question: str) -> str:
        if not tokenizer.chat_template:
            raise ConfigError("this tokenizer has no chat template: use environment.prompt=base")
        messages = dialect.messages(question)
        return dialect.finish_prompt(chat_text(tokenizer, dialect, messages, dialect.tools))

    return render


def chat_text(
    tokenizer: Any,
    dialect: Dialect,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
) -> str:
    """Renders messages with the chat template, up to the policy's next token.

    Raises ConfigError if the template fails, returns no text or takes longer than 20 s.
    """
    options: dict[str, Any] = {"tools": tools} if tools else {}
    if dialect.thinking != "template":
        options["enable_thinking"] = dialect.thinking == "on"

    def render(messages: list[dict[str, Any]]) -> str:
        call = partial(tokenizer.apply_chat_template, messages, tokenize=False, **options)
        return _within(_TEMPLATE_SECONDS, partial(call, add_generation_prompt=True))

    try:
        return render(messages)
    except ConfigError as error:
        others = [m for m in messages if m["role"] != "system"]
        if len(others) == len(messages) or not _renders(render, others):
            raise
        raise ConfigError(
            f"{error}. It works without a system message: give a prompt that has none "
            "(protocol.prompt=FILE; in recipes also environment.prompt=base)"
        ) from None


def _renders(render: Callable[[list[dict[str, Any]]], str], messages: list[dict[str, Any]]) -> bool:
    try:
        return bool(render(messages))
    except ConfigError:
        return False


def bound(dialect: Dialect, tokenizer: Any) -> Dialect:
    """The dialect with the words of this tokenizer's chat template, if the dialect uses them.

    Raises ConfigError if there is no template, or none that the dialect can use.
    """
    if not isinstance(dialect, ToolCall):
        return dialect
    if not tokenizer.chat_template:
        raise ConfigError(f"dialect {dialect.name} needs a chat template; the tokenizer has none")
    added = tokenizer.added_tokens_decoder.values()
    control = [token.content for token in added if token.special]
    return dialect.framed(partial(chat_text, tokenizer, dialect), control)


def _within(seconds: float, action: Callable[[], str]) -> str:
    """The text that a foreign template returns. Raises ConfigError if it fails or is late."""
    result: list[str] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(action())
        except BaseException as error:
            errors.append(error)

    # A daemon thread: a template that loops for ever must not keep the process alive.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise ConfigError(f"the tokenizer's chat template fails: {reason(errors[0])}")
    if not result:
        raise ConfigError(f"the tokenizer's chat template gives nothing within {seconds:g} s")
    if not isinstance(result[0], str):
        raise ConfigError("the tokenizer's chat template gives no text")
    return result[0]


def conversation(dialect: Dialect, tokenizer: Any) -> Callable[[list[Message]], str]:
    """Makes the prompt of messages {"role": system, user or assistant; "content"}.

    The last message, the user's, becomes the question. Earlier messages stand before it, and
    system messages are joined to the dialect's own. Without a chat template, or with the policy's
    own prompt, all messages are lines of one text. Raises as `renderer` does.
    """
    render_question = renderer(dialect, tokenizer)
    whole = dialect.prompt is not None and dialect.prompt_is_whole

    def render(messages: list[Message]) -> str:
        *before, last = messages
        if not before:
            return render_question(last["content"])
        if whole or not tokenizer.chat_template:
            return render_question(_as_lines(before, last["content"]))
        *frame, question = dialect.messages(last["content"])
        system = [m["content"] for m in [*frame, *before] if m["role"] == "system"]
        turns = [m for m in before if m["role"] != "system"]
        if system:
            turns = [{"role": "system", "content": "\n\n".join(system)}, *turns]
        text = chat_text(tokenizer, dialect, [*turns, question], dialect.tools)
        return dialect.finish_prompt(text)

    return render


def _as_lines(before: list[Message], question: str) -> str:
    """Earlier messages and the question as one text, to follow a prompt that ends in `User: `."""
    names = {"user": "User: ", "assistant": "Assistant: "}
    system = [m["content"] for m in before if m["role"] == "system"]
    turns = [m for m in before if m["role"] != "system"] + [{"role": "user", "content": question}]
    lines = [names[m["role"]] + m["content"] for m in turns]
    if not system:
        lines[0] = turns[0]["content"] if turns[0]["role"] == "user" else lines[0]
    return "\n".join([*system, *lines])
