"""Where questions and documents come from: one protocol, two implementations."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from jaxtyping import Float

from r1s_jax.config import Config, CorpusConfig, TinyWorldConfig
from r1s_jax.data import links
from r1s_jax.data.benchmarks import questions_file
from r1s_jax.data.demonstrations import Demonstration, demonstrations_at, read_demonstrations
from r1s_jax.data.links import LINKS
from r1s_jax.data.questions import (
    ByDifficulty,
    Question,
    question_stream,
    read_questions,
    texts,
    without,
)
from r1s_jax.data.tiny_search import Forgetful
from r1s_jax.data.tiny_world import GUESS, Style, TinyWorld, prompt_of
from r1s_jax.data.titles import apart, read_articles, title_demonstrations, title_questions
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.journal import DataError
from r1s_jax.io.json import decode
from r1s_jax.protocol.dialect import Dialect
from r1s_jax.protocol.dialects import from_dict, make_dialect
from r1s_jax.protocol.solution import R1_SEARCHER
from r1s_jax.retrieval.api import Passage, Retriever
from r1s_jax.retrieval.encoder import HashEncoder
from r1s_jax.retrieval.index import Index, build_index
from r1s_jax.retrieval.references import is_summaries, open_retriever, read_corpus
from r1s_jax.retrieval.tables import HUB
from r1s_jax.rewards.answer_scores import normalize_answer
from r1s_jax.system.assets import AssetError, resolve
from r1s_jax.system.console import console
from r1s_jax.system.distributed import check_alike, on_main, own_address, together

T = TypeVar("T")

# Part of a world's seed: worlds of different purposes never coincide.
_COLD_START, _LEARNING, _EVALUATION = 0, 1, 2
# Tiny world: share of demonstrations that guess at once, and of those with several hops that guess
# after the first search.
_GUESS_FRACTION = 0.2
_FIRST_HOP_GUESS_FRACTION = 0.5
# Weights in the loss. The decision to search weighs little, so that only a minority of samples
# searches; a guessed answer weighs little, since random answers only add noise.
_SEARCH_WEIGHT = 0.08
_GUESS_WEIGHT = 0.05


class Batch(NamedTuple):
    """Questions and the search engine that can answer them."""

    questions: Sequence[Question]
    retriever: Retriever


class Environment(Protocol):
    """Serves batches in an order that a saved state restores."""

    def questions(self) -> Sequence[Question]:
        """The questions known in advance, so that faulty ones are found before the run begins."""
        ...

    def batch(self, step: int, size: int, draw: int = 0) -> Batch:
        """Questions to learn from at a step; `draw` 1, 2, ... are further batches of that step."""
        ...

    def retriever_of(self, step: int, draw: int) -> Retriever:
        """The search engine of an earlier batch, of this process or of the one before a resume."""
        ...

    def evaluation(self, size: int) -> Batch:
        """Held-out questions, always the same."""
        ...

    def demonstrations(self, step: int, size: int) -> list[Demonstration]:
        """Worked solutions to imitate at a step of the cold start."""
        ...

    def note(self, questions: Sequence[Question], rewards: Float[np.ndarray, " N"]) -> None:
        """Notes what the samples of a batch earned, one question for each; NaN: no reward."""
        ...

    def state(self) -> dict[str, Any]:
        """The cursor, ready for JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


