"""Rewards of a trajectory by dialect, text and ending.

The expected values follow the descriptions of rewards and dialects: stage 1 pays 0.5 for a search
in the right form; stage 2 pays the answer's F1, less 2 for a wrong form. The right answer is Rome.
"""

# ruff: noqa: E501  (a table is read by its columns)

import json

import pytest

from r1s_jax.eval.rewards import reward_file
from r1s_jax.protocol.dialect import Dialect
from r1s_jax.protocol.dialects import make_dialect
from r1s_jax.protocol.solution import Solution
from r1s_jax.protocol.tool_call import HERMES, ToolCall
from r1s_jax.rewards.rules import stage1, stage2
from r1s_jax.rollout.trajectory import Finish

UNFINISHED = [reason for reason in Finish if reason is not Finish.FINISHED]
DOCUMENTS = ["Rome   Rome is the capital of Italy."]
OPENED = HERMES._replace(after=HERMES.after + "<think>\n")  # a template that opens the reasoning


def spoken(name: str) -> Dialect:
    """A dialect from "NAME THINKING [opened]"; with `opened` its template opens the reasoning."""
    dialect, thinking, *opened = name.split()
    return ToolCall(thinking, frame=OPENED) if opened else make_dialect(dialect, thinking)


def spans(dialect: Dialect, text: str) -> tuple[tuple[str, bool], ...]:
    """The spans of a text, with the system's replies for `[found]`, `[none]` and `[told]`."""
    replies = {"[found]": [DOCUMENTS], "[none]": [[]], "[told]": ["that is no search"]}
    parts: list[tuple[str, bool]] = [(text, True)]
    for mark, results in replies.items():
        split = []
        for part, by_policy in parts:
            pieces = part.split(mark) if by_policy else [part]
            for i, piece in enumerate(pieces):
                split += [(dialect.reply(results), False)] * (i > 0)
                split += [(piece, by_policy)] * bool(piece)
        parts = split
    return tuple(parts)


