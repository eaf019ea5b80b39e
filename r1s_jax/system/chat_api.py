"""A client of OpenAI-compatible chat endpoints: many prompts at once, retries, limits."""

import asyncio
import contextlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from r1s_jax.io.errors import UserError, reason
from r1s_jax.io.http import proxy_of, without_credentials
from r1s_jax.io.text import whole


class ChatApiError(UserError, RuntimeError):
    """An endpoint that stopped answering; `record` already has the earlier replies."""


@dataclass(frozen=True)
class ChatEndpoint:
    """A model behind an endpoint, and the limits of its use."""

    url: str  # base of the API, e.g. http://localhost:8000/v1
    model: str
    concurrency: int = 16
    requests_per_minute: int = 0  # 0: no limit
    temperature: float | None = 0.0  # None: not sent; some models refuse it
    timeout_s: float = 120.0  # of one attempt; see `deadline_s` for all attempts
    retries: int = 6  # after time-outs, lost connections, 429 and 5xx, with exponential backoff

    @property
    def deadline_s(self) -> float:
        """Seconds for a request with its retries and pauses, even if the server asks for longer."""
        return self.timeout_s * (self.retries + 1)


def ask_all(
    endpoint: ChatEndpoint, prompts: Mapping[str, str], record: Callable[[str, str], None]
) -> str:
    """Sends every prompt; calls `record` with the key and text of each reply as it arrives.

    A prompt without a reply after all retries is left out; returns the last error of these, or "".
    Raises ChatApiError after max(`concurrency`, 8) failed requests in a row.
    """
    return asyncio.run(_ask_all(_client(endpoint), endpoint, prompts, record))


async def _ask_all(
    client: Any,
    endpoint: ChatEndpoint,
    prompts: Mapping[str, str],
    record: Callable[[str, str], None],
) -> str:
    limiter = _limiter(endpoint)
    slots = asyncio.Semaphore(endpoint.concurrency)
    max_failures = max(endpoint.concurrency, 8)
    failures: list[str] = []  # since the last success
    last = [""]

    async def ask(key: str, prompt: str) -> None:
        async with slots:
            if len(failures) >= max_failures:
                return
            async with limiter:
                try:
                    record(key, await _reply(client, endpoint, prompt))
                    failures.clear()
                except ConnectionError as error:
                    failures.append(str(error))
                    last[0] = str(error)

    async with client:
        await asyncio.gather(*(ask(key, prompt) for key, prompt in prompts.items()))
    if len(failures) >= max_failures:
        raise ChatApiError(
            f"{without_credentials(endpoint.url)} failed {len(failures)} requests in a row, the "
            f"last with: {failures[-1]}. Replies so far are kept; mend the endpoint, then run the "
            "same command again"
        )
    return last[0]


async def _reply(client: Any, endpoint: ChatEndpoint, prompt: str) -> str:
    """The model's reply. Raises ConnectionError for any failure, after all retries."""
    from openai import OpenAIError

    request = client.chat.completions.create(
        model=endpoint.model,
        messages=[{"role": "user", "content": prompt}],
        **({} if endpoint.temperature is None else {"temperature": endpoint.temperature}),
    )
    try:
        # The client's own time-outs limit each read, and it sleeps as long as the server asks.
        completion = await asyncio.wait_for(request, endpoint.deadline_s)
    except TimeoutError as error:
        raise ConnectionError(f"no whole answer within {endpoint.deadline_s:g} s") from error
    except (OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON
        raise ConnectionError(reason(error)) from error
    # A server of another kind may return a text, or an object without choices.
    choices = getattr(completion, "choices", None)
    content = choices[0].message.content if choices else None
    if not isinstance(content, str):
        raise ConnectionError(f"the reply holds no message: {str(completion)[:200]}")
    return whole(content)


def check_installed() -> None:
    """Raises ChatApiError where the `openai` package is missing."""
    if not importlib.util.find_spec("openai"):
        raise ChatApiError("judging needs the extra `judge`: pip install 'r1s-jax[judge]'")


def _client(endpoint: ChatEndpoint) -> Any:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    # By default the client would use the proxy even for this machine.
    proxy = proxy_of(endpoint.url)
    straight: dict[str, Any] = dict.fromkeys(("http://", "https://", "all://"))
    client = (
        DefaultAsyncHttpxClient(proxy=proxy) if proxy else DefaultAsyncHttpxClient(mounts=straight)
    )
    # Self-hosted servers need no key, but the client requires one.
    key = os.environ.get("OPENAI_API_KEY") or "none"
    return AsyncOpenAI(
        base_url=endpoint.url,
        api_key=key,
        timeout=endpoint.timeout_s,
        max_retries=endpoint.retries,
        http_client=client,
    )


def _limiter(endpoint: ChatEndpoint) -> Any:
    if not endpoint.requests_per_minute:
        return contextlib.nullcontext()
    from aiolimiter import AsyncLimiter

    return AsyncLimiter(1, 60 / endpoint.requests_per_minute)
