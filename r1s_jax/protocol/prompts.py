"""From a question to the text that a policy is started with."""

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
    """Makes the prompt of a question in the dialect: its chat form where there is a template.

    Raises ConfigError for a dialect that needs a template where there is none.
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
    """What the chat template makes of messages, up to the policy's next token.

    Raises ConfigError for a template that fails, gives no text or takes too long.
    """
    options: dict[str, Any] = {"tools": tools} if tools else {}
    if dialect.thinking != "template":
        options["enable_thinking"] = dialect.thinking == "on"

    def text(said: list[dict[str, Any]]) -> str:
        render = partial(tokenizer.apply_chat_template, said, tokenize=False, **options)
        return _within(_TEMPLATE_SECONDS, partial(render, add_generation_prompt=True))

    try:
        return text(messages)
    except ConfigError as error:
        others = [m for m in messages if m["role"] != "system"]
        if len(others) == len(messages) or not _renders(text, others):
            raise
        raise ConfigError(
            f"{error}. Without a system message it works: give a prompt that has none "
            "(protocol.prompt=FILE; in recipes environment.prompt=base too)"
        ) from None


def _renders(text: Callable[[list[dict[str, Any]]], str], messages: list[dict[str, Any]]) -> bool:
    try:
        return bool(text(messages))
    except ConfigError:
        return False


def bound(dialect: Dialect, tokenizer: Any) -> Dialect:
    """The dialect with the words of this tokenizer's chat template, where it takes any.

    Raises ConfigError where the template has none that it can use.
    """
    if not isinstance(dialect, ToolCall):
        return dialect
    if not tokenizer.chat_template:
        raise ConfigError(f"dialect {dialect.name} needs a chat template; the tokenizer has none")
    added = tokenizer.added_tokens_decoder.values()
    control = [token.content for token in added if token.special]
    return dialect.framed(partial(chat_text, tokenizer, dialect), control)


def _within(seconds: float, action: Callable[[], str]) -> str:
    """What a template of others gives, if it does so in time; ConfigError for anything else."""
    result: list[str] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            result.append(action())
        except BaseException as error:
            failed.append(error)

    # A daemon: a template that loops for ever must not keep the process alive.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise ConfigError(f"the tokenizer's chat template fails: {reason(failed[0])}")
    if not result:
        raise ConfigError(f"the tokenizer's chat template gives nothing within {seconds:g} s")
    if not isinstance(result[0], str):
        raise ConfigError("the tokenizer's chat template gives no text")
    return result[0]


def conversation(dialect: Dialect, tokenizer: Any) -> Callable[[list[Message]], str]:
    """Makes the prompt of messages {"role": system, user or assistant; "content"}.

    The last, the user's, is asked as a question alone would be; the others stand before it, those
    of the system beside the dialect's own. Without a chat template, or with a prompt of the
    policy's own, they are lines of one text. Raises as `renderer` does.
    """
    alone = renderer(dialect, tokenizer)
    whole = dialect.prompt is not None and dialect.prompt_is_whole

    def render(messages: list[Message]) -> str:
        *before, last = messages
        if not before:
            return alone(last["content"])
        if whole or not tokenizer.chat_template:
            return alone(_as_lines(before, last["content"]))
        *frame, question = dialect.messages(last["content"])
        system = [m["content"] for m in [*frame, *before] if m["role"] == "system"]
        turns = [m for m in before if m["role"] != "system"]
        if system:
            turns = [{"role": "system", "content": "\n\n".join(system)}, *turns]
        text = chat_text(tokenizer, dialect, [*turns, question], dialect.tools)
        return dialect.finish_prompt(text)

    return render


def _as_lines(before: list[Message], question: str) -> str:
    """Earlier messages and the question as one, in the form of a prompt that ends with `User: `."""
    names = {"user": "User: ", "assistant": "Assistant: "}
    system = [m["content"] for m in before if m["role"] == "system"]
    turns = [m for m in before if m["role"] != "system"] + [{"role": "user", "content": question}]
    lines = [names[m["role"]] + m["content"] for m in turns]
    if not system:
        lines[0] = turns[0]["content"] if turns[0]["role"] == "user" else lines[0]
    return "\n".join([*system, *lines])