ASK = "<|begin_of_query|> capital of Italy <|end_of_query|>"
LOOK = "<search> capital of Italy </search>"
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "capital"}}\n</tool_call><|im_end|>'
BROKEN = '<tool_call>\n{"name": "search"\n</tool_call><|im_end|>'
# A text and its (stage 1, stage 2, answer, well formed) where the policy ended it, and where it was
# cut off.
# fmt: off
R1 = [
    # text                                                            ended                      cut off
    (" so </think> <answer> Rome </answer>",                         (0.0,  1.0, "Rome", True),  (0.0,  1.0, "Rome", True)),
    (f" hm {ASK}[found] so </think> <answer> Rome </answer>",        (0.5,  1.0, "Rome", True),  (0.5,  1.0, "Rome", True)),
    (f" hm {ASK}[none] so </think> <answer> Rome </answer>",         (0.5,  1.0, "Rome", True),  (0.5,  1.0, "Rome", True)),
    (f" hm {ASK}[found] so </think> <answer> Oslo </answer>",        (0.5,  0.0, "Oslo", True),  (0.5,  0.0, "Oslo", True)),
    (f" hm {ASK}[found] so </think> <answer> Rome or Oslo </answer>", (0.5, 0.5, "Rome or Oslo", True), (0.5, 0.5, "Rome or Oslo", True)),
    (" it may be Rome",                                              (0.0, -2.0, None, False),   (0.0, -2.0, None, False)),
    (" so </think>",                                                 (0.0, -2.0, None, False),   (0.0, -2.0, None, False)),
    (" so </think> <answer> Rome",                                   (0.0, -2.0, None, False),   (0.0, -2.0, None, False)),
    (f" hm {ASK}[found] it may be Rome",                             (0.0, -2.0, None, False),   (0.0, -2.0, None, False)),
    (f" hm {ASK}[found] so </think> <answer> Ro",                    (0.0, -2.0, None, False),   (0.0, -2.0, None, False)),
    (f" hm {ASK}",                                                   (0.0, -2.0, None, False),   (0.0, -2.0, None, False)),
    (f" hm {ASK} so </think> <answer> Rome </answer>",               (0.0, -1.0, "Rome", False), (0.0, -1.0, "Rome", False)),
    (" hm <|end_of_query|>",                                         (0.0, -2.0, None, False),   (0.0, -2.0, None, False)),
    (" <|begin_of_query|> so </think> <answer> Rome </answer>",      (0.0, -1.0, "Rome", False), (0.0, -1.0, "Rome", False)),
    (" <answer> Rome </answer> </think>",                            (0.0, -1.0, "Rome", False), (0.0, -1.0, "Rome", False)),
]
R1_OFF = [
    (" <answer> Rome </answer>",                                     (0.0,  1.0, "Rome", True),  (0.0,  1.0, "Rome", True)),
    (f" {ASK}[found] <answer> Rome </answer>",                       (0.5,  1.0, "Rome", True),  (0.5,  1.0, "Rome", True)),
    (" so </think> <answer> Rome </answer>",                         (0.0, -1.0, "Rome", False), (0.0, -1.0, "Rome", False)),
    (" it may be Rome",                                              (0.0, -2.0, None, False),   (0.0, -2.0, None, False)),
]
SEARCH_R1 = [
    (" so </think> <answer> Rome </answer>",                         (0.0,  1.0, "Rome", True),  (0.0,  1.0, "Rome", True)),
    (f" hm </think> {LOOK}[found]<think> so </think> <answer> Rome </answer>", (0.5, 1.0, "Rome", True), (0.5, 1.0, "Rome", True)),
    (f" hm </think> {LOOK}[found]<think> so </think> <answer> Oslo </answer>", (0.5, 0.0, "Oslo", True), (0.5, 0.0, "Oslo", True)),
    (" it may be Rome",                                              (0.0, -2.0, None, False),   (0.0, -2.0, None, False)),
    (" so </think>",                                                 (0.0, -2.0, None, False),   (0.0, -2.0, None, False)),
    (" so </think> <answer> Rome",                                   (0.0, -2.0, None, False),   (0.0, -2.0, None, False)),
    (f" hm </think> {LOOK}[found]<think> it may be",                 (0.0, -2.0, None, False),   (0.0, -2.0, None, False)),
    (f" hm </think> {LOOK}",                                         (0.0, -2.0, None, False),   (0.0, -2.0, None, False)),
    (" hm </search>[told]<think> so </think> <answer> Rome </answer>", (0.0, -1.0, "Rome", False), (0.0, -1.0, "Rome", False)),
    (f" hm {LOOK}[found]<think> so </think> <answer> Rome </answer>", (0.0, -1.0, "Rome", False), (0.0, -1.0, "Rome", False)),
    (f" hm </think> {LOOK}[found]so </think> <answer> Rome </answer>", (0.0, -1.0, "Rome", False), (0.0, -1.0, "Rome", False)),
]
SEARCH_R1_OFF = [
    ("<answer> Rome </answer>",                                      (0.0,  1.0, "Rome", True),  (0.0,  1.0, "Rome", True)),
    (f"{LOOK}[found]<answer> Rome </answer>",                        (0.5,  1.0, "Rome", True),  (0.5,  1.0, "Rome", True)),
    ("it may be Rome",                                               (0.0, -2.0, None, False),   (0.0, -2.0, None, False)),
]
# Only a complete turn has an answer, so a text that was cut off has none.
CUT = (0.0, -2.0, None, False)
TOOL_CALL = [
    ("<think> so </think> Rome",                                     (0.0,  1.0, "Rome", True),  CUT),
    ("<think> so </think> Rome<|im_end|>",                           (0.0,  1.0, "Rome", True),  CUT),
    (f"<think> hm </think> {CALL}[found]<think> so </think> Rome",   (0.5,  1.0, "Rome", True),  CUT),
    (f"<think> hm </think> {CALL}[found]<think> so </think> Oslo",   (0.5,  0.0, "Oslo", True),  CUT),
    (f"<think> hm </think> {CALL}[found]<think> it may be Rome",     (0.0, -2.0, None, False),   CUT),
    ("<think> it may be Rome",                                       (0.0, -2.0, None, False),   CUT),
    ("<think> so </think>",                                          (0.0, -2.0, None, False),   CUT),
    ("<think> so </think> Ro",                                       (0.0,  0.0, "Ro", True),    CUT),
    ("<think> so </think> Oslo <think> or Rome",                     (0.0, -2.0, None, False),   CUT),
    (f"<think> hm </think> {CALL}",                                  (0.0, -2.0, None, False),   CUT),
    (f"<think> hm </think> {BROKEN}[told]<think> so </think> Rome",  (0.0, -1.0, "Rome", False), CUT),
    (f"<think> hm {CALL}[found]<think> so </think> Rome",            (0.0, -1.0, "Rome", False), CUT),
]
# Reasoning is required with `on`, and allowed with `template`.
WITHOUT_A_THOUGHT = [
    ("Rome",                                                         (0.0,  1.0, "Rome", True),  CUT),
    (f"{CALL}[found]Rome",                                           (0.5,  1.0, "Rome", True),  CUT),
    ("Rome or Oslo",                                                 (0.0,  0.5, "Rome or Oslo", True), CUT),
]
NO_THOUGHT_WHERE_ONE_IS_ASKED_FOR = [
    ("Rome",                                                         (0.0, -1.0, "Rome", False), CUT),
    (f"{CALL}[found]Rome",                                           (0.0, -1.0, "Rome", False), CUT),
]
TOOL_CALL_OFF = [
    ("<think> so </think> Rome",                                     (0.0, -1.0, "Rome", False), CUT),
    ("<think> Rome",                                                 (0.0, -2.0, None, False),   CUT),
]
# The prompt, and every reply, ends inside a thought.
TOOL_CALL_OPENED = [
    (" so </think> Rome",                                            (0.0,  1.0, "Rome", True),  CUT),
    (f" hm </think> {CALL}[found] so </think> Rome",                 (0.5,  1.0, "Rome", True),  CUT),
    (" Rome, Oslo or Bern",                                          (0.0, -2.0, None, False),   CUT),
    (f" hm </think> {CALL}[found] Rome or Oslo",                     (0.0, -2.0, None, False),   CUT),
    (f" hm {CALL}[found] so </think> Rome",                          (0.0, -1.0, "Rome", False), CUT),
]
# fmt: on
OUTCOMES = {
    "r1_searcher template": R1,
    "r1_searcher on": R1,
    "r1_searcher off": R1_OFF,
    "search_r1 template": SEARCH_R1,
    "search_r1 on": SEARCH_R1,
    "search_r1 off": SEARCH_R1_OFF,
    "tool_call template": TOOL_CALL + WITHOUT_A_THOUGHT,
    "tool_call on": TOOL_CALL + NO_THOUGHT_WHERE_ONE_IS_ASKED_FOR,
    "tool_call off": TOOL_CALL_OFF + WITHOUT_A_THOUGHT,
    "tool_call template opened": TOOL_CALL_OPENED,
    "tool_call on opened": TOOL_CALL_OPENED,
}


