"""A generated world in which a very small model learns to search within minutes.

Every world draws its people and facts afresh, so nothing can be remembered from one to the next:
the policy either looks a fact up or guesses. The tokenizer is closed over everything that can be
said in any world, and a name is the same few tokens wherever it stands, so that it can be copied.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r1s_jax.data.questions import Question
from r1s_jax.io.errors import ConfigError
from r1s_jax.protocol.dialect import BEGIN_THINK, Dialect
from r1s_jax.protocol.r1_searcher import R1Searcher
from r1s_jax.protocol.search_r1 import SearchR1
from r1s_jax.protocol.solution import R1_SEARCHER
from r1s_jax.protocol.tool_call import ToolCall
from r1s_jax.retrieval.api import Passage, join_line

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
_ASKED = "Question: {question}"
PROMPT = f"{_ASKED} {BEGIN_THINK}"

BIRTHPLACE, TRADE, TEACHER = RELATIONS = ("birthplace", "trade", "teacher")
# The trades are for ever, unlike names: a guess at one is right once in a while.
TRADES = ("baker", "dancer", "doctor", "farmer", "judge", "mason")
TRADES += ("painter", "potter", "sailor", "singer", "smith", "weaver")
# fmt: off
_WORDS = (
    "Question", "What", "is", "the", "of", "has", "Let", "me", "search", "Found", "I", "guess",
    "None",
)
# fmt: on
# The last syllable of a name is of its own kind: with few syllables in common, names that stand
# side by side are seldom mistaken for each other.
SYLLABLES = tuple(map("".join, product("bdgklmnprstz", "aio")))
LAST_SYLLABLES = tuple(map("".join, product("bdgklmnprstz", "euy")))

_WORD_START = "▁"  # the customary mark of a piece that begins a word

GUESS = " I guess."

_KNOWN = (2**32 - 1,)  # the key of the world that the people known everywhere come from

Style = Literal["guess", "search", "search_then_guess"]
Spans = tuple[tuple[str, bool], ...]


class _Form(NamedTuple):
    """What a dialect's texts are made of beside words and names, and its chat template."""

    tags: tuple[str, ...]
    pieces: tuple[str, ...]
    apart: str  # a regular expression for what is never part of a word
    end: str
    template: str


