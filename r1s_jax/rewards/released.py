"""The rewards of R1-Searcher's three released reward servers, reproduced exactly.

Like the servers, they judge the whole text after the prompt, retrieved passages included: use them
to repeat a published run. The default rules (`rewards.stage1`, `rewards.stage2`) judge only the
policy's text.
"""

import re
from collections.abc import Sequence

from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards.answer_scores import released_cover_exact_match, released_f1
from r1s_jax.rewards.rules import Reward, has_cjk

_DOCUMENTS = re.compile(
    re.escape(protocol.BEGIN_DOCUMENTS) + ".*?" + re.escape(protocol.END_DOCUMENTS), re.DOTALL
)
# Every search has each of these once.
_PER_SEARCH = (
    protocol.BEGIN_DOCUMENTS + "\n",
    protocol.END_DOCUMENTS + "\n\n",
    protocol.BEGIN_QUERY,
    protocol.END_QUERY,
    protocol.BEGIN_DOCUMENTS,
    protocol.END_DOCUMENTS,
    protocol.BEGIN_DOCUMENTS + "\n(1)",
)
_FORBIDDEN = ("Assistant", "assistant")
_NOT_IN_ANSWER = ("begin_of_query", "begin_of_documents")
_MOST_WORDS = 10


def _searches(text: str) -> int | None:
    """The number of searches in the text; None if the counts of _PER_SEARCH differ."""
    counts = {text.count(mark) for mark in _PER_SEARCH}
    return counts.pop() if len(counts) == 1 else None


def _thought_once(text: str) -> bool:
    return text.count(protocol.BEGIN_THINK) == 0 and text.count(protocol.END_THINK) == 1


def _answered_once(text: str) -> bool:
    return text.count(protocol.BEGIN_ANSWER) == text.count(protocol.END_ANSWER) == 1


def _answer(text: str) -> str | None:
    """The text from the last opening tag to the next closing one; None unless both tags occur."""
    if protocol.BEGIN_ANSWER not in text or protocol.END_ANSWER not in text:
        return None
    return text.rpartition(protocol.BEGIN_ANSWER)[2].partition(protocol.END_ANSWER)[0].strip()


def _foreign(text: str) -> bool:
    """Whether Chinese characters stand outside the document blocks."""
    return has_cjk(_DOCUMENTS.sub("", text))


def _reward(value: float, solution: Solution, golds: str | Sequence[str], valid: bool) -> Reward:
    answer = _answer(solution.text)
    f1 = 0.0 if answer is None else released_f1(answer, golds)
    covered = answer is not None and released_cover_exact_match(answer, golds)
    searched = float(bool(_searches(solution.text)))
    parts = {"format": float(valid), "searched": searched, "answer_f1": f1}
    return Reward(value, parts | {"cover_exact_match": float(covered)})


def qwen_zero(solution: Solution, golds: str | Sequence[str]) -> Reward:
    """Answer F1, less 2 if the format is broken in any way; for the Qwen2.5-7B base runs."""
    text, answer = solution.text, _answer(solution.text)
    valid = (
        _searches(text) is not None
        and _thought_once(text)
        and _answered_once(text)
        and not any(word in text for word in _FORBIDDEN)
        and answer is not None
        and not any(tag in answer for tag in _NOT_IN_ANSWER)
        and len(answer.split()) <= _MOST_WORDS
        and not _foreign(text)
    )
    f1 = 0.0 if answer is None else released_f1(answer, golds)
    return _reward(f1 - (0.0 if valid else 2.0), solution, golds, valid)


def llama_stage1(solution: Solution, golds: str | Sequence[str]) -> Reward:
    """1 if the answer covers a gold one, else -1; plus 0.5 for a search and 0.5 for the format."""
    text, answer = solution.text, _answer(solution.text)
    hit = answer is not None and released_cover_exact_match(answer, golds)
    searched = (_searches(text) or 0) >= 1
    valid = _thought_once(text) and _answered_once(text)
    value = (1.0 if hit else -1.0) + 0.5 * searched + 0.5 * valid
    return _reward(value, solution, golds, valid)


def llama_stage2(solution: Solution, golds: str | Sequence[str]) -> Reward:
    """Answer F1, less 1 if the format is broken; for the Llama-3.1-8B-Instruct runs."""
    text, answer = solution.text, _answer(solution.text)
    valid = (
        _searches(text) is not None
        and _thought_once(text)
        and _answered_once(text)
        and not _foreign(text)
    )
    f1 = 0.0 if answer is None else released_f1(answer, golds)
    return _reward(f1 - (0.0 if valid else 1.0), solution, golds, valid)
