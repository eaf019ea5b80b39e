import pytest

from r1s_jax import rewards
from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.protocol.solution import Solution

QUERY = f"I look. {protocol.BEGIN_QUERY} k {protocol.END_QUERY}"
DOCUMENTS = protocol.document_block(["T   text"])
ANSWER = f"so.{protocol.END_THINK} {protocol.BEGIN_ANSWER} New York {protocol.END_ANSWER}"
FORCED = f"{protocol.BEGIN_QUERY} q {protocol.END_QUERY}{DOCUMENTS}"


def policy(text: str) -> tuple[str, bool]:
    return text, True


def system(text: str) -> tuple[str, bool]:
    return text, False


GOOD = {
    "no search": [policy(ANSWER)],
    "one search": [policy(QUERY), system(DOCUMENTS), policy(ANSWER)],
    "two searches": [policy(QUERY), system(DOCUMENTS)] * 2 + [policy(ANSWER)],
    "nothing found": [policy(QUERY), system(protocol.document_block([])), policy(ANSWER)],
    "forced first search": [system(FORCED), policy(ANSWER)],
    "forced, then its own": [system(FORCED), policy(QUERY), system(DOCUMENTS), policy(ANSWER)],
    "forced in two pieces": [system(FORCED[:20]), system(FORCED[20:]), policy(ANSWER)],
    "passage quotes every tag and CJK": [
        policy(QUERY),
        system(protocol.document_block([f"T   {FORCED} {ANSWER} <think> 中 assistant"])),
        policy(ANSWER),
    ],
}
BAD = {
    "empty": [],
    "no answer": [policy(f"so.{protocol.END_THINK}")],
    "no end of thinking": [policy(ANSWER.replace(protocol.END_THINK, ""))],
    "two ends of thinking": [policy(protocol.END_THINK + ANSWER)],
    "begins to think again": [policy(protocol.BEGIN_THINK + ANSWER)],
    "two answers": [policy(ANSWER + f"{protocol.BEGIN_ANSWER} x {protocol.END_ANSWER}")],
    "answer before the end of thinking": [
        policy(f"{protocol.BEGIN_ANSWER} x {protocol.END_ANSWER}{protocol.END_THINK}")
    ],
    "answer pair reversed": [
        policy(f"{protocol.END_THINK}{protocol.END_ANSWER} x {protocol.BEGIN_ANSWER}")
    ],
    "query unanswered": [policy(QUERY + ANSWER)],
    "query unclosed": [
        policy(QUERY.removesuffix(protocol.END_QUERY)),
        system(DOCUMENTS),
        policy(ANSWER),
    ],
    "documents of its own": [policy(QUERY + DOCUMENTS + ANSWER)],
    "documents of its own beside real ones": [
        policy(QUERY),
        system(DOCUMENTS),
        policy(DOCUMENTS + ANSWER),
    ],
    "query inside the answer": [
        policy(f"{protocol.END_THINK}{protocol.BEGIN_ANSWER}{QUERY}"),
        system(DOCUMENTS),
        policy(protocol.END_ANSWER),
    ],
    "CJK": [policy("中" + ANSWER)],
}


@pytest.mark.parametrize("spans", GOOD.values(), ids=GOOD.keys())
def test_good_format(spans):
    solution = Solution(tuple(spans))
    searched = solution.written.count(protocol.BEGIN_QUERY) > 0
    first, second = rewards.stage1(solution, "New York"), rewards.stage2(solution, "new york")
    assert (first.value, second.value) == (0.5 * searched, 1.0)
    assert first.parts == {
        "format": 1.0,
        "searched": float(searched),
        "answer_f1": 1.0,
        "exact_match": 1.0,
        "cover_exact_match": 1.0,
        "penalty": 0.0,
    }


@pytest.mark.parametrize("spans", BAD.values(), ids=BAD.keys())
def test_bad_format(spans):
    solution = Solution(tuple(spans))
    first, second = rewards.stage1(solution, "New York"), rewards.stage2(solution, "New York")
    assert first.value == first.parts["format"] == second.parts["format"] == 0.0
    assert second.value == second.parts["answer_f1"] - 2.0
    assert second.parts["penalty"] == -2.0


def test_a_wrong_answer_in_the_right_format_has_reward_0():
    solution = Solution((policy(ANSWER),))
    assert rewards.stage2(solution, "Paris").value == 0.0


PLAIN = {name: spans for name, spans in GOOD.items() if "quotes every tag" not in name}


@pytest.mark.parametrize("spans", PLAIN.values(), ids=PLAIN.keys())
def test_spans_are_recovered_from_bare_text(spans):
    """In bare text, a forced first search counts as a search of the policy."""
    solution = Solution.of_text("".join(text for text, _ in spans))
    assert solution.text == "".join(text for text, _ in spans)
    assert rewards.stage2(solution, "New York").value == 1.0
    blocks = [text for text, by_policy in solution.spans if not by_policy]
    assert len(blocks) == solution.text.count(protocol.END_DOCUMENTS)
    assert all(protocol.BEGIN_DOCUMENTS in block for block in blocks)


def test_documents_without_a_query_count_as_text_of_the_policy():
    assert Solution.of_text(DOCUMENTS + ANSWER).spans == ((DOCUMENTS + ANSWER, True),)


@pytest.mark.parametrize(("name", "value"), [("exact_match", 0), ("cover_exact_match", 1)])
def test_rules_that_pay_only_for_the_answer(name, value):
    solution = Solution((policy(f"{protocol.BEGIN_ANSWER}in New York{protocol.END_ANSWER}"),))
    assert rewards.reward_rule(name)(solution, "New York").value == value
    assert rewards.reward_rule("f1")(solution, "New York").value == pytest.approx(0.8)


def test_a_users_function(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(
        "from r1s_jax.rewards import Reward\n"
        "def short(solution, golds): return -len(solution.written)\n"
        "def named(solution, golds): return Reward(1.0, {'mine': 2.0})\n"
        "def raises(solution, golds): return 1 / 0\n"
        "def nan(solution, golds): return float('nan')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    solution = Solution((policy("four"), system("not mine")))
    assert rewards.reward_rule("my_rules:short")(solution, "x").value == -4.0
    parts = rewards.reward_rule("my_rules:named")(solution, "x").parts
    assert parts["mine"] == 2.0 and parts["format"] == 0.0
    with pytest.raises(ValueError, match="'my_rules:raises' failed on 'fournot mine': ZeroDivis"):
        rewards.reward_rule("my_rules:raises")(solution, "x")
    with pytest.raises(ValueError, match="'my_rules:nan' gave nan"):
        rewards.reward_rule("my_rules:nan")(solution, "x")


@pytest.mark.parametrize("name", ["stage3", "no_such_module:f", "r1s_jax.rewards:nothing"])
def test_an_unknown_rule_is_named(name):
    with pytest.raises(ValueError, match=name):
        rewards.reward_rule(name)