def worth(dialect: Dialect, text: str, finish: Finish) -> tuple:
    solution = Solution(spans(dialect, text), dialect, finish.complete)
    assert solution.complete == (finish is Finish.FINISHED)
    paid = (stage1(solution, "Rome").value, pytest.approx(stage2(solution, "Rome").value))
    return (*paid, solution.answer, solution.well_formed)


@pytest.mark.parametrize("name", OUTCOMES)
def test_rewards_of_a_trajectory(name):
    dialect = spoken(name)
    for text, ended, cut in OUTCOMES[name]:
        assert worth(dialect, text, Finish.FINISHED) == ended, text
        for reason in UNFINISHED:
            assert worth(dialect, text, reason) == cut, (text, reason)


@pytest.mark.parametrize(
    ("ended", "reward"),
    [
        ({}, 1.0),
        ({"finish": "finished"}, 1.0),
        ({"finish": "length"}, -2.0),
        ({"stop_reason_final": "shot_down"}, -2.0),
    ],
)
def test_rewards_of_a_file_know_how_its_rows_ended(tmp_path, ended, reward):
    row = {"question": "Capital?", "answer": "Rome", "solution": "Rome"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row | ended) + "\n")
    (paid,) = reward_file(tmp_path / "a.jsonl", "stage2", "tool_call")
    assert paid["reward"] == reward
