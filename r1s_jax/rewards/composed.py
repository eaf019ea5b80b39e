"""Rewards that are sums of named terms: `stage2 + 0.2*retrieved_gold - 0.1*repeated_queries`."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from r1s_jax.io.errors import UserError
from r1s_jax.protocol.dialect import turns
from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards.answer_scores import normalize_answer
from r1s_jax.rewards.rules import (
    Reward,
    RewardRule,
    as_reward,
    format_holds,
    reward_parts,
    searches_answered,
)

_NUMBER = r"[0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?"
_NAME = r"[A-Za-z_][\w.]*(?::[A-Za-z_]\w*)?"
_TERM = re.compile(
    rf"\s*(?P<sign>[+-])?\s*(?:(?P<weight>{_NUMBER})\s*\*\s*)?"
    rf"(?P<name>{_NAME})(?:\((?P<argument>{_NUMBER})\))?\s*"
)
_MOST_TERMS, _MOST_WEIGHT = 32, 1e9
_WORDS_PER_UNIT = 100  # the term `words` is 1 for this many


class Term(NamedTuple):
    """One term of a sum."""

    weight: float
    name: str
    argument: float | None


# (solution, right answers, argument) -> value
TermRule = Callable[[Solution, Sequence[str], float], float]


def queries(solution: Solution) -> list[str]:
    """The policy's queries in order, case-folded, without malformed calls."""
    calls = [call for turn in turns(solution.spans) for call in solution.dialect.calls(turn)]
    return [call.query.casefold() for call in calls if call.query and not call.problem]


def _retrieved_gold(solution: Solution, golds: Sequence[str], _: float) -> float:
    documents = [f" {normalize_answer(text)} " for text in solution.found]
    answers = [f" {gold} " for gold in map(normalize_answer, golds) if gold]
    return float(any(answer in document for document in documents for answer in answers))


def _repeated_queries(solution: Solution, golds: Sequence[str], _: float) -> float:
    in_order = queries(solution)
    return float(len(in_order) - len(set(in_order)))


# Terms besides the rules of the registry.
TERMS: dict[str, TermRule] = {
    "format": lambda s, g, a: float(format_holds(s)),
    "searched": lambda s, g, a: float(searches_answered(s) > 0),
    "no_search": lambda s, g, a: float(searches_answered(s) == 0),
    "unanswered": lambda s, g, a: float(s.answer is None),
    "retrieved_gold": _retrieved_gold,  # 1 if a retrieved document holds a right answer
    "repeated_queries": _repeated_queries,  # how many queries repeat an earlier one
    "searches_over": lambda s, g, a: max(0.0, searches_answered(s) - a),
    "words": lambda s, g, a: len(s.written.split()) / _WORDS_PER_UNIT,  # of the policy's text
}
_WITH_ARGUMENT = ("searches_over",)


def is_composed(text: str) -> bool:
    """Whether a reward's name is a sum, or one of the terms alone."""
    if text.startswith(("http://", "https://")):  # a reward server, whatever its URL holds
        return False
    return bool(re.search(r"[+*(]|-\s*\w|^\s*-", text)) or text.strip() in TERMS


def parse(text: str, error: type[UserError]) -> list[Term]:
    """The terms of a sum; raises `error`, which quotes the place, for any other text."""
    terms, at = [], 0
    while at < len(text):
        match = _TERM.match(text, at)
        if not match or (terms and not match["sign"]):
            raise error(
                f"reward {text!r}: expected WEIGHT*NAME, added or subtracted, at {text[at:][:30]!r}"
            )
        sign = -1.0 if match["sign"] == "-" else 1.0
        argument = float(match["argument"]) if match["argument"] else None
        terms.append(Term(sign * float(match["weight"] or 1), match["name"], argument))
        at = match.end()
    if not 0 < len(terms) <= _MOST_TERMS:
        raise error(f"reward {text!r}: expected 1 to {_MOST_TERMS} terms, found {len(terms)}")
    if any(abs(term.weight) > _MOST_WEIGHT for term in terms):
        raise error(f"reward {text!r}: a weight is above {_MOST_WEIGHT:g}")
    for term in terms:
        if (term.name in _WITH_ARGUMENT) != (term.argument is not None):
            rule = "needs a number in brackets" if term.argument is None else "takes no number"
            raise error(f"reward {text!r}: {term.name} {rule}")
    return terms


def without(terms: Sequence[Term], name: str) -> str:
    """The sum of all terms but `name`, as text."""

    def written(term: Term) -> str:
        argument = "" if term.argument is None else f"({term.argument})"
        sign = "-" if term.weight < 0 else "+"
        return f"{sign} {abs(term.weight)} * {term.name}{argument}"

    return " ".join(written(term) for term in terms if term.name != name)


def composed(text: str, rule: Callable[[str], RewardRule], error: type[UserError]) -> RewardRule:
    """The rule of a sum; `rule` resolves the names that are not in TERMS.

    Its parts are the usual ones and the unweighted value of every term by its name.
    """
    terms = parse(text, error)
    rules = {term.name: rule(term.name) for term in terms if term.name not in TERMS}

    def reward(term: Term, solution: Solution, golds: Sequence[str]) -> Reward:
        if term.name in TERMS:
            return Reward(TERMS[term.name](solution, golds, term.argument or 0.0), {})
        return as_reward(rules[term.name](solution, golds))

    def total(solution: Solution, golds: str | Sequence[str]) -> Reward:
        golds = [golds] if isinstance(golds, str) else golds
        rewards = [(term.weight, reward(term, solution, golds)) for term in terms]
        parts = {term.name: r.value for term, (_, r) in zip(terms, rewards, strict=True)}
        turns = [[weight * x for x in r.turns] for weight, r in rewards if r.turns]
        return Reward(
            sum(weight * r.value for weight, r in rewards),
            reward_parts(solution, golds) | parts,
            tuple(map(sum, zip(*turns, strict=True))),
            tuple((weight * w, v) for weight, r in rewards for w, v in r.summands),
        )

    return total
