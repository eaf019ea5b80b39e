"""Questions and demonstrations from articles."""

import json

import pytest

from r1s_jax.data.demonstrations import read_demonstrations
from r1s_jax.data.questions import read_questions
from r1s_jax.data.titles import apart, read_articles, title_demonstrations
from r1s_jax.io.journal import DataError
from r1s_jax.protocol.dialects import DIALECTS, make_dialect
from r1s_jax.protocol.solution import Solution
from tests.makers import run_cli

ROWS = [
    {"title": f"Town {i}", "text": f"Town {i} is a town in the county of X{i}. It is old."}
    for i in range(40)
]
ROWS[3] |= {"description": "Market town in Y (1300-1400)"}
ROWS[4] |= {"text": "Nobody knows."}  # without a definition
ROWS[5] |= {"description": "Town"}  # too short an answer


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "articles.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_descriptions_are_answers(corpus):
    articles = {a.title: a for a in read_articles(corpus)}
    assert articles["Town 0"].description == "a town in the county of X0"
    assert articles["Town 3"].description == "Market town in Y"
    assert len(articles) == 38 and not {"Town 4", "Town 5"} & set(articles)


def test_a_table_of_summaries_is_read_alike(corpus, tmp_path):
    table = {str(i): {"title": r["title"], "extract": r["text"]} for i, r in enumerate(ROWS)}
    (tmp_path / "summaries_en.json").write_text(json.dumps(table))
    articles = [(a.title, a.text) for a in read_articles(tmp_path / "summaries_en.json")]
    assert articles[:3] == [(row["title"], row["text"]) for row in ROWS[:3]]


def test_demonstrations_and_questions_share_no_article(corpus):
    articles = read_articles(corpus)
    shown, questions = apart(articles, 10)
    assert len(shown) == 10 and len(questions) == 28 and not set(shown) & set(questions)
    assert apart(articles[::-1], 10)[0] == shown[::-1]
    assert len(apart(articles, 1000)[0]) == 19  # never more than half


@pytest.mark.parametrize("name", list(DIALECTS))
def test_demonstrations_are_well_formed(name, corpus):
    dialect = make_dialect(name)
    demonstrations = title_demonstrations(read_articles(corpus), dialect, searching=0.5)
    searches = 0
    for demonstration in demonstrations:
        spans = [(text, bool(weight)) for text, weight in demonstration.spans]
        spans[-1] = (spans[-1][0].removesuffix(dialect.turn_end), True)
        solution = Solution(tuple(spans), dialect)
        assert solution.well_formed and solution.answer
        searches += solution.searches_answered
    assert 5 < searches < 33


def test_the_command_writes_files_for_recipes(corpus, tmp_path):
    out = tmp_path / "out"
    words = ["data", "from-titles", str(corpus), "--out", str(out), "--demonstrations", "12"]
    done = run_cli(*words)
    assert done.exit_code == 0, done.output
    report = json.loads(done.output.splitlines()[-1])
    assert (report["questions"], report["demonstrations"]) == (26, 12)
    assert len(read_questions(out / "questions.jsonl")) == 26
    assert len(read_demonstrations([out / "demonstrations.jsonl"])) == 12
    assert "exists: choose another folder" in str(run_cli(*words).exception)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"title": "A"}\n', "line 1: title, text, description"),
        ('{"title": "A", "text": "x"}\n', "no article with a description of 3 to 7 words"),
        ("[1]", "JSON"),
    ],
)
def test_a_file_without_articles_is_named(text, message, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_articles(file)
