"""Rewards that are sums: strict parsing, each term by hand, all values in the parts."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1s_jax.protocol.r1_searcher import R1Searcher
from r1s_jax.protocol.search_r1 import SearchR1
from r1s_jax.protocol.solution import Solution
from r1s_jax.protocol.tool_call import ToolCall
from r1s_jax.rewards.composed import TERMS, Term, is_composed, parse
from r1s_jax.rewards.registry import RULES, RewardError, reward_rule

R1 = R1Searcher()
FOUND = R1.reply([["Dune   Frank Herbert wrote it"]])
NOTHING = R1.reply([[]])


def query(text: str) -> str:
    return f" <|begin_of_query|> {text} <|end_of_query|>"


GOOD = Solution(
    (
        (f" I look{query('who wrote Dune')}", True),
        (FOUND, False),
        (f" again{query('Who wrote  Dune')}", True),
        (NOTHING, False),
        (" so </think> <answer> Frank Herbert </answer>", True),
    ),
    R1,
)
GUESS = Solution(((" well </think> <answer> Asimov </answer>", True),), R1)
SILENT = Solution(((" well", True),), R1, complete=False)
GOLD = ["Frank Herbert"]

# (reward, values for GOOD, GUESS and SILENT, which have 13, 5 and 1 words).
CASES = [
    ("stage2", 1.0, 0.0, -2.0),
    ("f1 + 0.5*searched", 1.5, 0.0, 0.0),
    ("em-0.25*no_search", 1.0, -0.25, -0.25),
    ("stage2 + 0.2*retrieved_gold - 0.1*repeated_queries", 1.1, 0.0, -2.0),
    ("-1*unanswered", 0.0, 0.0, -1.0),
    ("format", 1.0, 1.0, 0.0),
    ("2*cover_em - 0.5*searches_over(1)", 1.5, 0.0, 0.0),
    ("-1e-1 * words", -0.001 * 19, -0.001 * 5, -0.001),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_sum_adds_its_terms(case):
    rule, *expected = reward_rule(case[0]), *case[1:]
    for solution, value in zip((GOOD, GUESS, SILENT), expected, strict=True):
        reward = rule(solution, GOLD)
        assert reward.value == pytest.approx(value)
        assert {"answer_f1", "format", "searched"} <= set(reward.parts)


def test_the_url_of_a_reward_server_is_no_sum():
    for name in ("http://reward-server:8000/get_reward", "https://a/b+c*(d)", "stage2", "my_m:f"):
        assert not is_composed(name)
    for name in ("f1 - words", "2*f1", "searched", "searches_over(2)"):
        assert is_composed(name)


def test_every_terms_value_is_in_the_parts():
    rule = reward_rule("stage2 + 0.2*retrieved_gold - 0.1*repeated_queries - 3*searches_over(1)")
    parts = rule(GOOD, "Frank Herbert").parts
    assert parts["stage2"] == 1.0 and parts["retrieved_gold"] == 1.0
    assert parts["repeated_queries"] == 1.0 and parts["searches_over"] == 1.0


def test_a_word_of_the_gold_answer_is_not_the_answer():
    rule = reward_rule("retrieved_gold")
    assert rule(GOOD, ["Frank"]).value == 1.0
    assert rule(GOOD, ["Fran"]).value == 0.0 and rule(GOOD, [""]).value == 0.0
    assert rule(GOOD, ["the Frank Herbert!"]).value == 1.0


@pytest.mark.parametrize("dialect", [R1, SearchR1(), ToolCall()], ids=lambda d: d.name)
def test_only_the_texts_of_documents_count_as_retrieved(dialect):
    """Numbers, the word for no documents, tags and the query of a first search do not count."""
    rule = reward_rule("retrieved_gold")

    def pays(documents, gold, first=""):
        reply = dialect.reply([documents])
        spans = (("I look", True), (reply, False)) if not first else ((first + reply, False),)
        return rule(Solution((*spans, ("so", True)), dialect), [gold]).value

    lines = ["Dune   Frank Herbert wrote it.", "Oslo (city)   3 rivers\nand (4) hills"]
    for gold in ("Dune", "Frank Herbert", "Oslo city", "3", "4", "hills"):
        assert pays(lines, gold) == 1.0, gold
    for gold in ("2", "1", "Doc", "Title", "None", "documents", "information", "response", "user"):
        assert pays(lines, gold) == 0.0, gold
    assert pays([], "None") == 0.0
    assert pays(lines, "it Oslo") == 0.0  # spans two documents
    first_search = dialect.first_call("who wrote Emma")
    assert pays(lines, "Emma", first_search) == 0.0 and pays(lines, "Dune", first_search) == 1.0
    if dialect.can_tell_invalid:
        assert pays("the call was no JSON", "JSON") == pays("no call", "search") == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stage2 +", "expected WEIGHT"),
        ("stage2 + f1 stage1", "at 'stage1'"),
        ("0.2**f1", "expected WEIGHT"),
        ("f1 * 0.2", "expected WEIGHT"),
        ("stage2 + nonsense", "no reward 'nonsense'"),
        ("searches_over + 1*f1", "needs a number"),
        ("words(3)", "takes no number"),
        ("1e400*f1", "a weight is above 1e+09"),
        ("\u0663*f1", "expected WEIGHT"),
        ("f1 + __import__('os').system('x')", "expected WEIGHT"),
        ("f1 + " + "f1 + " * 40 + "f1", "terms"),
        ("", "no reward"),
    ],
)
def test_invalid_sums_are_named(text, words):
    with pytest.raises(RewardError, match=re.escape(words)):
        reward_rule(text)(GOOD, GOLD)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 9, allow_subnormal=False).map(lambda x: round(x, 3)),
            st.sampled_from([*RULES, *(t for t in TERMS if t != "searches_over")]),
            st.booleans(),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_a_written_sum_is_parsed_unchanged(terms):
    text = " ".join(f"{'-' if minus else '+'} {weight} * {name}" for weight, name, minus in terms)
    expected = [Term(-weight if minus else weight, name, None) for weight, name, minus in terms]
    assert parse(text, RewardError) == expected


def test_a_users_function_may_be_a_term(tmp_path, monkeypatch):
    (tmp_path / "my_terms.py").write_text("def short(solution, golds):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path)
    assert reward_rule("f1 - 2*my_terms:short")(GOOD, GOLD).value == pytest.approx(0.0)


def test_turns_are_rewarded_and_add_up_in_a_sum(tmp_path, monkeypatch):
    (tmp_path / "my_turns.py").write_text(
        "from r1s_jax.rewards import Reward\n\n\n"
        "def good(solution, golds):\n"
        "    return Reward(1.0, {}, turns=[0.5] * solution.turns_answered)\n\n\n"
        "def long(solution, golds):\n"
        "    return Reward(1.0, {}, turns=(1, 2, 3))\n\n\n"
        "def broken(solution, golds):\n"
        "    return Reward(1.0, {}, turns=[float('nan')] * solution.turns_answered)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert GOOD.turns_answered == 2
    assert reward_rule("my_turns:good")(GOOD, GOLD).turns == (0.5, 0.5)
    mixed = reward_rule("f1 + 2*my_turns:good - 0.5*my_turns:good")(GOOD, GOLD)
    assert mixed.turns == pytest.approx((0.75, 0.75))
    assert reward_rule("f1")(GOOD, GOLD).turns == ()
    with pytest.raises(RewardError, match="gave 3 turn rewards for 2 answered turns"):
        reward_rule("my_turns:long")(GOOD, GOLD)
    with pytest.raises(RewardError, match="gave nan"):
        reward_rule("my_turns:broken")(GOOD, GOLD)


def test_the_terms_of_a_sum_and_of_stage2_are_known_one_by_one():
    assert reward_rule("f1")(GOOD, GOLD).summands == ((1.0, 1.0),)
    assert reward_rule("stage2")(SILENT, GOLD).terms == ((1.0, 0.0), (1.0, -2.0))
    reward = reward_rule("2*stage2 - 0.5*searched")(GOOD, GOLD)
    assert reward.terms == ((2.0, 1.0), (2.0, 0.0), (-0.5, 1.0))
    assert sum(weight * value for weight, value in reward.terms) == pytest.approx(reward.value)
