"""Thoughts and answers in a stream: split as by the dialect, wherever the text is cut."""

import random

import pytest

from r1s_jax.protocol.dialects import make_dialect
from r1s_jax.protocol.solution import Solution
from r1s_jax.serving.pieces import Pieces

R1, SEARCH_R1, TOOL = (make_dialect(name) for name in ("r1_searcher", "search_r1", "tool_call"))
DOCUMENTS = R1.reply([["Rome   A <answer>city</answer> of é"]])
CASES = [
    (
        R1,
        "Question? <think>",
        [
            (" I look. <|begin_of_query|> a b <|end_of_query|>", True),
            (DOCUMENTS, False),
            ("So it < 3 is <b>. </think> <answer> Rome é </answer>", True),
        ],
        "I look. So it < 3 is <b>.",
    ),
    (
        SEARCH_R1,
        "Question?",
        [
            ("<think>one</think>\n<search> a </search>", True),
            (SEARCH_R1.reply([["Rome   A city"]]), False),
            ("<think>two</think>\n<answer>Rome\nas ever</answer>", True),
        ],
        "one\ntwo",
    ),
    (
        TOOL,
        "user: Question?\nassistant:\n",
        [
            (f"<think>hm</think>\n{TOOL.query_call('a')}<|im_end|>", True),
            (TOOL.reply([["Rome   A city"]]), False),
            ("<think>\nyes\n</think>\n\nRome, <i>of course</i>", True),
        ],
        "hm\nyes",
    ),
    (TOOL, "assistant:\n", [("Rome", True)], ""),
]


def split(dialect, prompt: str, spans, cuts: random.Random | None) -> dict[str, str]:
    pieces, out = Pieces(dialect, prompt), {"content": "", "reasoning": ""}

    def hear(new) -> None:
        for kind, text in new:
            out[kind] += text

    for text, by_policy in spans:
        if not by_policy:
            hear(pieces.reply(text))
            continue
        for end in range(1, len(text)):
            if cuts and cuts.random() < 0.6:
                hear(pieces.write(text[:end]))
                # A token may end inside a character.
                hear(pieces.write(text[:end] + "\N{REPLACEMENT CHARACTER}"))
        hear(pieces.write(text, over=True))
    return out


@pytest.mark.parametrize("case", range(len(CASES)))
def test_thoughts_and_answer_are_split_whatever_the_pieces(case):
    dialect, prompt, spans, thoughts = CASES[case]
    whole = split(dialect, prompt, spans, None)
    assert whole["content"] == Solution(tuple(spans), dialect).answer
    assert " ".join(whole["reasoning"].split()) == " ".join(thoughts.split())
    for seed in range(50):
        assert split(dialect, prompt, spans, random.Random(seed)) == whole


def test_without_an_answer_tag_all_text_is_a_thought():
    spans = [(" I think <|begin_of_query|> and that", True)]
    assert split(R1, "<think>", spans, None) == {"content": "", "reasoning": "I think"}
