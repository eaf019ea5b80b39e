"""An LLM judge behind an OpenAI-compatible endpoint: of predictions, and as a term of a reward."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypedDict

from r1s_jax.config import Config, JudgeConfig
from r1s_jax.io.errors import UserError, shorten
from r1s_jax.io.http import without_credentials
from r1s_jax.io.journal import journal_rows
from r1s_jax.io.schema import check
from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards.composed import is_composed, parse, without
from r1s_jax.rewards.registry import BatchReward, RewardError, batch_reward, reward_rule
from r1s_jax.rewards.rules import Reward, RewardRule, reward_parts
from r1s_jax.system.chat_api import ChatApiError, ChatEndpoint, ask_all, check_installed

NAME = "judge"  # the name of the term
Verdict = Literal["True", "False", "unparsable"]
PROMPT = """\
A question was answered by a model. Decide whether its answer means the same as one of the \
correct answers; wording, spelling variants and extra detail that is not wrong do not matter.

Question: {question}
Correct answers: {golds}
Answer of the model: {predicted}

Reply with one word: True if the answer of the model is correct, False if not."""
_VERDICT = re.compile(r"\b(true|false)\b", re.IGNORECASE)
# Fewer failures than this never stop a run, whatever their rate.
_MIN_FAILURES = 3


class JudgeFailure(UserError, RuntimeError):
    """Too many answers got no verdict: a run must stop rather than learn from missing ones."""


class _VerdictRow(TypedDict):
    """A row of the journal of verdicts."""

    key: str
    verdict: Verdict


def parse_verdict(reply: str) -> Verdict:
    """The verdict that a reply names after its thoughts; "unparsable" if it names both or none."""
    words = {word.lower() for word in _VERDICT.findall(reply.rpartition("</think>")[2])}
    return words.pop().capitalize() if len(words) == 1 else "unparsable"


def judge_prompt(question: str, golds: Sequence[str], predicted: str) -> str:
    """The prompt of a judge."""
    return PROMPT.format(question=question, golds=" | ".join(golds), predicted=predicted)


def verdict_key(model: str, prompt: str) -> str:
    """The key of a verdict in the journal."""
    return hashlib.sha256(json.dumps([model, prompt]).encode()).hexdigest()


def read_verdicts(path: Path, error: type[UserError]) -> dict[str, Verdict]:
    """The journal's verdicts by key; removes a last line that a crash cut off."""
    rows = (check(row, _VerdictRow, path, error) for row in journal_rows(path))
    return {row["key"]: row["verdict"] for row in rows}


