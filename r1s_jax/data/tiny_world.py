"""A generated world in which a very small model learns to search within minutes.

Every world draws new people and facts, so that nothing can be memorised across worlds: the policy
either looks a fact up or guesses. The tokenizer covers every text of every world, and a name is the
same few tokens wherever it stands, so that the policy can copy it.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r1s_jax.config import TinyWorldConfig
from r1s_jax.data.questions import Question
from r1s_jax.data.tiny_pages import LAST_SYLLABLES, SYLLABLES, Pages, Person, draw_names
from r1s_jax.io.errors import ConfigError
from r1s_jax.protocol.dialect import BEGIN_THINK, Dialect
from r1s_jax.protocol.r1_searcher import R1Searcher
from r1s_jax.protocol.search_r1 import SearchR1
from r1s_jax.protocol.solution import R1_SEARCHER
from r1s_jax.protocol.tool_call import ToolCall
from r1s_jax.retrieval.api import Passage

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
_QUESTION = "Question: {question}"
PROMPT = f"{_QUESTION} {BEGIN_THINK}"

BIRTHPLACE, TRADE, TEACHER = RELATIONS = ("birthplace", "trade", "teacher")
# Trades, unlike names, are the same in every world, so that a guess is sometimes right.
TRADES = ("baker", "dancer", "doctor", "farmer", "judge", "mason")
TRADES += ("painter", "potter", "sailor", "singer", "smith", "weaver")
# fmt: off
_WORDS = (
    "Question", "What", "is", "the", "of", "has", "Let", "me", "search", "Found", "I", "guess",
    "None",
)
# fmt: on
_WORD_START = "▁"  # the customary mark of a piece that begins a word

GUESS = " I guess."

_MEMORISED_KEY = (2**32 - 1,)  # seed of the world that the memorised people come from

Style = Literal["guess", "search", "search_then_guess"]
Spans = tuple[tuple[str, bool], ...]


class _Form(NamedTuple):
    """The pieces of a dialect's texts besides words and names, and its chat template."""

    tags: tuple[str, ...]
    pieces: tuple[str, ...]
    apart: str  # regular expression of text that is never part of a word
    end: str
    template: str


_THINKING = "{% if enable_thinking is not defined or enable_thinking %} <think>{% endif %}"
_FORMS = {
    # The plain prompt as a chat template: the question and nothing else.
    "r1_searcher": _Form(
        R1Searcher.tags,
        tuple(f"({i})" for i in range(1, 6)),
        r"\(\d\)",
        EOS,
        "Question: {{ messages[-1]['content'] }} ",
    ),
    "search_r1": _Form(
        SearchR1.tags,
        ("Doc", *(f"{i}(Title:" for i in range(1, 6)), '"', '")'),
        r'"\)?',
        EOS,
        f"Question: {{{{ messages[-1]['content'] }}}}{_THINKING}",
    ),
    "tool_call": _Form(
        ToolCall.tags,
        ("(1)", '{"name":', '"search",', '"arguments":', '{"query":', '"', '"}}'),
        r'\(\d\)|"(?=[A-Z])|"\}\}',
        TURN_END,
        f"{{% if tools %}}{TURN_START} search{TURN_END}{{% endif %}}"
        "{% for m in messages %}"
        f"{{% if m.role == 'tool' %}}{TURN_START} <tool_response> {{{{ m.content }}}} "
        f"</tool_response>{TURN_END}"
        f"{{% elif m.role == 'user' %}}{TURN_START} Question: {{{{ m.content }}}}{TURN_END}"
        f"{{% else %}}{TURN_START} {{{{ m.content }}}}{{% for c in m.tool_calls or [] %}}"
        ' <tool_call> {"name": "search", "arguments": {{ c.function.arguments | tojson }}}'
        f" </tool_call>{{% endfor %}}{TURN_END}{{% endif %}}{{% endfor %}}{TURN_START}{_THINKING}",
    ),
}


def build_tokenizer(dialect: str = "r1_searcher") -> PreTrainedTokenizerFast:
    """A tokenizer of tags, words and syllables; text that is in no world becomes `<unk>`.

    A piece that begins a word carries its space, so decoding token by token gives the same text
    as decoding all at once. Decoding turns white space into single spaces, and puts one before
    tags and document numbers.
    """
    form = _FORMS[dialect]
    starts = (*form.tags, *form.pieces, *_WORDS, *RELATIONS, *TRADES)
    names = [syllable.capitalize() for syllable in SYLLABLES]
    pieces = [_WORD_START + text for text in (*starts, *names)]
    vocabulary = [PAD, form.end, UNKNOWN, *pieces, *SYLLABLES, *LAST_SYLLABLES, *".,:?"]
    control = [TURN_START] if form.end == TURN_END else []
    ids = {piece: i for i, piece in enumerate([*vocabulary, *control])}
    # WordPiece takes the longest piece that matches; continuing pieces have no prefix.
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN, continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"<[^<>\s]+>|{form.apart}"), "isolated"),
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(_WORD_START, prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_WORD_START, " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=form.end,
        unk_token=UNKNOWN,
        chat_template=form.template,
        **({"additional_special_tokens": control} if control else {}),
    )


