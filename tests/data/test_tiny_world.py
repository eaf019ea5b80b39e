import numpy as np
import pytest

from r1s_jax import rewards
from r1s_jax.config import TinyWorldConfig, override
from r1s_jax.configs import tiny_world
from r1s_jax.data.tiny_search import Forgetful
from r1s_jax.data.tiny_world import (
    EOS,
    PROMPT,
    RELATIONS,
    TEACHER,
    TRADES,
    TinyWorld,
    build_tokenizer,
)
from r1s_jax.io.errors import ConfigError
from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.retrieval.encoder import HashEncoder
from r1s_jax.retrieval.index import build_index


@pytest.fixture(scope="module")
def world() -> TinyWorld:
    return TinyWorld((0, 1, 2), num_people=200)


@pytest.fixture(scope="module")
def questions(world):
    return world.questions(120)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def texts_of(world, questions) -> list[str]:
    """All texts that occur in a world, except document blocks."""
    two_hop = [q for q in questions if q.hops == 2]
    demonstrations = [world.demonstration(q, s) for q in questions for s in ("guess", "search")]
    demonstrations += [world.demonstration(q, "search_then_guess") for q in two_hop]
    return [
        *(passage.line for passage in world.passages),
        *(PROMPT.replace("{question}", q.question) for q in questions),
        *(text for spans in demonstrations for text, trained in spans if trained),
    ]


def read_answer(world, question) -> list[str]:
    """All possible answers to a question, from its words and the passages alone."""
    words = question.question.removesuffix("?").split(" of ")
    relations = [part.split()[-1] for part in words[:-1]]
    subjects = [words[-1]]
    for relation in reversed(relations):
        pages = [p.text.removesuffix(".") for p in world.passages if p.title in subjects]
        facts = [fact.split() for page in pages for fact in page.partition(" has ")[2].split(", ")]
        subjects = [value for name, value in facts if name == relation]
    return subjects


def test_a_world_follows_from_its_key(world, questions):
    again = TinyWorld((0, 1, 2), num_people=200)
    assert again.passages == world.passages
    assert again.questions(120) == questions
    assert all(
        again.demonstration(q, "guess") == world.demonstration(q, "guess") for q in questions
    )
    for key in [(1, 1, 2), (0, 0, 2), (0, 1, 3), (0, 1)]:
        other = TinyWorld(key, num_people=200)
        assert not {p.line for p in other.passages} & {p.line for p in world.passages}


def test_each_question_has_one_answer(world, questions):
    world.check()
    assert len({q.id for q in questions}) == len({q.question for q in questions}) == 120
    assert [q.hops for q in questions].count(2) == 60
    for question in questions:
        assert read_answer(world, question) == list(question.answers)


@pytest.mark.parametrize("num_people", [3, 10])
def test_all_questions_of_a_small_world(num_people):
    world = TinyWorld((7,), num_people)
    world.check()
    questions = world.questions(num_people * 2 * len(RELATIONS))
    assert len({q.question for q in questions}) == len(questions)
    for question in questions:
        assert read_answer(world, question) == list(question.answers)
        assert question.answers[0] not in question.question  # no person leads to itself
    with pytest.raises(ValueError, match="of each kind"):
        world.questions(len(questions) + 2)


def test_memorised_people_are_the_same_in_every_world():
    worlds = [TinyWorld((0, 1, step), 60, TinyWorldConfig(memorised_people=5)) for step in (2, 3)]
    for world in worlds:
        world.check()
        for question in (questions := world.questions(40, memorised_fraction=0.3)):
            assert read_answer(world, question) == list(question.answers)
            assert (question.hops == 0) == question.memorised
        assert sum(q.memorised for q in questions) == 12
        assert [q.hops for q in questions].count(2) == 14
        memorised = world.known_questions()
        assert len(memorised) == 5 * len(RELATIONS) and all(q.memorised for q in memorised)
        assert sum(q.memorised for q in world.questions(100, memorised_fraction=0.5)) == len(
            memorised
        )
        for question in memorised:
            from_memory = world.demonstration(question, "guess")
            assert rewards.stage2(rewards.Solution(from_memory), question.answers).value == 1.0
            looked_up = rewards.Solution(world.demonstration(question, "search"))
            assert rewards.searches_answered(looked_up) == 1
            assert rewards.stage2(looked_up, question.answers).value == 1.0
    first, second = worlds
    assert [(q.question, q.answers) for q in first.known_questions()] == [
        (q.question, q.answers) for q in second.known_questions()
    ]
    assert {p.line for p in first.passages} & {p.line for p in second.passages} == {
        person.passage for person in first.known
    }


