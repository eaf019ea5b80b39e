"""From a question to the text that a policy is started with."""

from collections.abc import Callable
from typing import Any

from r1s_jax.border.errors import ConfigError
from r1s_jax.protocol import r1_searcher as protocol


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
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text + protocol.BEGIN_THINK

    return render


def renderer(template: str | None, tokenizer: Any) -> Callable[[str], str]:
    """Makes the prompt of a question: by a template, the chat template, or the base prompt."""
    if template is None and tokenizer.chat_template:
        return chat_renderer(tokenizer)
    chosen = template or protocol.BASE_PROMPT
    return lambda question: render_prompt(chosen, question)