def prompt_of(dialect: Dialect) -> str | None:
    """The prompt of a policy of the tiny world; None: the chat template makes it.

    The prompt opens the reasoning if the dialect reasons.
    """
    if dialect.name == R1Searcher.name:
        return PROMPT if dialect.reasons else _QUESTION
    return "{question}" if dialect.name == SearchR1.name else None


class TinyWorld:
    """People with a birthplace, a trade and a teacher; the teachers form one ring.

    In a ring of three or more, nobody teaches themselves or their own teacher. The world is a
    function of `seed_key` (say, seed, split and index), the number of people and `config`, of which
    it reads all but the other numbers of people; no method changes it. `config.memorised_people`
    more people have the same facts in every world and no relation to the others.
    """

    def __init__(
        self, seed_key: tuple[int, ...], num_people: int, config: TinyWorldConfig | None = None
    ):
        if num_people < 3:
            raise ConfigError(f"a world needs at least 3 people, not {num_people}")
        self.seed_key, self.config = seed_key, config or TinyWorldConfig()
        count = self.config.memorised_people
        memorised = TinyWorld(_MEMORISED_KEY, count) if count else None
        self.known = memorised.people if memorised else []
        rng = self._rng("facts")
        # As many places as people: the policy would memorise a few recurring ones, not read them.
        names = draw_names(rng, 2 * num_people, memorised.names if memorised else ())
        people, self.places = self._full_names(names[:num_people]), names[num_people:]
        self.people = [
            Person(
                name,
                _shuffled(
                    rng,
                    {
                        BIRTHPLACE: str(rng.choice(self.places)),
                        TRADE: str(rng.choice(TRADES)),
                        TEACHER: people[(i + 1) % num_people],
                    },
                ),
            )
            for i, name in enumerate(people)
        ]
        self._by_name = {person.name: person for person in (*self.people, *self.known)}

    def _full_names(self, names: list[str]) -> list[str]:
        """The names, a share of them with a second name, without which they are ambiguous."""
        rng, count = self._rng("pages", 0), round(self.config.same_names * len(names))
        chosen = rng.permutation(len(names))[:count]
        seconds = dict(zip(chosen, draw_names(rng, count, names), strict=True))
        return [f"{n} {seconds[i]}" if i in seconds else n for i, n in enumerate(names)]

    @property
    def names(self) -> list[str]:
        """The names of all people and places, except the memorised people."""
        return [person.name for person in self.people] + self.places

    def _rng(
        self, purpose: Literal["facts", "questions", "guesses", "pages"], *key: int
    ) -> np.random.Generator:
        """A separate generator for each purpose, so that no call affects another."""
        salt = ("facts", "questions", "guesses", "pages").index(purpose)
        return np.random.default_rng(np.random.SeedSequence(salt, spawn_key=(*self.seed_key, *key)))

    @property
    def passages(self) -> list[Passage]:
        """The corpus: one passage per person, as far as `config` changes nothing."""
        lines = [*self._pages, *(person.passage for person in self.known)]
        return [Passage(str(i), line) for i, line in enumerate(lines)]

    @cached_property
    def _pages(self) -> Pages:
        taken = {word for name in self._by_name for word in (name, *name.split())}
        return Pages(
            self.people, self._values, {*taken, *self.places}, self.config, self._rng("pages", 1)
        )

    @property
    def _values(self) -> Mapping[str, Sequence[str]]:
        """The possible values of each relation."""
        people = [person.name for person in self.people]
        return {BIRTHPLACE: self.places, TRADE: TRADES, TEACHER: people}

    def questions(
        self, n: int, hops: Sequence[int] | None = None, memorised_fraction: float = 0.0
    ) -> list[Question]:
        """`n` different questions in random order.

        The share `memorised_fraction` is about memorised people, as far as there are such
        questions; the others need these numbers of hops (None: from one to `config.hops`), each
        equally often. The ids are unique within this world. Raises ConfigError if the world has too
        few questions.
        """
        memorised = self.known_questions()
        about_memorised = min(round(n * memorised_fraction), len(memorised))
        kinds = range(1, self.config.hops + 1)
        counts = _split(n - about_memorised, hops or kinds)
        rng, each = self._rng("questions"), len(self.people) * len(RELATIONS)
        if max(counts.values()) > each:
            raise ConfigError(f"{counts} questions by hops: this world has {each} of each kind")
        ids = []
        for kind in kinds:
            permuted = rng.permutation(each) + (kind - 1) * each
            ids += list(permuted[: counts.get(kind, 0)])
        if about_memorised:
            ids += list(rng.permutation([q.id for q in memorised])[:about_memorised])
        return [self._question(int(i)) for i in rng.permutation(ids)]

    def known_questions(self) -> list[Question]:
        """All questions about memorised people, whose facts never change; each needs one fact."""
        count = len(self.known) * len(RELATIONS)
        return [self._question(self._first_memorised_id + i) for i in range(count)]

    @property
    def _first_memorised_id(self) -> int:
        """The first id of a question about memorised people; the ids of all others precede it."""
        return self.config.hops * len(self.people) * len(RELATIONS)

    def _question(self, id: int) -> Question:
        name, relations = self._hops(id)
        chain = " of ".join(f"the {relation}" for relation in reversed(relations))
        answer, pages = name, []
        for relation in relations:
            pages.append(answer)
            answer = self._by_name[answer].facts[relation]
        text, memorised = f"What is {chain} of {name}?", id >= self._first_memorised_id
        # 0 hops: scores by hops count only questions whose facts must be looked up.
        hops = 0 if memorised else len(relations)
        return Question(
            id, text, (answer,), hops=hops, supporting=tuple(pages), memorised=memorised
        )

    def _hops(self, id: int) -> tuple[str, tuple[str, ...]]:
        """The name that question `id` starts from, and the relations to follow, first hop first."""
        if id >= self._first_memorised_id:
            which, who = divmod(id - self._first_memorised_id, len(self.known))
            return self.known[who].name, (RELATIONS[which],)
        rest, who = divmod(id, len(self.people))
        further, which = divmod(rest, len(RELATIONS))
        return self.people[who].name, (*[TEACHER] * further, RELATIONS[which])

    def demonstration(
        self,
        question: Question,
        style: Style,
        dialect: Dialect = R1_SEARCHER,
        documents: int = 1,
    ) -> Spans:
        """A worked solution, as (text, trained?) spans that follow the prompt.

        `search` looks up every hop, `guess` none, `search_then_guess` only the first. A guess is
        a random value of the right kind, seldom the right one; about memorised people it is the
        right one. The span of a guess begins with `GUESS`. A search finds up to `documents`
        passages, the person's own first, absent or not; they are not trained on.
        The first word of a thought, `Let` or `I`, is the decision to search or to guess.
        """
        if self._question(question.id) != question:
            raise ValueError(f"question {question.id} is not one of this world")
        name, relations = self._hops(question.id)
        if style == "search_then_guess" and len(relations) < 2:
            raise ValueError(
                "search_then_guess needs two hops: after one hop nothing is left to guess"
            )
        looked_up = {"guess": 0, "search_then_guess": 1, "search": len(relations)}[style]
        spans: list[tuple[str, bool]] = []
        value = name
        for relation in relations[:looked_up]:
            person = self._by_name[value]
            thought = " Let me search." if dialect.talks else ""
            spans.append((thought + dialect.search_turn(f"{value} {relation}"), True))
            spans.append((dialect.reply([self._found(person)[:documents]]), False))
            value = person.facts[relation]
            if dialect.talks:
                spans.append((f"{dialect.opening()} Found {relation} {value}.", True))
        thought = ""
        if style != "search":
            value = question.answers[0]
            if not question.memorised:
                value = self._guess(question.id, relations[-1])
            thought = GUESS if dialect.talks else ""
        answer = dialect.answer_turn(value) + _FORMS[dialect.name].end
        spans.append((thought + answer, True))
        return tuple(spans)

    def _found(self, person: Person) -> list[str]:
        return [person.passage] if person in self.known else self._pages.about(person.name)

    def _guess(self, id: int, relation: str) -> str:
        return str(self._rng("guesses", id).choice(self._values[relation]))

    def check(self) -> None:
        """Raises ValueError unless every name denotes one thing, with one value per relation.

        If and only if it passes, each question has exactly one answer in the passages.
        """
        names = self.names + [person.name for person in self.known]
        if len({*names, *TRADES}) != len(names) + len(TRADES):
            raise ValueError("a name stands for two things in this world")
        for person in (*self.people, *self.known):
            if set(person.facts) != set(RELATIONS) or person.facts[TEACHER] not in self._by_name:
                raise ValueError(f"the facts of {person.name} are not one value per relation")