def test_check_detects_a_name_used_twice():
    world = TinyWorld((7,), 5)
    world.places[0] = world.people[0].name
    with pytest.raises(ValueError, match="two things"):
        world.check()


def test_a_world_of_more_people_than_names_is_refused():
    with pytest.raises(ValueError, match="46,656 names"):
        TinyWorld((0,), 25_000)


def test_a_world_needs_three_people():
    with pytest.raises(ValueError, match="at least 3 people"):
        TinyWorld((0,), 2)


def test_searching_demonstrations_get_full_reward(world, questions):
    for question in questions:
        solution = rewards.Solution(world.demonstration(question, "search"))
        assert rewards.searches_answered(solution) == question.hops
        assert rewards.stage1(solution, question.answers).value == 0.5
        assert rewards.stage2(solution, question.answers).value == 1.0
        assert solution.text.endswith(EOS)


def test_only_documents_are_untrained_and_they_match_the_query(world, questions):
    line_of = {passage.title: passage.line for passage in world.passages}
    for question in questions:
        spans = world.demonstration(question, "search")
        # Each hop is a turn, its documents, and the restated fact; the answer comes last.
        for (turn, trained), (documents, documents_trained), (fact, fact_trained) in zip(
            spans[:-1:3], spans[1::3], spans[2::3], strict=True
        ):
            assert fact.startswith(" Found ") and fact_trained
            name, relation = protocol.extract_query(turn).split()
            assert trained and not documents_trained and relation in RELATIONS
            assert documents == protocol.document_block([line_of[name]])


def test_guesses_are_well_formed_of_the_right_kind_and_mostly_wrong(world, questions):
    kinds = {"birthplace": world.places, "trade": TRADES, TEACHER: [p.name for p in world.people]}
    scores = []
    for question in questions:
        style = "search_then_guess" if question.hops == 2 else "guess"
        solution = rewards.Solution(world.demonstration(question, style))
        reward = rewards.stage2(solution, question.answers)
        assert reward.parts["format"] == 1.0
        assert rewards.searches_answered(solution) == question.hops - 1
        relation = question.question.split()[3]
        assert protocol.extract_answer(solution.written) in kinds[relation]
        scores.append(reward.parts["exact_match"])
    assert np.mean(scores) < 0.1


def test_a_question_of_another_world_and_a_pointless_guess_are_refused(world, questions):
    one_hop = next(q for q in questions if q.hops == 1)
    with pytest.raises(ValueError, match="nothing is left to guess"):
        world.demonstration(one_hop, "search_then_guess")
    with pytest.raises(ValueError, match="not one of this world"):
        TinyWorld((9,), 200).demonstration(one_hop, "search")


def test_tokenizer_decodes_every_text_of_the_world_unchanged(world, questions, tokenizer):
    for text in texts_of(world, questions):
        ids = tokenizer.encode(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).split() == text.split()


def test_tokenizer_preserves_document_blocks_up_to_white_space(world, tokenizer):
    lines = [f"{passage.id}\t{passage.line}" for passage in world.passages[:5]]
    for documents in ([], lines[:1], lines):
        block = protocol.document_block(documents)
        ids = tokenizer.encode(block)
        text = tokenizer.decode(ids)
        assert tokenizer.unk_token_id not in ids
        assert "".join(text.split()) == "".join(block.split())
        assert tokenizer.encode(text) == ids


def test_decoding_in_pieces_equals_decoding_at_once(world, questions, tokenizer):
    text = "".join(text for text, _ in world.demonstration(questions[0], "search"))
    ids = tokenizer.encode(text)
    assert "".join(tokenizer.decode([i]) for i in ids) == tokenizer.decode(ids)


def test_spans_tokenised_separately_equal_the_whole_text(world, questions, tokenizer):
    for question in questions:
        spans = world.demonstration(question, "search")
        whole = tokenizer.encode("".join(text for text, _ in spans))
        assert [i for text, _ in spans for i in tokenizer.encode(text)] == whole
        assert whole[-1] == tokenizer.eos_token_id


