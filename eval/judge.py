"""LLM-as-judge over any OpenAI-compatible endpoint: is a prediction right, given the gold answers?

Verdicts are kept in a journal as they arrive, so that a stopped or half failed run goes on from
there; the judged file is written whole at the end, its rows in their order.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1s_jax.border.errors import UserError
from r1s_jax.data.results import VERDICTS, header_path, read_header, read_results
from r1s_jax.data.rows import DataError, gold_answers, journal_rows
from r1s_jax.system.files import write_json, write_rows

Verdict = Literal["True", "False", "unparsable"]

PROMPT = """\
A question was answered by a model. Decide whether its answer means the same as one of the \
correct answers; wording, spelling variants and extra detail that is not wrong do not matter.

Question: {question}
Correct answers: {golds}
Answer of the model: {predicted}

Reply with one word: True if the answer of the model is correct, False if not."""

_VERDICT = re.compile(r"\b(true|false)\b", re.IGNORECASE)


class JudgeError(UserError, RuntimeError):
    """The endpoint gave no verdict on some rows; those that it gave are kept."""


@dataclass(frozen=True)
class Judge:
    """A model behind an endpoint, and how hard to press it."""

    url: str  # base of the API, e.g. http://localhost:8000/v1
    model: str
    concurrency: int = 16
    requests_per_minute: int = 0  # 0: no limit
    timeout_s: float = 120.0
    retries: int = 6  # of time-outs, lost connections, 429 and 5xx, with exponential pauses


def judge_file(
    path: Path,
    judge: Judge,
    out: Path,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, int]:
    """Writes the rows of `path` with `judge` ("True", "False" or "unparsable") to `out`.

    Rows that ask the same thing are judged once. `OUT.verdicts.jsonl` is the journal. Returns how
    often each verdict occurs. Raises DataError for a broken row; JudgeError, after writing `out`
    with the verdicts there are, when some rows got none.
    """
    if out.resolve() == path.resolve():
        raise DataError(f"{out} is the file to judge: name another for its verdicts")
    rows = read_results(path)
    client = _client(judge)
    keys = [_key(judge, _prompt(row)) for row in rows]
    prompts = dict(zip(keys, map(_prompt, rows), strict=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    journal = out.with_name(out.name + ".verdicts.jsonl")
    verdicts = _read_journal(journal)
    missing = {key: prompt for key, prompt in prompts.items() if key not in verdicts}
    try:
        with journal.open("a", encoding="utf-8") as file:

            def record(key: str, reply: str) -> None:
                verdicts[key] = parse_verdict(reply)
                line = {"key": key, "verdict": verdicts[key], "reply": reply}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                missing.pop(key)
                progress(len(prompts) - len(missing), len(prompts))

            asyncio.run(_ask_all(client, judge, dict(missing), record))
    finally:
        # With no verdict at all there is nothing to write, and maybe another judge's file to lose.
        if any(key in verdicts for key in keys):
            pairs = zip(rows, keys, strict=True)
            _write(path, judge, out, [_judged(row, verdicts.get(key)) for row, key in pairs])
    if missing:
        left = sum(key in missing for key in keys)
        raise JudgeError(
            f"{left} of {len(rows)} rows have no verdict: {judge.url} failed them "
            f"{judge.retries + 1} times. The others are kept; run the same command again"
        )
    return dict(Counter(verdicts[key] for key in keys))


def _judged(row: dict[str, Any], verdict: Verdict | None) -> dict[str, Any]:
    """The row as it was read with its verdict, none left over from another judge."""
    row = {name: value for name, value in row.items() if name not in (*VERDICTS, "scores")}
    return row if verdict is None else row | {"judge": verdict}


def parse_verdict(reply: str) -> Verdict:
    """The one verdict that a reply names, after any thoughts; both or neither is no verdict."""
    said = {word.lower() for word in _VERDICT.findall(reply.rpartition("</think>")[2])}
    return said.pop().capitalize() if len(said) == 1 else "unparsable"


async def _ask_all(
    client: Any,
    judge: Judge,
    prompts: Mapping[str, str],
    record: Callable[[str, str], None],
) -> None:
    """Asks every prompt, `record`s each reply under its key; gives up when a whole round fails."""
    limiter = _limiter(judge)
    turns = asyncio.Semaphore(judge.concurrency)
    most = max(judge.concurrency, 8)
    failures: list[str] = []  # since the last success

    async def ask(key: str, prompt: str) -> None:
        async with turns:
            if len(failures) >= most:
                return
            async with limiter:
                try:
                    record(key, await _reply(client, judge, prompt))
                    failures.clear()
                except ConnectionError as error:
                    failures.append(str(error))

    async with client:
        await asyncio.gather(*(ask(key, prompt) for key, prompt in prompts.items()))
    if len(failures) >= most:
        raise JudgeError(
            f"{judge.url} failed {len(failures)} requests in a row, the last with: {failures[-1]}. "
            "The verdicts so far are kept; mend what is wrong and run the same command again"
        )


async def _reply(client: Any, judge: Judge, prompt: str) -> str:
    """What the model says; ConnectionError for whatever is no answer, retries included."""
    from openai import OpenAIError

    try:
        completion = await client.chat.completions.create(
            model=judge.model, temperature=0, messages=[{"role": "user", "content": prompt}]
        )
    except (OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON
        raise ConnectionError(f"{type(error).__name__}: {error}") from error
    # A server that answers something else altogether gives a text, or an object without choices.
    choices = getattr(completion, "choices", None)
    content = choices[0].message.content if choices else None
    if not isinstance(content, str):
        raise ConnectionError(f"the reply holds no message: {str(completion)[:200]}")
    return content


def _client(judge: Judge) -> Any:
    try:
        from openai import AsyncOpenAI
    except ImportError as error:
        raise JudgeError("judging needs the extra `judge`: pip install 'r1s-jax[judge]'") from error
    # A server of one's own asks for no key; the client insists on having one.
    key = os.environ.get("OPENAI_API_KEY") or "none"
    return AsyncOpenAI(
        base_url=judge.url, api_key=key, timeout=judge.timeout_s, max_retries=judge.retries
    )


def _limiter(judge: Judge) -> Any:
    if not judge.requests_per_minute:
        return contextlib.nullcontext()
    from aiolimiter import AsyncLimiter

    return AsyncLimiter(1, 60 / judge.requests_per_minute)


def _prompt(row: Mapping[str, Any]) -> str:
    golds = " | ".join(gold_answers(row))
    return PROMPT.format(question=row["question"], golds=golds, predicted=row["pred_ans"])


def _key(judge: Judge, prompt: str) -> str:
    return hashlib.sha256(json.dumps([judge.model, prompt]).encode()).hexdigest()


def _read_journal(path: Path) -> dict[str, Verdict]:
    """Verdicts by key; a last line that a crash cut off is forgotten."""
    return {row["key"]: row["verdict"] for row in journal_rows(path)}


def _write(path: Path, judge: Judge, out: Path, rows: list[dict[str, Any]]) -> None:
    write_rows(out, rows)
    known = read_header(path) or {}
    write_json(header_path(out), known | {"judge": {"model": judge.model, "url": judge.url}})