class TinyWorldEnvironment:
    """A fresh world every step, a function of (seed, step), so that there is no cursor."""

    def __init__(
        self,
        config: TinyWorldConfig,
        seed: int,
        dialect: Dialect = R1_SEARCHER,
        documents: int = 1,
    ):
        """A search finds up to `documents` passages in demonstrations."""
        self.config, self.seed, self.dialect = config, seed, dialect
        self._documents = documents
        self._encoder = HashEncoder()

    def questions(self) -> Sequence[Question]:
        return ()

    def batch(self, step: int, size: int, draw: int = 0) -> Batch:
        return self._batch(self._world(step, draw), size)

    def retriever_of(self, step: int, draw: int) -> Retriever:
        return self._index(self._world(step, draw))

    def _world(self, step: int, draw: int) -> TinyWorld:
        seed = (self.seed, _LEARNING, step, draw) if draw else (self.seed, _LEARNING, step)
        return TinyWorld(seed, self.config.people, self.config)

    def evaluation(self, size: int) -> Batch:
        c = self.config
        return self._batch(TinyWorld((self.seed, _EVALUATION, 0), c.eval_people, c), size)

    def demonstrations(self, step: int, size: int) -> list[Demonstration]:
        """A fifth guesses at once; the others look up from one to `config.hops` facts.

        Half of those with several hops guess after the first search, which leaves something to
        learn. The decision to search has little weight, so that only a minority of samples
        searches. Demonstrations about memorised people guess as often, and guess right.
        """
        c = self.config
        world = TinyWorld((self.seed, _COLD_START, step), c.cold_start_people, c)
        rng = np.random.default_rng((self.seed, _COLD_START, step))
        by_hops = [world.questions(3 * c.cold_start_people, [h + 1]) for h in range(c.hops)]
        memorised = world.known_questions()
        about_memorised = min(round(size * c.memorised_fraction), len(memorised))
        size -= about_memorised
        recalled = round(about_memorised * _GUESS_FRACTION)
        guesses = round(size * _GUESS_FRACTION)
        picks: list[tuple[Sequence[Question], int, Style]] = [
            *((q, n, "search") for q, n in _evenly(by_hops, size - guesses)),
            *((q, n, "guess") for q, n in _evenly(by_hops, guesses)),
            (memorised, recalled, "guess"),
            (memorised, about_memorised - recalled, "search"),
        ]
        out = []
        if any(count > len(questions) for questions, count, _ in picks):
            raise ConfigError(
                f"environment.cold_start_people={c.cold_start_people} have too few facts for "
                f"cold_start.batch_size={size + about_memorised} different demonstrations: take "
                "more people, or a smaller batch"
            )
        for questions, count, style in picks:
            for i in rng.choice(len(questions), count, replace=False):
                question, chosen = questions[i], style
                if style == "search" and question.hops > 1:
                    guess = rng.random() < _FIRST_HOP_GUESS_FRACTION
                    chosen = "search_then_guess" if guess else "search"
                out.append(self._demonstration(world, question, chosen))
        return out

    def _demonstration(self, world: TinyWorld, question: Question, style: Style) -> Demonstration:
        """Decisions to search and random answers have less weight in the loss."""
        guess_weight = 1.0 if question.memorised else _GUESS_WEIGHT
        spans = tuple(
            (text, guess_weight if text.startswith(GUESS) else float(trained))
            for text, trained in world.demonstration(question, style, self.dialect, self._documents)
        )
        return Demonstration(question.question, spans, 1.0 if style == "guess" else _SEARCH_WEIGHT)

    def note(self, questions: Sequence[Question], rewards: Float[np.ndarray, " N"]) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass

    def _batch(self, world: TinyWorld, size: int) -> Batch:
        fraction = self.config.memorised_fraction
        return Batch(world.questions(size, memorised_fraction=fraction), self._index(world))

    def _index(self, world: TinyWorld) -> Retriever:
        index = build_index(world.passages, self._encoder)
        return Forgetful(index, self.config.recall) if self.config.recall < 1 else index


def _evenly(kinds: Sequence[T], n: int) -> Iterator[tuple[T, int]]:
    """Each kind with its part of `n`; the first kinds get what is over."""
    for i, kind in enumerate(kinds):
        yield kind, (n + len(kinds) - 1 - i) // len(kinds)


class CorpusEnvironment:
    """Questions from files, or made from articles, over one index of passages."""

    def __init__(
        self, config: CorpusConfig, seed: int, held_out: int, dialect: Dialect = R1_SEARCHER
    ):
        self.config, self._seed, self._dialect = config, seed, dialect
        self.retriever = open_retriever(config)
        files = [list(_questions_of(reference)) for reference in config.questions]
        starts = np.cumsum([0, *map(len, files)])
        files = [
            [replace(q, id=int(start) + i) for i, q in enumerate(file)]
            for start, file in zip(starts, files, strict=False)
        ]
        questions = [question for file in files for question in file]
        if held_out >= len(questions):
            raise DataError(
                f"eval.questions={held_out} leaves nothing to learn from: there are only "
                f"{len(questions)} questions"
            )
        # By hash: neither the seed nor the order of the questions changes the choice.
        self._held_out = sorted(questions, key=_hash)[:held_out]
        excluded = (q for name in config.exclude for q in _questions_of(name))
        # By normalised text: files may repeat a question with a slightly different spelling.
        self._unwanted = texts(self._held_out) | texts(excluded)
        self._learning = [without(file, self._unwanted) for file in files]
        self._report(len(questions))
        self._stream = question_stream(self._learning, seed=seed, mix=config.mix)
        self._by_difficulty = None
        if config.sampler == "difficulty":
            self._by_difficulty = ByDifficulty(list(itertools.chain(*self._learning)), seed)

    def _report(self, total: int) -> None:
        """Prints how questions are used; raises DataError for a file with none to learn from."""
        for reference, questions in zip(self.config.questions, self._learning, strict=True):
            if not questions:
                raise DataError(f"{reference}: every question of it is in the evaluation")
        learning = sum(map(len, self._learning))
        console.print(
            f"Questions: {learning} to learn from, {len(self._held_out)} held out, "
            f"{total - learning - len(self._held_out)} left out because the evaluation has them"
        )

    def questions(self) -> Sequence[Question]:
        return [*self._held_out, *itertools.chain(*self._learning)]

    def batch(self, step: int, size: int, draw: int = 0) -> Batch:
        if self._by_difficulty:
            return Batch(self._by_difficulty.take(size, step, draw), self.retriever)
        return Batch(self._stream.take(size), self.retriever)

    def retriever_of(self, step: int, draw: int) -> Retriever:
        return self.retriever

    def evaluation(self, size: int) -> Batch:
        return Batch(self._held_out[:size], self.retriever)

    def demonstrations(self, step: int, size: int) -> list[Demonstration]:
        if not self.config.demonstrations:
            raise ConfigError("cold_start.steps must be 0, or name environment.demonstrations")
        return demonstrations_at(self._demonstrations, step, size, self._seed)

    @cached_property
    def _demonstrations(self) -> list[Demonstration]:
        made = [ref for ref in self.config.demonstrations if ref.startswith(LINKS)]
        files = [resolve(ref) for ref in self.config.demonstrations if ref not in made]
        tables = [file for file in files if is_summaries(file)]
        traces = [file for file in files if file not in tables]
        from_pages = [
            demonstration
            for passages, shown, _ in map(_linked, made)
            for demonstration in links.link_demonstrations(
                shown, passages, self._dialect, seed=self._seed
            )
        ]
        from_pages += [
            demonstration
            for table in tables
            for demonstration in title_demonstrations(
                apart(read_articles(table))[0], self._dialect, seed=self._seed
            )
        ]
        if from_pages and not traces:
            return from_pages
        return from_pages + read_demonstrations(traces, self._unwanted, self._dialect)

    def note(self, questions: Sequence[Question], rewards: Float[np.ndarray, " N"]) -> None:
        if self._by_difficulty:
            self._by_difficulty.note(questions, rewards)

    def state(self) -> dict[str, Any]:
        scores = {"scores": self._by_difficulty.state()} if self._by_difficulty else {}
        return {"stream": self._stream.state(), **scores}

    def restore(self, state: dict[str, Any]) -> None:
        if state:
            self._stream.restore(state["stream"])
        if self._by_difficulty:
            self._by_difficulty.restore(state.get("scores", {}))