def ask_judge(
    judge: ChatEndpoint,
    prompts: Mapping[str, str],
    journal: Path,
    on_verdict: Callable[[str, Verdict], None],
) -> str:
    """Sends every prompt; `on_verdict(key, verdict)` is called once the verdict is in the journal.

    Returns the endpoint's last error, "" if every prompt has a reply. Raises ChatApiError.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as file:

        def record(key: str, reply: str) -> None:
            verdict = parse_verdict(reply)
            line = {"key": key, "verdict": verdict, "reply": reply}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            on_verdict(key, verdict)

        return ask_all(judge, prompts, record)


class JudgedReward:
    """A sum of terms, one of which is a judge's verdict: 1 for True, 0 for False.

    A missing answer is wrong; the judge is not asked. Without a verdict, or with one that cannot
    be parsed, the reward is NaN, and nothing is learned from the trajectory.
    """

    reads_questions = True

    def __init__(self, weight: float, others: RewardRule | None, judge: JudgeConfig, journal: Path):
        """`others` are the sum's other terms. Raises ChatApiError without the client's library."""
        check_installed()
        # Without other terms, the usual parts are added: metrics are made of them.
        self._weight = weight
        self._rule = others or (lambda solution, gold: Reward(0.0, reward_parts(solution, gold)))
        self._config, self._journal, self._requests = judge, journal, 0
        self._endpoint = ChatEndpoint(
            judge.url,
            judge.model,
            judge.concurrency,
            judge.requests_per_minute,
            timeout_s=judge.timeout_s,
            retries=judge.retries,
        )
        self._verdicts: dict[str, Verdict] | None = None  # by key; None: journal not yet read

    def __call__(
        self,
        questions: Sequence[str],
        solutions: Sequence[Solution],
        golds: Sequence[Sequence[str]],
    ) -> list[Reward]:
        """The rewards of solutions to questions; raises JudgeFailure if too many get no verdict."""
        verdicts = self._judge(questions, solutions, golds)
        rewards = []
        for verdict, solution, gold in zip(verdicts, solutions, golds, strict=True):
            reward = self._rule(solution, gold)
            value = math.nan if verdict is None else reward.value + self._weight * verdict
            parts = reward.parts | {NAME: math.nan if verdict is None else verdict}
            terms = (*reward.summands, (self._weight, parts[NAME]))
            rewards.append(replace(reward, value=value, parts=parts, terms=terms))
        return rewards

    def _judge(
        self,
        questions: Sequence[str],
        solutions: Sequence[Solution],
        golds: Sequence[Sequence[str]],
    ) -> list[float | None]:
        """1 or 0 per solution; None without a verdict."""
        if self._verdicts is None:
            exists = self._journal.exists()
            rows = read_verdicts(self._journal, JudgeFailure) if exists else {}
            # Unparsable verdicts are requested again: the judge may have been repaired.
            self._verdicts = {key: v for key, v in rows.items() if v != "unparsable"}
        by_key, keys, prompts = self._verdicts, [], {}
        for question, solution, gold in zip(questions, solutions, golds, strict=True):
            if not solution.answer:
                keys.append("")
                continue
            prompt = judge_prompt(question, gold, solution.answer)
            keys.append(verdict_key(self._config.model, prompt))
            if keys[-1] not in by_key:
                prompts[keys[-1]] = prompt
        error = self._ask(prompts)
        verdicts = [by_key.get(key, "unparsable") if key else "False" for key in keys]
        values = [None if v == "unparsable" else float(v == "True") for v in verdicts]
        self._check(values.count(None), sum(map(bool, keys)), len(keys), error)
        return values

    def _ask(self, prompts: dict[str, str]) -> str:
        """Sends prompts; returns the endpoint's last error. Raises JudgeFailure past the limit."""
        most = self._config.most_requests
        if most and self._requests + len(prompts) > most:
            raise JudgeFailure(
                f"the judge was asked {self._requests} times, and judge.most_requests={most} "
                f"allows no {len(prompts)} more: raise it, then go on with --resume"
            )
        self._requests += len(prompts)
        if not prompts:
            return ""
        verdicts = self._verdicts if self._verdicts is not None else {}
        try:
            return ask_judge(self._endpoint, prompts, self._journal, verdicts.__setitem__)
        except ChatApiError as error:
            return str(error)

    def _check(self, failed: int, requested: int, total: int, error: str) -> None:
        """Raises JudgeFailure if too many of the `requested` verdicts are missing."""
        rate = self._config.max_failure_rate
        # A batch without any reward teaches nothing, whatever rate is allowed.
        if (failed >= _MIN_FAILURES and failed > rate * requested) or failed == total > 0:
            why = shorten(error, 150) or "its replies are neither True nor False"
            raise JudgeFailure(
                f"{failed} of {requested} answers got no verdict from "
                f"{without_credentials(self._config.url)} ({why}). The limit is "
                f"judge.max_failure_rate={rate}. Check the judge, then resume."
            )


def stage_reward(name: str, judge: JudgeConfig, journal: Path) -> BatchReward:
    """The batch reward of a stage: that of `batch_reward`, or a sum with the term `judge`.

    Raises RewardError, also if a judge has no judge.url or judge.model.
    """
    if name.strip() != NAME and not is_composed(name):
        return batch_reward(name)
    terms = parse(name, RewardError)
    if not any(term.weight for term in terms):
        raise RewardError(f"reward {name!r}: every weight is 0, which teaches nothing")
    weight = sum(term.weight for term in terms if term.name == NAME)
    if not any(term.name == NAME for term in terms):
        return batch_reward(name)
    if not judge.url or not judge.model:
        raise RewardError(f"reward {name!r} has a judge: name judge.url and judge.model")
    rest = without(terms, NAME)
    return JudgedReward(weight, reward_rule(rest) if rest else None, judge, journal)


def stage_rewards(config: Config, run_dir: Path) -> dict[str, BatchReward]:
    """The batch rewards of the stages that have steps; verdicts go to the run's `judged.jsonl`."""
    journal, stages = run_dir / "judged.jsonl", {"stage1": config.stage1, "stage2": config.stage2}
    return {
        name: stage_reward(stage.reward, config.judge, journal)
        for name, stage in stages.items()
        if stage.steps
    }
