"""Answering one question at the terminal, streamed."""

import itertools
import os
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.text import Text

from r1s_jax.border.errors import ConfigError
from r1s_jax.border.text import printable
from r1s_jax.config import RolloutConfig, SearchConfig
from r1s_jax.data.corpora import open_saved_index
from r1s_jax.models.pretrained import Pretrained, load_pretrained
from r1s_jax.models.tokenizer import decode, encode, encode_start, foreign
from r1s_jax.protocol.dialect import Dialect
from r1s_jax.protocol.prompts import renderer
from r1s_jax.protocol.solution import Solution, kind_of_new
from r1s_jax.rollout.broker import FAILED, Broker, SearchFailure
from r1s_jax.rollout.host_loop import HostLoop
from r1s_jax.rollout.trajectory import Finish
from r1s_jax.system.console import out_console as console
from r1s_jax.tracking.trace_view import STYLES

_WHY = {
    Finish.LENGTH: "ran out of tokens",
    Finish.SEARCH_LIMIT: "asked for too many searches",
    Finish.BAD_QUERY: "wrote an empty query",
    Finish.SEARCH_ERROR: "a search failed",
}


def ask(
    question: str,
    model: str,
    index: Path,
    *,
    k: int,
    temperature: float,
    first_search: bool,
    drafts: int | None = None,
    dialect: str = "",
    thinking: str = "",
    force_dialect: bool = False,
) -> str | None:
    """Streams an answer to standard output; returns what the policy answered.

    The policy is asked in its own dialect; `dialect` is for one that names none. `drafts` are 4 by
    default, and none on a CPU, where five positions cost more than the passes that they save.
    """
    policy = load_pretrained(model).speaking(dialect, thinking, force=force_dialect)
    if drafts is None:
        drafts = 0 if jax.default_backend() == "cpu" else 4
    config = RolloutConfig(
        slots=1,
        prefill_rows=1,
        temperature=temperature,
        max_length=min(4096, policy.model.max_position),
        max_prompt_length=min(4096, policy.model.max_position) - 1,
        documents_per_query=k,
        prefill_chunk=128,
        drafts=drafts,
    )
    loop, prompt = _prepare(policy, config, question, index, first_search)
    seed = int.from_bytes(os.urandom(4)) >> 1
    printer = _Printer(loop.decode, policy.dialect)
    for event in loop.run(prompt, jax.random.key(seed)):
        printer.feed(event.tokens, documents=event.kind == "documents")
    console.print()
    if not loop.finish.complete:
        console.print(f"[red]No answer: the model {_WHY[loop.finish]}.[/]")
    return _solution(loop, policy, len(prompt)).answer


def _solution(loop: HostLoop, policy: Pretrained, start: int) -> Solution:
    """What came after the prompt, by who wrote it."""
    pairs = list(zip(loop.tokens, loop.mask, strict=True))[start:]
    if pairs and pairs[-1][1] and pairs[-1][0] in policy.eos_ids:
        pairs.pop()
    runs = itertools.groupby(pairs, key=lambda pair: pair[1])
    spans = tuple((loop.decode([token for token, _ in run]), who) for who, run in runs)
    return Solution(spans, policy.dialect, loop.finish.complete)


def _prepare(
    policy: Pretrained, config: RolloutConfig, question: str, index: Path, first_search: bool
) -> tuple[HostLoop, list[int]]:
    tokenizer = policy.tokenizer
    to_ids, to_text = partial(encode, tokenizer), partial(decode, tokenizer)
    broker = Broker(
        SearchConfig(),
        decode=to_text,
        encode=to_ids,
        clean=foreign(tokenizer),
        dialect=policy.dialect,
        documents_per_query=config.documents_per_query,
        max_documents_length=config.max_documents_length,
    )
    broker.begin(open_saved_index(index))
    clean = foreign(tokenizer)
    prompt = encode_start(tokenizer, renderer(policy.dialect, tokenizer)(clean(question)))
    if first_search:
        (search,) = broker.search_now([question])
        if search.outcome in FAILED:
            raise SearchFailure(f"the first search failed: {broker.common_failures()}")
        query = policy.dialect.first_call(clean(question))
        console.print(Text(printable(query), STYLES["query"]), end="")
        tokens = broker.document_tokens(search.documents)
        console.print(Text(printable(to_text(tokens)), STYLES["documents"]), end="")
        prompt += to_ids(query) + tokens
    if len(prompt) >= config.max_length:
        raise ConfigError(
            f"the question takes {len(prompt)} tokens, and the model reads {config.max_length} "
            "with its answer: shorten it"
        )
    loop = HostLoop(
        model=policy.model,
        params=jax.device_put(policy.params),
        config=config,
        compute_dtype=np.dtype("float32"),
        eos_ids=policy.eos_ids,
        broker=broker,
        decode=to_text,
    )
    return loop, prompt


class _Printer:
    """Prints text as its tokens come, a change of colour at each tag of the protocol."""

    def __init__(self, decode, dialect: Dialect):
        self._decode, self._tokens, self._shown = decode, [], ""
        self._dialect = dialect

    def feed(self, tokens: list[int], *, documents: bool) -> None:
        if documents:
            text = printable(self._decode(tokens))
            console.print(Text(text, STYLES["documents"]), end="")
            self._tokens, self._shown = [], ""
            return
        self._tokens += tokens
        text = self._decode(self._tokens)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return  # half a character; the next token completes it
        style = STYLES[kind_of_new(self._shown, text, self._dialect)]
        console.print(Text(printable(text[len(self._shown) :]), style), end="")
        self._shown = text