def test_names_and_tags_have_the_same_few_tokens_everywhere(world, tokenizer):
    assert len(tokenizer) == 156
    assert tokenizer.encode("astronaut") == [tokenizer.unk_token_id]
    for tag in (protocol.BEGIN_QUERY, protocol.END_DOCUMENTS, protocol.END_ANSWER):
        assert len(tokenizer.encode(tag)) == 1
    for person in world.people[:20]:
        name = tokenizer.encode(person.name)
        assert len(name) == 3
        for text in (f"(1){person.name}   has", f"of {person.name}?", f"teacher {person.name}."):
            assert tokenizer.encode(text)[1:4] == name


def test_a_query_by_name_and_relation_finds_the_page(world):
    index = build_index(world.passages, HashEncoder(), kind="exact")
    people = [person for person in world.people for _ in RELATIONS]
    queries = [f"{person.name} {relation}" for person in world.people for relation in RELATIONS]
    hits = index.search(queries, k=1)
    right = [hit[0].line == person.passage for hit, person in zip(hits, people, strict=True)]
    assert np.mean(right) >= 0.97


KNOBS = {
    "hops": 4,
    "distractors": 2,
    "same_names": 0.5,
    "coverage": 0.7,
    "stale": 0.5,
    "padding": 3,
    "memorised_people": 5,
}


def test_a_hard_world_is_one_the_tokenizer_knows_and_its_true_pages_answer(tokenizer):
    world = TinyWorld((4,), 60, TinyWorldConfig(**KNOBS))
    questions = world.questions(80, memorised_fraction=0.2)
    assert {q.hops for q in questions} == {0, 1, 2, 3, 4}
    for text in [p.line for p in world.passages] + [q.question for q in questions]:
        assert tokenizer.unk_token_id not in tokenizer.encode(text)
    for question in questions:
        spans = world.demonstration(question, "search", documents=2)
        solution = rewards.Solution(spans)
        assert rewards.stage2(solution, question.answers).value == 1.0
        assert rewards.searches_answered(solution) == max(1, question.hops)


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, v in KNOBS.items() if k != "hops"])
def test_each_knob_changes_pages_and_nothing_else(name, value):
    plain = TinyWorld((4,), 60)
    hard = TinyWorld((4,), 60, TinyWorldConfig(**{name: value}))
    before, after = [p.line for p in plain.passages], [p.line for p in hard.passages]
    if name == "same_names":
        assert sum(" " in person.name for person in hard.people) == 30
        assert len(after) == 90
        return
    if name == "memorised_people":
        assert len(after) == 65
        return
    assert [p.facts for p in hard.people] == [p.facts for p in plain.people]
    added = [line for line in after if line not in before]
    if name == "coverage":
        assert not added and len(after) == 42
    elif name == "stale":
        assert after[:60] == before and len(added) == 30
        assert all(", I guess " in line for line in added)
    elif name == "distractors":
        assert after[:60] == before and len(added) == 120
    else:
        assert len(after) == 60
        assert all(
            new.startswith(old.partition(" has ")[0].partition("   ")[0])
            and old.partition("   ")[2] in new
            and new.count(" has ") == 4
            for old, new in zip(before, after, strict=True)
        )


def test_a_forgetful_search_engine_misses_a_share_of_right_pages_for_good():
    world = TinyWorld((4,), 200)
    index = build_index(world.passages, HashEncoder())
    engine = Forgetful(index, 0.6)
    queries = [f"{person.name} {relation}" for person in world.people for relation in RELATIONS]
    found = engine.search(queries, 1)
    right = [hits[0].title == q.split()[0] for q, hits in zip(queries, found, strict=True)]
    assert 0.55 < np.mean(right) < 0.65
    assert engine.search(queries, 1) == found
    by_person = np.array(right).reshape(200, 3)
    assert by_person.any(1).mean() > 0.9  # other words find what the first did not
    assert len(engine.passages) == 200


@pytest.mark.parametrize("change", [{"hops": 5, "cold_start_people": 5}])
def test_more_hops_than_people_are_refused(change):
    with pytest.raises(ConfigError, match="hops=5 lead further than the 5 people"):
        override(tiny_world.config(), [f"environment.{k}={v}" for k, v in change.items()])
