"""LLM-as-judge over any OpenAI-compatible endpoint: is a prediction right, given the gold answers?

Verdicts go to a journal as they arrive, so that a stopped or partly failed run resumes from it; the
judged file is written at the end, with its rows in their order.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from r1s_jax.data.results import FORMAT, VERDICTS, read_header, read_results, write_header
from r1s_jax.data.rows import gold_answers
from r1s_jax.io.errors import shorten
from r1s_jax.io.http import without_credentials
from r1s_jax.io.journal import DataError
from r1s_jax.rewards.judged import (
    PROMPT,
    Verdict,
    ask_judge,
    judge_prompt,
    parse_verdict,
    read_verdicts,
    verdict_key,
)
from r1s_jax.system.chat_api import ChatApiError, ChatEndpoint, check_installed
from r1s_jax.system.files import write_rows
from r1s_jax.system.locks import only_one

__all__ = ["PROMPT", "JudgeError", "Verdict", "judge_file", "parse_verdict"]


class JudgeError(ChatApiError):
    """The endpoint gave no verdict on some rows; the other verdicts are kept."""


def judge_file(
    path: Path,
    judge: ChatEndpoint,
    out: Path,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, int]:
    """Writes the rows of `path` with `judge` ("True", "False" or "unparsable") to `out`.

    Rows with the same prompt are judged once. `OUT.verdicts.jsonl` is the journal. Returns how
    often each verdict occurs. Raises DataError for a broken row; JudgeError, after writing `out`
    with the verdicts there are, if some rows have none.
    """
    if out.resolve() == path.resolve():
        raise DataError(f"{out} is the file to judge: name another for its verdicts")
    with only_one(out, "the judged file"):
        return _judge_file(path, judge, out, progress)


def _judge_file(
    path: Path, judge: ChatEndpoint, out: Path, progress: Callable[[int, int], None]
) -> dict[str, int]:
    rows = read_results(path)
    check_installed()
    keys = [verdict_key(judge.model, _prompt(row)) for row in rows]
    prompts = dict(zip(keys, map(_prompt, rows), strict=True))
    journal = out.with_name(out.name + ".verdicts.jsonl")
    verdicts = read_verdicts(journal, DataError)
    missing = {key: prompt for key, prompt in prompts.items() if key not in verdicts}
    error = ""
    try:

        def note(key: str, verdict: Verdict) -> None:
            verdicts[key] = verdict
            missing.pop(key)
            progress(len(prompts) - len(missing), len(prompts))

        error = ask_judge(judge, dict(missing), journal, note)
    finally:
        # Without any verdict nothing is written, since `out` may be the file of another judge.
        if any(key in verdicts for key in keys):
            pairs = zip(rows, keys, strict=True)
            _write(path, judge, out, [_judged(row, verdicts.get(key)) for row, key in pairs])
    if missing:
        missed = sum(key in missing for key in keys)
        raise JudgeError(
            f"{missed} of {len(rows)} rows have no verdict: {without_credentials(judge.url)} gave "
            f"none ({shorten(error, 150)}). The others are kept; run the same command again"
        )
    return dict(Counter(verdicts[key] for key in keys))


def _judged(row: dict[str, Any], verdict: Verdict | None) -> dict[str, Any]:
    """The row without its scores, with its verdict and no verdict of another judge."""
    row = {name: value for name, value in row.items() if name not in (*VERDICTS, "scores")}
    return row if verdict is None else row | {"judge": verdict}


def _prompt(row: Mapping[str, Any]) -> str:
    return judge_prompt(row["question"], gold_answers(row), row["pred_ans"])


def _write(path: Path, judge: ChatEndpoint, out: Path, rows: list[dict[str, Any]]) -> None:
    write_rows(out, rows)
    header = read_header(path) or {"format": FORMAT}
    write_header(
        out,
        header | {"judge": {"model": judge.model, "url": without_credentials(judge.url)}},
    )