def _hash(question: Question) -> str:
    return hashlib.sha256(normalize_answer(question.question).encode()).hexdigest()


def dialect_of(config: Config, saved: Callable[[], Dialect | None]) -> Dialect:
    """The dialect of a run's policy, with the prompt for its environment.

    `saved` returns the dialect that the run stored; it is used if the file of the prompt is gone.
    Raises ConfigError, and AssetError if there is neither a file nor a stored dialect.
    """
    p = config.protocol
    bare = replace(make_dialect(p.dialect, p.thinking), tell_invalid=p.tell_invalid)
    prompt = None
    if p.prompt:
        try:
            file = resolve(p.prompt)
        except AssetError:
            if stored := saved():
                return stored
            raise
        prompt = decode(file.read_bytes(), file, ConfigError)
    elif isinstance(config.environment, TinyWorldConfig):
        prompt = prompt_of(bare)
    elif config.environment.prompt == "base" and bare.prompt_is_whole:
        prompt = bare.plain("{question}")
    return from_dict(bare.as_dict() | {"prompt": prompt}, p.prompt or "protocol")


def open_environment(config: Config, dialect: Dialect) -> Environment:
    """Calls make_environment on every process of a run.

    Raises ProcessError on all if it fails on any, or if their recipes or questions differ.
    """
    check_alike("recipe", lambda: config)
    corpus = config.environment
    if config.search.served_by == "main" and isinstance(corpus, CorpusConfig):
        url = on_main(lambda: _serve(open_retriever(corpus)))
        served = replace(corpus, passages=(), index="", retriever=url)
        config = replace(config, environment=served)
    environment = together(lambda: make_environment(config, dialect))
    check_alike("file of questions", environment.questions)
    return environment


def _serve(retriever: Retriever) -> str:
    """Serves this process's index to the other processes; returns the URL."""
    if not isinstance(retriever, Index):
        raise ConfigError(
            "search.served_by=main serves an index of this machine, and the recipe names a search "
            "server: set search.served_by=each"
        )
    try:
        from r1s_jax.retrieval.server import serve_in_background
    except ImportError as error:
        raise ConfigError(f"search.served_by=main: {error}; pip install 'r1s-jax[serve]'") from None
    return f"{serve_in_background(retriever, own_address())}/queries"


def make_environment(config: Config, dialect: Dialect = R1_SEARCHER) -> Environment:
    """The environment of a config, its demonstrations in the policy's dialect."""
    if isinstance(config.environment, TinyWorldConfig):
        documents = config.rollout.documents_per_query
        return TinyWorldEnvironment(config.environment, config.seed, dialect, documents)
    return CorpusEnvironment(config.environment, config.seed, config.eval.questions, dialect)


def _questions_of(reference: str) -> Iterable[Question]:
    """The questions behind a reference or the name of a benchmark."""
    if reference.startswith(HUB):
        return read_questions(reference)
    if reference.startswith(LINKS):
        return _linked(reference)[2]
    path = questions_file(reference)
    if not is_summaries(path):
        return read_questions(path)
    return title_questions(apart(read_articles(path))[1])


@lru_cache(maxsize=1)
def _linked(reference: str) -> tuple[list[Passage], list[Question], list[Question]]:
    """(the passages of `links:CORPUS`, their questions for demonstrations, the others)."""
    passages = list(read_corpus(reference.removeprefix(LINKS)))
    return passages, *links.apart(links.link_questions(passages, links.read_rules()))
