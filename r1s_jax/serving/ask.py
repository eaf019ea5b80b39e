"""Answering one question at the terminal, streamed from a serving loop with one slot."""

import itertools
import queue

import jax
from rich.text import Text

from r1s_jax.io.errors import ConfigError
from r1s_jax.io.text import printable
from r1s_jax.models.pretrained import load_pretrained
from r1s_jax.presets import Settings
from r1s_jax.protocol.solution import Solution, kind_of_new
from r1s_jax.retrieval.api import Retriever
from r1s_jax.rollout.broker import FAILED, Search, SearchFailure
from r1s_jax.rollout.engine import Engine
from r1s_jax.rollout.trajectory import Finish
from r1s_jax.serving.jobs import Job, Update
from r1s_jax.serving.loop import ServingLoop
from r1s_jax.system.console import out_console as console
from r1s_jax.system.dtype import default_dtype
from r1s_jax.tracking.trace_view import STYLES

_WHY = {
    Finish.LENGTH: "ran out of tokens",
    Finish.SEARCH_LIMIT: "asked for too many searches",
    Finish.BAD_QUERY: "wrote an empty query",
    Finish.SEARCH_ERROR: "a search failed",
}
_SPECULATIVE = "rollout.speculative_tokens=4"


def ask(question: str, model: str, retriever: Retriever, settings: Settings) -> str | None:
    """Streams an answer to standard output; returns the policy's answer, or None.

    On an accelerator it uses four speculative tokens by default; on a CPU the extra positions cost
    more than the forward passes that they save. Raises ConfigError for a question that is too
    long, SearchFailure if the system's own first search failed.
    """
    if jax.default_backend() != "cpu":
        settings = settings._replace(changes=[_SPECULATIVE, *settings.changes])
    protocol = settings.config().protocol
    policy = load_pretrained(model, default_dtype()).speaking(protocol)
    config = settings.config(policy.model.max_position)
    serving_loop = ServingLoop(policy, retriever, config.rollout, search=config.search, waiting=0)
    printer = _Printer(serving_loop.engine)
    updates: queue.Queue[Update] = queue.Queue()
    temperature, top_p = config.rollout.temperature, config.rollout.top_p
    try:
        prompt = _prompt(serving_loop.engine, question, printer)
        job = Job(prompt, config.seed, updates.put, temperature=temperature, top_p=top_p)
        serving_loop.submit([job])
        finish = Finish.NONE
        while finish == Finish.NONE:
            update = updates.get()
            printer.feed(update)
            finish = update.finish
    finally:
        serving_loop.close()
    console.print()
    if not finish.complete:
        why = update.error or _WHY.get(finish, finish.name)
        console.print(f"[red]No answer: the model {why}.[/]")
    return printer.solution(finish).answer


def _prompt(engine: Engine, question: str, printer: "_Printer") -> list[int]:
    """Token ids of the prompt, with the system's own first search if the config asks for one."""
    prompt = engine.prompt_tokens(question)
    needed = len(prompt)
    if engine.config.retrieve_first:
        needed += engine.first_search_room(question)
    if needed > engine.config.max_prompt_length:
        raise ConfigError(
            f"the prompt with the question needs {needed} tokens, more than "
            f"rollout.max_prompt_length={engine.config.max_prompt_length}: shorten the question"
        )
    if engine.config.retrieve_first:
        (search,) = engine.broker.search_now([question])
        if search.outcome in FAILED:
            raise SearchFailure(f"the first search failed: {engine.broker.common_failures()}")
        forced = engine.first_search_tokens(search, len(prompt))
        printer.documents(forced)
        prompt += forced
    return prompt


class _Printer:
    """Prints text token by token, with a style for each kind of text."""

    def __init__(self, engine: Engine):
        self._engine, self._turn, self._shown = engine, [], ""
        self._written: list[tuple[int, bool]] = []  # tokens, and whether the policy wrote them

    def feed(self, update: Update) -> None:
        """Prints the new text of an update."""
        pairs = list(zip(update.tokens, update.mask, strict=True))
        self._written += pairs
        for by_policy, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
            tokens = [token for token, _ in run]
            self._policy(tokens) if by_policy else self.documents(tokens)
        for search in update.searches:
            self._failure(search)

    def documents(self, tokens: list[int]) -> None:
        """Prints a text of the system."""
        text = printable(self._engine.decode(tokens))
        console.print(Text(text, STYLES["documents"]), end="")
        self._turn, self._shown = [], ""

    def solution(self, finish: Finish) -> Solution:
        """The text after the prompt, split by writer."""
        pairs = self._written
        if pairs and pairs[-1][1] and pairs[-1][0] in self._engine.eos_ids:
            pairs = pairs[:-1]
        runs = itertools.groupby(pairs, key=lambda pair: pair[1])
        spans = [
            (self._engine.decode([token for token, _ in run]), by_policy) for by_policy, run in runs
        ]
        return Solution(tuple(spans), self._engine.dialect, finish.complete)

    def _policy(self, tokens: list[int]) -> None:
        for token in tokens:
            self._turn.append(token)
            text = self._engine.decode(self._turn)
            if text.endswith("\N{REPLACEMENT CHARACTER}"):
                continue  # an incomplete character; the next token completes it
            style = STYLES[kind_of_new(self._shown, text, self._engine.dialect)]
            console.print(Text(printable(text[len(self._shown) :]), style), end="")
            self._shown = text

    def _failure(self, search: Search) -> None:
        if search.outcome in FAILED:
            why = self._engine.broker.common_failures()
            console.print(f"[red]A search failed: {why}.[/]")
