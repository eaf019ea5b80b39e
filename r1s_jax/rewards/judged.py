"""A model behind an OpenAI-compatible endpoint as judge: of predictions, and as a reward's term."""

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

NAME = "judge"  # of the term
Verdict = Literal["True", "False", "unparsable"]
PROMPT = """\
A question was answered by a model. Decide whether its answer means the same as one of the \
correct answers; wording, spelling variants and extra detail that is not wrong do not matter.

Question: {question}
Correct answers: {golds}
Answer of the model: {predicted}

Reply with one word: True if the answer of the model is correct, False if not."""
_VERDICT = re.compile(r"\b(true|false)\b", re.IGNORECASE)
# Fewer failures than this stop nothing, whatever their share.
_MIN_FAILURES = 3


class JudgeFailure(UserError, RuntimeError):
    """Too many answers got no verdict: a run must stop rather than learn from missing ones."""


class _VerdictRow(TypedDict):
    """A row of the journal."""

    key: str
    verdict: Verdict


def parse_verdict(reply: str) -> Verdict:
    """The one verdict that a reply names, after any thoughts; both or neither is no verdict."""
    said = {word.lower() for word in _VERDICT.findall(reply.rpartition("</think>")[2])}
    return said.pop().capitalize() if len(said) == 1 else "unparsable"


def judge_prompt(question: str, golds: Sequence[str], predicted: str) -> str:
    """What a judge is asked."""
    return PROMPT.format(question=question, golds=" | ".join(golds), predicted=predicted)


def verdict_key(model: str, prompt: str) -> str:
    """By which a verdict is known again."""
    return hashlib.sha256(json.dumps([model, prompt]).encode()).hexdigest()


def read_verdicts(path: Path, error: type[UserError]) -> dict[str, Verdict]:
    """The journal's verdicts by key; a last line that a crash cut off is forgotten."""
    rows = (check(row, _VerdictRow, path, error) for row in journal_rows(path))
    return {row["key"]: row["verdict"] for row in rows}


def ask_judge(
    judge: ChatEndpoint,
    prompts: Mapping[str, str],
    journal: Path,
    told: Callable[[str, Verdict], None],
) -> str:
    """Asks each prompt by its key; every verdict is in the journal before `told` hears of it.

    Returns what the endpoint last said where it gave none. Raises ChatApiError.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as file:

        def record(key: str, reply: str) -> None:
            verdict = parse_verdict(reply)
            line = {"key": key, "verdict": verdict, "reply": reply}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            told(key, verdict)

        return ask_all(judge, prompts, record)


class JudgedReward:
    """A sum of terms one of which is a judge's verdict: 1 for True, 0 for False.

    An answer that is missing is wrong without being asked about. Where no verdict comes, or one
    that cannot be read, the reward is not a number, and nothing is learned from the trajectory.
    """

    reads_questions = True

    def __init__(self, weight: float, others: RewardRule | None, judge: JudgeConfig, journal: Path):
        """`others` are the sum's other terms. Raises ChatApiError without the client's library."""
        check_installed()
        # The judge alone has the usual parts beside it, which metrics are made of.
        self._weight = weight
        self._rule = others or (lambda solution, gold: Reward(0.0, reward_parts(solution, gold)))
        self._config, self._journal, self._made = judge, journal, 0
        self._endpoint = ChatEndpoint(
            judge.url,
            judge.model,
            judge.concurrency,
            judge.requests_per_minute,
            timeout_s=judge.timeout_s,
            retries=judge.retries,
        )
        self._known: dict[str, Verdict] | None = None

    def __call__(
        self,
        questions: Sequence[str],
        solutions: Sequence[Solution],
        golds: Sequence[Sequence[str]],
    ) -> list[Reward]:
        """The rewards of solutions to questions; raises JudgeFailure past a rate of failures."""
        verdicts = self._judge(questions, solutions, golds)
        rewards = []
        for verdict, solution, gold in zip(verdicts, solutions, golds, strict=True):
            reward = self._rule(solution, gold)
            value = math.nan if verdict is None else reward.value + self._weight * verdict
            parts = reward.parts | {NAME: math.nan if verdict is None else verdict}
            rewards.append(replace(reward, value=value, parts=parts))
        return rewards

    def _judge(
        self,
        questions: Sequence[str],
        solutions: Sequence[Solution],
        golds: Sequence[Sequence[str]],
    ) -> list[float | None]:
        """1, 0, or None where there is no verdict."""
        if self._known is None:
            exists = self._journal.exists()
            told = read_verdicts(self._journal, JudgeFailure) if exists else {}
            # A reply that could not be read is asked for again: the judge may have been mended.
            self._known = {key: verdict for key, verdict in told.items() if verdict != "unparsable"}
        known, keys, prompts = self._known, [], {}
        for question, solution, gold in zip(questions, solutions, golds, strict=True):
            if not solution.answer:
                keys.append("")
                continue
            prompt = judge_prompt(question, gold, solution.answer)
            keys.append(verdict_key(self._config.model, prompt))
            if keys[-1] not in known:
                prompts[keys[-1]] = prompt
        said = self._ask(prompts)
        verdicts = [known.get(key, "unparsable") if key else "False" for key in keys]
        values = [None if v == "unparsable" else float(v == "True") for v in verdicts]
        self._check(values.count(None), sum(map(bool, keys)), len(keys), said)
        return values

    def _ask(self, prompts: dict[str, str]) -> str:
        """Every new prompt, as far as the limit goes."""
        most = self._config.most_requests
        if most and self._made + len(prompts) > most:
            raise JudgeFailure(
                f"the judge was asked {self._made} times, and judge.most_requests={most} allows no "
                f"{len(prompts)} more: raise it, then go on with --resume"
            )
        self._made += len(prompts)
        if not prompts:
            return ""
        known = self._known if self._known is not None else {}
        try:
            return ask_judge(self._endpoint, prompts, self._journal, known.__setitem__)
        except ChatApiError as error:
            return str(error)

    def _check(self, failed: int, asked: int, all_of_them: int, said: str) -> None:
        rate = self._config.max_failure_rate
        # A batch without a single reward teaches nothing, whatever rate is allowed.
        if (failed >= _MIN_FAILURES and failed > rate * asked) or failed == all_of_them > 0:
            why = shorten(said, 150) or "its replies are neither True nor False"
            raise JudgeFailure(
                f"{failed} of {asked} answers got no verdict from "
                f"{without_credentials(self._config.url)} ({why}). The limit is "
                f"judge.max_failure_rate={rate}. Check the judge, then resume."
            )


def stage_reward(name: str, judge: JudgeConfig, journal: Path) -> BatchReward:
    """What rewards the batches of a stage: see `batch_reward`, and a sum with the term `judge`.

    Raises RewardError, also for a judge of which the recipe does not say where it is.
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
    """By the name of each stage that has steps; the judge's verdicts are kept in the run."""
    journal, stages = run_dir / "judged.jsonl", {"stage1": config.stage1, "stage2": config.stage2}
    return {
        name: stage_reward(stage.reward, config.judge, journal)
        for name, stage in stages.items()
        if stage.steps
    }