def _split(n: int, kinds: Sequence[int]) -> dict[int, int]:
    """`n` divided over the kinds as evenly as whole numbers allow."""
    counts = {}
    for others, kind in reversed(list(enumerate(kinds))):
        counts[kind] = round(n / (others + 1))
        n -= counts[kind]
    return counts


def _shuffled(rng: np.random.Generator, facts: dict[str, str]) -> dict[str, str]:
    """The facts in random order: in a fixed order, the policy would read a fact by its place,
    syllable by syllable, and would sometimes never learn one of them."""
    relations = list(facts)
    return {relations[i]: facts[relations[i]] for i in rng.permutation(len(relations))}


def write_world(folder: Path, people: int, questions: int, seed: int) -> Path:
    """Writes a world as `passages.tsv` and `questions.jsonl`, half the questions with two hops.

    Raises FileExistsError if one of them exists, ConfigError for more questions than the world has.
    """
    world = TinyWorld((seed,), people)
    lines = {
        "passages.tsv": [f"{passage.id}\t{passage.line}" for passage in world.passages],
        "questions.jsonl": [
            json.dumps({"idx": q.id, "question": q.question, "answer": q.answers[0]})
            for q in world.questions(questions)
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in lines.items():
        with (folder / name).open("x", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in text)
    return folder