_THINKING = "{% if enable_thinking is not defined or enable_thinking %} <think>{% endif %}"
_FORMS = {
    # Its prompt, for whoever treats it as a chat model: the question and nothing else.
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
    """Tags, words and syllables as single tokens; what is in no world becomes `<unk>`.

    A piece that begins a word carries its space, so decoding token by token gives the same text
    as decoding all at once. White space comes back as single spaces; tags and document numbers
    get one in front.
    """
    form = _FORMS[dialect]
    starts = (*form.tags, *form.pieces, *_WORDS, *RELATIONS, *TRADES)
    names = [syllable.capitalize() for syllable in SYLLABLES]
    pieces = [_WORD_START + text for text in (*starts, *names)]
    vocabulary = [PAD, form.end, UNKNOWN, *pieces, *SYLLABLES, *LAST_SYLLABLES, *".,:?"]
    control = [TURN_START] if form.end == TURN_END else []
    ids = {piece: i for i, piece in enumerate([*vocabulary, *control])}
    # WordPiece takes the longest known piece again and again; no mark on the pieces that continue.
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
    """The prompt of a policy of the tiny world; None: what its chat template makes of a question.

    It opens the reasoning, unless there is to be none.
    """
    if dialect.name == R1Searcher.name:
        return PROMPT if dialect.reasons else _ASKED
    return "{question}" if dialect.name == SearchR1.name else None


@dataclass(frozen=True)
class Person:
    """Somebody of the world, who has a page."""

    name: str
    facts: dict[str, str]  # relation -> value, in the order of the page

    @property
    def passage(self) -> str:
        """A line of the corpus. The name comes twice where it is whose page this is, so that
        searching for it ranks this page above the student's, which names its teacher once."""
        facts = ", ".join(f"{relation} {value}" for relation, value in self.facts.items())
        return join_line(self.name, f"{self.name} has {facts}.")


class TinyWorld:
    """People with a birthplace, a trade and a teacher; the teachers form one ring.

    A ring of three or more makes nobody their own teacher, nor their teacher's. Everything follows
    from `seed_key` (say, seed, split and index) and the numbers of people; no method changes the
    world. Beside them live `memorised_people`, who have the same facts in every world and nothing
    to do with the others.
    """

    def __init__(self, seed_key: tuple[int, ...], num_people: int, memorised_people: int = 0):
        if num_people < 3:
            raise ConfigError(f"a world needs at least 3 people, not {num_people}")
        self.seed_key = seed_key
        known = TinyWorld(_KNOWN, memorised_people) if memorised_people else None
        self.known = known.people if known else []
        rng = self._rng("facts")
        # As many places as people: a few that recur would be remembered rather than read.
        names = _draw_names(rng, 2 * num_people, known.names if known else ())
        people, self.places = names[:num_people], names[num_people:]
        self.people = [
            Person(
                name,
                _in_any_order(
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

    @property
    def names(self) -> list[str]:
        """Of all people and places, the known ones left out."""
        return [person.name for person in self.people] + self.places

    def _rng(
        self, purpose: Literal["facts", "questions", "guesses"], *key: int
    ) -> np.random.Generator:
        """A generator of its own for each purpose, so that no call disturbs another."""
        salt = ("facts", "questions", "guesses").index(purpose)
        return np.random.default_rng(np.random.SeedSequence(salt, spawn_key=(*self.seed_key, *key)))

    @property
    def passages(self) -> list[Passage]:
        """The corpus: one passage a person."""
        people = (*self.people, *self.known)
        return [Passage(str(i), person.passage) for i, person in enumerate(people)]

    def questions(
        self, n: int, two_hop_fraction: float, memorised_fraction: float = 0.0
    ) -> list[Question]:
        """`n` different questions in random order, that share of them about the known people, or
        all about them that there are, and that share of the others with two hops.

        Their ids name them within this world. Raises ValueError when there are not so many.
        """
        memorised = self.known_questions()
        of_known = min(round(n * memorised_fraction), len(memorised))
        n -= of_known
        two_hop = round(n * two_hop_fraction)
        rng, each = self._rng("questions"), len(self.people) * len(RELATIONS)
        if not 0 <= two_hop <= n or max(two_hop, n - two_hop) > each:
            raise ConfigError(
                f"{n} questions with {two_hop} of two hops: this world has {each} of each kind"
            )
        one_hop_ids = rng.permutation(each)[: n - two_hop]
        two_hop_ids = rng.permutation(each)[:two_hop] + each
        known_ids = rng.permutation([q.id for q in memorised])[:of_known] if of_known else []
        ids = rng.permutation([*one_hop_ids, *two_hop_ids, *known_ids])
        return [self._question(int(i)) for i in ids]

    def known_questions(self) -> list[Question]:
        """All about the people whose facts never change; each takes one of them."""
        count = len(self.known) * len(RELATIONS)
        return [self._question(self._first_known + i) for i in range(count)]

    @property
    def _first_known(self) -> int:
        """The first id of a question about the known people; those of one and two hops precede."""
        return 2 * len(self.people) * len(RELATIONS)

    def _question(self, id: int) -> Question:
        name, relations = self._hops(id)
        chain = " of ".join(f"the {relation}" for relation in reversed(relations))
        answer = name
        for relation in relations:
            answer = self._by_name[answer].facts[relation]
        text, memorised = f"What is {chain} of {name}?", id >= self._first_known
        # Neither of one hop nor of two: scores by hops are of what has to be looked up.
        hops = 0 if memorised else len(relations)
        return Question(id, text, (answer,), hops=hops, memorised=memorised)

    def _hops(self, id: int) -> tuple[str, tuple[str, ...]]:
        """Whom question `id` starts from and the relations to follow, the first hop first."""
        if id >= self._first_known:
            which, who = divmod(id - self._first_known, len(self.known))
            return self.known[who].name, (RELATIONS[which],)
        rest, who = divmod(id, len(self.people))
        two_hop, which = divmod(rest, len(RELATIONS))
        last = RELATIONS[which]
        return self.people[who].name, (TEACHER, last) if two_hop else (last,)

    def demonstration(
        self, question: Question, style: Style, dialect: Dialect = R1_SEARCHER
    ) -> Spans:
        """A worked solution, as (text, trained?) spans that follow the prompt.

        `search` looks every hop up, `guess` none, `search_then_guess` the first alone. A guess is
        a random value of the right kind, seldom the right one, and the right one about the known
        people; its span begins with `GUESS`.
        Documents are not trained on: the one passage of the person asked for, as the search engine
        would insert it. The first word of a thought, `Let` or `I`, is the decision to search or to
        guess.
        """
        if self._question(question.id) != question:
            raise ValueError(f"question {question.id} is not one of this world")
        name, relations = self._hops(question.id)
        if style == "search_then_guess" and len(relations) < 2:
            raise ValueError("after the only search there is nothing left to guess")
        looked_up = {"guess": 0, "search_then_guess": 1, "search": len(relations)}[style]
        spans: list[tuple[str, bool]] = []
        value = name
        for relation in relations[:looked_up]:
            person = self._by_name[value]
            thought = " Let me search." if dialect.talks else ""
            spans.append((thought + dialect.search_turn(f"{value} {relation}"), True))
            spans.append((dialect.reply([[person.passage]]), False))
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

    def _guess(self, id: int, relation: str) -> str:
        people = [person.name for person in self.people]
        values = {BIRTHPLACE: self.places, TRADE: TRADES, TEACHER: people}[relation]
        return str(self._rng("guesses", id).choice(values))

    def check(self) -> None:
        """Raises ValueError unless every name stands for one thing, with one value a relation.

        Then, and only then, each question has exactly one answer in the passages.
        """
        names = self.names + [person.name for person in self.known]
        if len({*names, *TRADES}) != len(names) + len(TRADES):
            raise ValueError("a name stands for two things in this world")
        for person in (*self.people, *self.known):
            if set(person.facts) != set(RELATIONS) or person.facts[TEACHER] not in self._by_name:
                raise ValueError(f"the facts of {person.name} are not one value a relation")


def _in_any_order(rng: np.random.Generator, facts: dict[str, str]) -> dict[str, str]:
    """The same facts shuffled: a fact that always stood in one place would be read by its place,
    syllable by syllable, and now and then one of them would never be learned."""
    relations = list(facts)
    return {relations[i]: facts[relations[i]] for i in rng.permutation(len(relations))}


def _draw_names(rng: np.random.Generator, n: int, taken: Collection[str]) -> list[str]:
    """`n` different names, e.g. Bakory, none of them taken."""
    there_are = len(SYLLABLES) ** 2 * len(LAST_SYLLABLES)
    if n > there_are - len(taken):
        raise ConfigError(f"a world has {there_are:,} names; {n:,} people and places are too many")
    drawn: dict[str, None] = {}  # a set that keeps its order
    while len(drawn) < n:
        first, second = rng.choice(SYLLABLES, 2)
        name = f"{first}{second}{rng.choice(LAST_SYLLABLES)}".capitalize()
        if name not in taken:
            drawn[name] = None
    return list(drawn)


def write_world(folder: Path, people: int, questions: int, seed: int) -> Path:
    """Writes a world as `passages.tsv` and `questions.jsonl`, half the questions with two hops.

    Raises FileExistsError where one of them is there, ValueError for more questions than there are.
    """
    world = TinyWorld((seed,), people)
    lines = {
        "passages.tsv": [f"{passage.id}\t{passage.line}" for passage in world.passages],
        "questions.jsonl": [
            json.dumps({"idx": q.id, "question": q.question, "answer": q.answers[0]})
            for q in world.questions(questions, 0.5)
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in lines.items():
        with (folder / name).open("x", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in text)
    return folder
