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
_A_LENGTH = 100  # words that count as 1


class Term(NamedTuple):
    """One of the sum."""

    weight: float
    name: str
    argument: float | None


# (solution, right answers, argument) -> value
TermRule = Callable[[Solution, Sequence[str], float], float]


def queries(solution: Solution) -> list[str]:
    """What the policy asked, in order; turns that ask for nothing that can be searched left out."""
    calls = [call for turn in turns(solution.spans) for call in solution.dialect.calls(turn)]
    return [call.query.casefold() for call in calls if call.query and not call.problem]


def _retrieved_gold(solution: Solution, golds: Sequence[str], _: float) -> float:
    found = [f" {normalize_answer(text)} " for text in solution.found]
    wanted = [f" {gold} " for gold in map(normalize_answer, golds) if gold]
    return float(any(gold in text for text in found for gold in wanted))


def _repeated_queries(solution: Solution, golds: Sequence[str], _: float) -> float:
    asked = queries(solution)
    return float(len(asked) - len(set(asked)))


# Terms beside the rules of the registry: what each is, for messages and pages.
TERMS: dict[str, tuple[TermRule, str]] = {
    "format": (lambda s, g, a: float(format_holds(s)), "1 for the form of the dialect"),
    "searched": (lambda s, g, a: float(searches_answered(s) > 0), "1 for a search that was made"),
    "no_search": (lambda s, g, a: float(searches_answered(s) == 0), "1 for none"),
    "unanswered": (lambda s, g, a: float(s.answer is None), "1 without an answer"),
    "retrieved_gold": (_retrieved_gold, "1 where a right answer stands in a document found"),
    "repeated_queries": (_repeated_queries, "how many queries had been asked before"),
    "searches_over": (
        lambda s, g, a: max(0.0, searches_answered(s) - a),
        "searches more than its argument: searches_over(2)",
    ),
    "words": (
        lambda s, g, a: len(s.written.split()) / _A_LENGTH,
        f"words that the policy wrote, {_A_LENGTH} of them being 1",
    ),
}
_WITH_ARGUMENT = ("searches_over",)


def is_composed(text: str) -> bool:
    """Whether a reward's name is a sum, or one of the terms alone."""
    if text.startswith(("http://", "https://")):  # a reward server's, whatever stands in it
        return False
    return bool(re.search(r"[+*(]|-\s*\w|^\s*-", text)) or text.strip() in TERMS


def parse(text: str, error: type[UserError]) -> list[Term]:
    """The terms of a sum; raises `error` that says where it cannot be read."""
    terms, at = [], 0
    while at < len(text):
        found = _TERM.match(text, at)
        if not found or (terms and not found["sign"]):
            raise error(
                f"reward {text!r}: expected WEIGHT*NAME, added or subtracted, at {text[at:][:30]!r}"
            )
        sign = -1.0 if found["sign"] == "-" else 1.0
        argument = float(found["argument"]) if found["argument"] else None
        terms.append(Term(sign * float(found["weight"] or 1), found["name"], argument))
        at = found.end()
    if not 0 < len(terms) <= _MOST_TERMS:
        raise error(f"reward {text!r}: expected 1 to {_MOST_TERMS} terms, found {len(terms)}")
    if any(abs(term.weight) > _MOST_WEIGHT for term in terms):
        raise error(f"reward {text!r}: a weight is above {_MOST_WEIGHT:g}")
    for term in terms:
        if (term.name in _WITH_ARGUMENT) != (term.argument is not None):
            wanted = "needs a number in brackets" if term.argument is None else "takes no number"
            raise error(f"reward {text!r}: {term.name} {wanted}")
    return terms


def without(terms: Sequence[Term], name: str) -> str:
    """The sum of the other terms, written out."""

    def written(term: Term) -> str:
        argument = "" if term.argument is None else f"({term.argument})"
        sign = "-" if term.weight < 0 else "+"
        return f"{sign} {abs(term.weight)} * {term.name}{argument}"

    return " ".join(written(term) for term in terms if term.name != name)


def composed(text: str, rule: Callable[[str], RewardRule], error: type[UserError]) -> RewardRule:
    """The rule that a sum stands for; `rule` finds those that are no terms of this module.

    Its parts are the usual ones and every term's value, before its weight, by its name.
    """
    terms = parse(text, error)
    rules = {term.name: rule(term.name) for term in terms if term.name not in TERMS}

    def value(term: Term, solution: Solution, golds: Sequence[str]) -> float:
        if term.name in TERMS:
            return TERMS[term.name][0](solution, golds, term.argument or 0.0)
        given = rules[term.name](solution, golds)
        return float(given.value if isinstance(given, Reward) else given)

    def total(solution: Solution, golds: str | Sequence[str]) -> Reward:
        golds = [golds] if isinstance(golds, str) else golds
        values = [value(term, solution, golds) for term in terms]
        parts = {term.name: v for term, v in zip(terms, values, strict=True)}
        whole = sum(term.weight * v for term, v in zip(terms, values, strict=True))
        return Reward(whole, reward_parts(solution, golds) | parts)

    return total
