"""From a question to the text that a policy is started with."""

import threading
from collections.abc import Callable
from typing import Any

from r1s_jax.border.errors import ConfigError, reason
from r1s_jax.protocol import r1_searcher as protocol

_TEMPLATE_SECONDS = 20.0


def render_prompt(template: str, question: str) -> str:
    """Puts `question` into a template whose only field is `{question}` (other braces are kept)."""
    if "{question}" not in template:
        raise ConfigError("a prompt template needs the field {question}; this one has none")
    return template.replace("{question}", question)


def chat_renderer(tokenizer: Any) -> Callable[[str], str]:
    """Renders a question with the tokenizer's chat template and the protocol's system message."""

    def render(question: str) -> str:
        if not tokenizer.chat_template:
            raise ConfigError("this tokenizer has no chat template: use environment.prompt=base")
        messages = [
            {"role": "system", "content": protocol.CHAT_PROMPT},
            {"role": "user", "content": question},
        ]
        text = _within(
            _TEMPLATE_SECONDS,
            lambda: tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            ),
        )
        # Templates of models that think open the reasoning themselves.
        opened = text.rstrip().endswith(protocol.BEGIN_THINK)
        return text if opened else text + protocol.BEGIN_THINK

    return render


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


def renderer(template: str | None, tokenizer: Any) -> Callable[[str], str]:
    """Makes the prompt of a question: by a template, the chat template, or the base prompt."""
    if template is None and tokenizer.chat_template:
        return chat_renderer(tokenizer)
    chosen = template or protocol.BASE_PROMPT
    return lambda question: render_prompt(chosen, question)
