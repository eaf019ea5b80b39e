"""The host side of a rollout: questions in, trajectories and their text out."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool

from r1s_jax.config import Attention, MeshConfig, RolloutConfig, SearchConfig
from r1s_jax.data.questions import Question
from r1s_jax.io.errors import ConfigError, UserError
from r1s_jax.io.journal import DataError
from r1s_jax.models.params import Params
from r1s_jax.models.pretrained import Pretrained
from r1s_jax.models.sharding import (
    batch_sharding,
    batch_shards,
    check_attention,
    make_mesh,
    place,
    replicated,
)
from r1s_jax.models.tokenizer import (
    decode,
    encode,
    encode_start,
    foreign,
    token_strings,
    token_texts,
)
from r1s_jax.protocol.automaton import build_tag_table
from r1s_jax.protocol.dialect import BEGIN_ANSWER, opens_reasoning
from r1s_jax.protocol.prompts import bound, renderer
from r1s_jax.protocol.solution import R1_SEARCHER, Solution
from r1s_jax.retrieval.api import Retriever
from r1s_jax.rollout.broker import Broker, Search
from r1s_jax.rollout.forks import fork_keys, parent_node, renumbered, with_search
from r1s_jax.rollout.in_flight import (
    NOBODY,
    InFlight,
    Origin,
    group_numbers,
    parents,
    shared_beginning,
    stacked,
    trajectories,
)
from r1s_jax.rollout.loop import Rollout
from r1s_jax.rollout.sampler import kept_width, trajectory_keys
from r1s_jax.rollout.session import Programs
from r1s_jax.rollout.trajectory import Finish, Position, Prompts, Trajectory, turn_numbers
from r1s_jax.system.console import warn
from r1s_jax.system.distributed import gather, to_host
from r1s_jax.system.dtype import default_dtype

# Least tokens for the documents of a first search, their tags included.
_LEAST_DOCUMENTS = 24
_MARK = "\0"  # stands for an answer
_MAX_ID = 0x7FFFFFFF  # random keys fold in 31 bits of a question's id


@dataclass(frozen=True)
class Rolled:
    """A rolled-out batch: row `i` of `trajectory` is sample `i % samples` of its question."""

    questions: tuple[Question, ...]  # one per row
    trajectory: Trajectory[np.ndarray]
    solutions: tuple[Solution, ...]
    searches: tuple[tuple[Search, ...], ...]  # of each row, in order
    outcomes: dict[str, int]  # searches of the batch by outcome
    seconds: float
    counters: dict[str, int]
    slots_busy: float = 0.0  # share of slots that sampled a token, averaged over decode steps
    ages: np.ndarray | None = None  # int32[N, W] with partial rollouts: each token's age in steps
    # int[N] with forks: the row that each is forked from; -1: none, it is no fork
    parents: np.ndarray | None = None
    # bool[N] with forks: those that made their parent's search, like it
    with_search: np.ndarray | None = None
    # bool[N, W] with forks: tokens that began a fork's answer; the policy did not sample them
    openings: np.ndarray | None = None

    origins: tuple[Origin, ...] = ()  # of each row
    carried: int = 0  # unfinished trajectories carried over to the next step

    @property
    def sampled_tokens(self) -> int:
        """The number of tokens that the policy sampled."""
        return int(self.trajectory.loss_mask.sum())

    @property
    def trunks(self) -> np.ndarray:
        """bool[N]: the trajectories that are no forks."""
        return np.full(len(self.questions), True) if self.parents is None else self.parents < 0

    @cached_property
    def forked_turns(self) -> np.ndarray:
        """int[N]: the turn of its parent, from 0, at whose end each fork begins; -1: no fork."""
        out, t = np.full(len(self.questions), -1), self.trajectory
        if self.parents is not None:
            forks = np.flatnonzero(self.parents >= 0)
            out[forks] = turn_numbers(t.loss_mask)[self.parents[forks], t.forked[forks] - 1]
        return out

    @property
    def unanswered(self) -> np.ndarray:
        """bool[N]: the policy ended the trajectory without an answer."""
        return np.array([s.complete and s.answer is None for s in self.solutions])

    def take(self, rows: np.ndarray) -> "Rolled":
        """Only these rows; counts over the whole batch stay unchanged."""
        return replace(
            self,
            questions=tuple(self.questions[i] for i in rows),
            trajectory=Trajectory(*(array[rows] for array in self.trajectory)),
            solutions=tuple(self.solutions[i] for i in rows),
            searches=tuple(self.searches[i] for i in rows),
            origins=tuple(self.origins[i] for i in rows) if self.origins else (),
            ages=None if self.ages is None else self.ages[rows],
            parents=None if self.parents is None else renumbered(self.parents, rows),
            with_search=None if self.with_search is None else self.with_search[rows],
            openings=None if self.openings is None else self.openings[rows],
        )


def merge(batches: Sequence[Rolled]) -> Rolled:
    """Joins batches with equal numbers of samples per question; their groups stay distinct."""
    if len(batches) == 1:
        return batches[0]
    trajectories, parents, groups, count = [], [], 0, 0
    for batch in batches:
        t, own = batch.trajectory, batch.parents
        trajectories.append(t._replace(groups=t.groups + groups))
        groups = int(trajectories[-1].groups.max()) + 1
        if own is not None:
            parents.append(np.where(own < 0, own, own + count))
        count += len(t.lengths)

    def joined(name: str) -> np.ndarray | None:
        return np.concatenate([getattr(b, name) for b in batches]) if parents else None

    return Rolled(
        questions=sum((b.questions for b in batches), ()),
        trajectory=Trajectory(
            *(np.concatenate(arrays) for arrays in zip(*trajectories, strict=True))
        ),
        solutions=sum((b.solutions for b in batches), ()),
        searches=sum((b.searches for b in batches), ()),
        origins=sum((b.origins for b in batches), ()),
        outcomes=dict(sum((Counter(b.outcomes) for b in batches), Counter())),
        seconds=sum(b.seconds for b in batches),
        counters=dict(sum((Counter(b.counters) for b in batches), Counter())),
        slots_busy=float(np.mean([b.slots_busy for b in batches])),
        parents=np.concatenate(parents) if parents else None,
        with_search=joined("with_search"),
        openings=joined("openings"),
    )


class NotFinite(UserError, ArithmeticError):
    """The policy's logits are NaN or infinite."""


def check_finite(t: Trajectory[np.ndarray]) -> None:
    """Raises NotFinite if the logprob of a sampled token is NaN or infinite."""
    if not np.isfinite(t.policy_logprobs[t.loss_mask]).all():
        rows = int((~np.isfinite(t.policy_logprobs) & t.loss_mask).any(-1).sum())
        raise NotFinite(
            f"the policy's logits are not numbers (NaN or infinite) in {rows} of {len(t.lengths)} "
            "trajectories: its weights or its config are damaged, or training diverged (take an "
            "older checkpoint and a lower optimizer.learning_rate)"
        )


class Engine:
    """Rolls out questions with one policy and one set of limits, in the policy's dialect."""

    _said = False  # that forks were left out

    def __init__(
        self,
        policy: Pretrained,
        config: RolloutConfig,
        *,
        search: SearchConfig | None = None,
        mesh: Mesh | None = None,
        compute_dtype: np.dtype | None = None,
        attention: Attention = "auto",
        evaluation: bool = False,
        forgiving: bool = False,
    ):
        """Uses everything of `policy` but its parameters, which `run` takes.

        `evaluation` reads queries as the published evaluation does; `forgiving` shows the policy a
        failed search as one that found nothing.

        By default the mesh is all devices, and the dtype is the backend's best one.
        Raises ConfigError if the attention backend does not support the policy, or its chat
        template does not support the dialect.
        """
        self.config = config
        self.dialect = bound(policy.dialect or R1_SEARCHER, policy.tokenizer)
        self.render = renderer(self.dialect, policy.tokenizer)
        self.mesh = mesh or make_mesh(MeshConfig())
        self.model, self.tokenizer, self.eos_ids = policy.model, policy.tokenizer, policy.eos_ids
        self.foreign = foreign(self.tokenizer)
        compute_dtype = default_dtype() if compute_dtype is None else compute_dtype
        check_attention(attention, self.mesh, self.model, compute_dtype)
        tags = build_tag_table(
            token_strings(self.tokenizer),
            [tag for tag in (self.dialect.query_end, self.dialect.answer_end) if tag],
            self.model.vocab_size,
        )
        self.tag_table = place(tags.table, replicated(self.mesh))
        self.broker = Broker(
            search or SearchConfig(),
            decode=self.decode,
            encode=self.encode,
            dialect=self.dialect,
            evaluation=evaluation,
            clean=self.foreign,
            forgiving=forgiving,
            documents_per_query=config.documents_per_query,
            max_documents_length=config.max_documents_length,
            fork=config.fork,
            openings=lambda first_turn: self._openings[first_turn][0],
        )
        self._check_forks()
        self.roll = Rollout(
            model=self.model,
            config=config,
            mesh=self.mesh,
            compute_dtype=compute_dtype,
            eos_ids=self.eos_ids,
            num_tag_states=tags.num_states,
            dialect=self.dialect,
            attention=attention,
        )
        self.programs = Programs.of(self.roll)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text inside a sequence."""
        return encode(self.tokenizer, text)

    def prompt_tokens(self, question: str) -> list[int]:
        """Token ids of a question's prompt. Text of the question never becomes a control token."""
        return self.start_tokens(self.render(self.foreign(question)))

    def start_tokens(self, text: str) -> list[int]:
        """Token ids of a text at the beginning of a sequence."""
        return encode_start(self.tokenizer, text)

    def document_tokens(self, lines: Sequence[str]) -> list[int]:
        """Token ids of the document block for these passage lines."""
        return self.broker.document_tokens(lines[: self.config.documents_per_query])

    def answer_tokens(self, answer: str, first_turn: bool) -> tuple[list[int], list[int]]:
        """Token ids of a turn that answers at once: up to the answer, and the answer's own."""
        before, space = self._openings[first_turn]
        return before, self.encode(space + self.foreign(answer))

    @cached_property
    def _openings(self) -> dict[bool, tuple[list[int], str]]:
        """For a first and a later turn that answers at once: its beginning, and the space before
        the answer, which belongs to the answer's first token."""
        opened, closing, openings = opens_reasoning(self.render("")), self.dialect.closing(), {}
        for first_turn in (True, False):
            opening = "" if first_turn and opened else self.dialect.opening()
            turn = self.dialect.answer_turn(_MARK)
            if not (opened or opening):  # there is no thought to close
                turn = turn.removeprefix(closing)
            before = f"{opening}{turn}".partition(_MARK)[0]
            bare = before.rstrip(" ")
            openings[first_turn] = self.encode(bare), before[len(bare) :]
        return openings

    def decode(self, ids: Sequence[int]) -> str:
        """The exact text of token ids, special tokens included."""
        return decode(self.tokenizer, ids)

    def run(
        self,
        params: Params,
        questions: Sequence[Question],
        *,
        samples: int,
        seed: int,
        step: int,
        draw: int = 0,
        retriever: Retriever,
    ) -> Rolled:
        """Rolls out `samples` trajectories of each question; `draw` counts the batches of a step.

        Each trajectory depends on (seed, step, draw, question.id, sample) and the parameters, not
        on its neighbours. Raises SearchFailure if too many searches failed, ValueError if a prompt
        is longer than `rollout.max_prompt_length`.
        """
        started = time.perf_counter()
        self.broker.begin(retriever)
        flights = self.begin(questions, samples=samples, step=step, draw=draw)
        return self.complete(params, flights, seed=seed, step=step, started=started)

    def complete(
        self,
        params: Params,
        flights: Sequence[InFlight],
        *,
        seed: int,
        step: int,
        rows: int = 0,
        started: float | None = None,
    ) -> Rolled:
        """Rolls out trajectories that `begin` made, in a program of at least `rows` rows.

        Raises as `run` does.
        """
        started = time.perf_counter() if started is None else started
        width, rows = self.config.max_prompt_length, max(rows, len(flights))
        rows += -rows % batch_shards(self.mesh)
        placed = [*flights, *[None] * (rows - len(flights))]
        self.broker.others = self.others(placed)
        prompts = self.prompts(placed, seed, width)
        trajectory, counters = to_host(self.programs.whole(params, prompts, self.tag_table))
        self.broker.share()
        self.broker.check()
        self.absorb(placed, trajectory, step=step)
        return self.rolled(flights, seconds=time.perf_counter() - started, counters=counters)

    def begin(
        self, questions: Sequence[Question], *, samples: int, step: int, draw: int = 0
    ) -> list[InFlight]:
        """`samples` trajectories of each question that hold only their prompts.

        If the config asks for the system's own first search, the broker makes it here.
        """
        first = self._first_searches(questions)
        prompts, forced = self._prompts(questions, first)
        occurrences: Counter[int] = Counter()
        flights = []
        for i, question in enumerate(questions):
            for sample in range(samples):
                flight = InFlight.begun(
                    question,
                    prompts[i],
                    sample=sample,
                    occurrence=occurrences[question.id],
                    step=step,
                    draw=draw,
                    start=len(prompts[i]) - len(forced[i]),
                )
                if first:
                    flight.note_first(first[i])
                flights.append(flight)
            occurrences[question.id] += 1
        return flights

    def prompts(self, placed: Sequence[InFlight | None], seed: int, width: int) -> Prompts:
        """The loop's input on the mesh: for each flight the rows of its tree, None for unused ones.

        Neighbours of one question and step form a group.
        """
        size = self.config.tree_rows
        owners = [f or NOBODY for f in placed for _ in range(size)]
        known = [(f.tree if f else {}).get(node) for f in placed for node in range(size)]
        live = np.array([f is not None and not f.ended for f in known])
        rows = [f or owner for f, owner in zip(known, owners, strict=True)]
        tokens = np.zeros((len(rows), width), np.int32)
        for i, flight in enumerate(rows):
            start = flight.tokens if live[i] else flight.tokens[: flight.prompt_length]
            tokens[i, : len(start)] = start

        def each(values: Iterable[int]) -> np.ndarray:
            return np.array(list(values), np.int32)

        keys = trajectory_keys(
            seed,
            each(f.key_step for f in rows),
            each(f.question.id & _MAX_ID for f in rows),
            each(f.sample for f in rows),
            each(f.occurrence for f in rows),
        )
        arrays = Prompts(
            tokens=tokens,
            lengths=each(len(f.tokens) for f in rows),
            prompt_lengths=each(f.prompt_length for f in rows),
            limits=each(map(self.limit, rows)),
            groups=each(group_numbers(rows)),
            shared=np.full(len(rows), shared_beginning(placed), np.int32),
            keys=fork_keys(keys, [*range(size)] * len(placed), self.config),
            broker=np.full(len(rows), self.broker.number, np.int32),
            live=live,
            at=Position(*map(each, zip(*(f.at for f in rows), strict=True))),
        )
        return place(arrays, batch_sharding(self.mesh))

    def limit(self, flight: InFlight) -> int:
        """The most tokens of this trajectory, at most `rollout.max_length`."""
        return self.config.max_length

    def others(self, placed: Sequence[InFlight | None]) -> list[str]:
        """For each row the next question, whose documents a fork may get.

        Raises ConfigError if there is no other question.
        """
        if not self.config.forks or self.config.fork != "random":
            return []
        texts = [f.question.question if f else "" for f in placed]
        each = list(dict.fromkeys(filter(None, texts)))
        if len(each) == 1:
            raise ConfigError(
                "rollout.fork=random needs the documents of another question, and the rollout has "
                "only one: take more questions, or rollout.fork=nothing"
            )
        after = dict(zip(each, [*each[1:], *each[:1]], strict=True))
        return [after.get(text, "") for text in texts for _ in range(self.config.tree_rows)]

    def absorb(
        self,
        placed: Sequence[InFlight | None],
        t: Trajectory[np.ndarray],
        *,
        step: int,
        at: Position[np.ndarray] | None = None,
    ) -> None:
        """Every flight, with its new forks, takes over its row and its delivered searches.

        Undelivered searches are made again. `at` is the position of unfinished trajectories.
        """
        size, searches = self.config.tree_rows, dict[int, list[Search]]()
        for search in self.broker.log:
            if search.turn is None or search.turn.delivered:
                searches.setdefault(search.trajectory, []).append(search)
        for first, flight in enumerate(placed):
            for node in range(size if flight else 0):
                assert flight is not None
                row = first * size + node
                if node not in flight.tree and t.lengths[row]:
                    parent = flight.tree[parent_node(node, self.config)]
                    back = self.config.fork == "answer" and not with_search(node, self.config)
                    flight.forks[node] = parent.fork(node, int(t.forked[row]), taken_back=back)
                if own := flight.tree.get(node):
                    own.absorb(t, row, step=step, at=at)
                    own.searches += searches.get(row, [])

    def rolled(
        self,
        flights: Sequence[InFlight],
        *,
        seconds: float,
        counters: Mapping[str, np.ndarray],
        **more: Any,
    ) -> Rolled:
        """Makes a batch of ended flights, groups adjacent, each followed by its forks.

        Raises NotFinite.
        """
        c = self.config
        flights = [f for flight in flights for f in flight.tree.values()]
        kept = kept_width(c.temperature, c.top_p)
        trajectory = trajectories(flights, c.max_length, group_numbers(flights), kept)
        check_finite(trajectory)
        totals = {name: int(values.sum()) for name, values in counters.items()}
        busy = totals.pop("busy") / max(totals.pop("room"), 1)
        self._say_left_out(totals.get("forks_left_out", 0))
        return Rolled(
            questions=tuple(f.question for f in flights),
            trajectory=trajectory,
            solutions=tuple(
                self.solution(trajectory, i, f.start, f.written) for i, f in enumerate(flights)
            ),
            searches=tuple(tuple(f.searches) for f in flights),
            origins=tuple(f.origin for f in flights),
            outcomes=self.broker.counts,
            seconds=seconds,
            slots_busy=busy,
            counters=totals,
            parents=parents(flights, c) if c.forks else None,
            with_search=np.array([with_search(f.node, c) for f in flights]) if c.forks else None,
            openings=stacked([f.opening for f in flights], c.max_length) if c.forks else None,
            **more,
        )

    def _say_left_out(self, forks: int) -> None:
        """Says once that trajectories have more queries to fork than they may have forks."""
        if forks and not self._said:
            self._said = True
            most = self.config.forks_per_trajectory
            warn(
                f"{forks} queries of this batch were to be forked and were not: their trajectories "
                f"have rollout.forks_per_trajectory={most} forks already (said once; "
                "forks_left_out counts them)"
            )

    def solution(
        self,
        trajectory: Trajectory[np.ndarray],
        row: int,
        start: int,
        written: Bool[np.ndarray, " T"] | None = None,
    ) -> Solution:
        """The text of a trajectory from token `start` on, split by who wrote it: the policy wrote
        the tokens `written`, by default those of the loss mask."""
        spans = self._token_spans(trajectory, row, start, written)
        texts = tuple((self.decode(ids), by_policy) for ids, by_policy in spans)
        return Solution(texts, self.dialect, Finish(int(trajectory.finish[row])).complete)

    def token_texts(self, trajectory: Trajectory[np.ndarray], row: int) -> list[str]:
        """The text that each sampled token adds to the policy's spans, in order.

        The end of sequence is in no span and adds "".
        """
        spans = [ids for ids, by_policy in self._token_spans(trajectory, row) if by_policy]
        texts = [text for ids in spans for text in token_texts(ids, self.decode)]
        return texts + [""] * (int(trajectory.loss_mask[row].sum()) - len(texts))

    def _token_spans(
        self,
        trajectory: Trajectory[np.ndarray],
        row: int,
        start: int = 0,
        written: Bool[np.ndarray, " T"] | None = None,
    ) -> list[tuple[list[int], bool]]:
        """Token ids from `start` on, without the end of sequence, split by who wrote them."""
        end = int(trajectory.lengths[row])
        tokens = trajectory.tokens[row, start:end]
        mask = (trajectory.loss_mask[row] if written is None else written)[start:end]
        if len(tokens) and mask[-1] and tokens[-1] in self.eos_ids:
            tokens, mask = tokens[:-1], mask[:-1]
        edges = np.flatnonzero(np.diff(mask.astype(np.int8))) + 1
        pieces = zip(np.split(tokens, edges), np.split(mask, edges), strict=True)
        return [(t.tolist(), bool(m[0])) for t, m in pieces if len(t)]

    def _check_forks(self) -> None:
        """Raises ConfigError if the dialect cannot be made to answer, but forks must."""
        must = self.config.forks and self.config.fork == "answer"
        if must and BEGIN_ANSWER not in self.dialect.answer_turn(_MARK):
            raise ConfigError(
                f"rollout.fork=answer: no tag begins an answer in the dialect {self.dialect.name}, "
                "so that a turn cannot be made to answer: take rollout.fork=nothing"
            )

    def _first_searches(self, questions: Sequence[Question]) -> list[Search]:
        """The system's own first search of every question, if the config asks for one."""
        if not self.config.retrieve_first:
            return []
        # Each process searches its share; `gather` gives every process all documents.
        count, index = jax.process_count(), jax.process_index()
        shares = gather(self.broker.search_now([q.question for q in questions[index::count]]))
        return [shares[i % count][i // count] for i in range(len(questions))]

    def _prompts(
        self, questions: Sequence[Question], first: Sequence[Search]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of every prompt, and its part that is the system's own first search."""
        prompts = [self.prompt_tokens(q.question) for q in questions]
        forced: list[list[int]] = [[] for _ in questions]
        for i, search in enumerate(first):
            forced[i] = self.first_search_tokens(search, len(prompts[i]))
        for question, prompt in zip(questions, prompts, strict=True):
            self._check_prompt(question, prompt)
        return [p + f for p, f in zip(prompts, forced, strict=True)], forced

    def first_search_tokens(self, search: Search, prompt: int) -> list[int]:
        """Token ids of the system's own first search after a prompt of `prompt` tokens."""
        query = self._first_query(search.query)
        room = self.config.max_prompt_length - prompt - len(query)
        return query + self.broker.document_tokens(search.documents, room)

    def first_search_room(self, question: str) -> int:
        """The least tokens that the first search of a question needs."""
        return len(self._first_query(question)) + _LEAST_DOCUMENTS

    def _first_query(self, query: str) -> list[int]:
        return self.encode(self.dialect.first_call(self.foreign(query)))

    def check_prompts(self, questions: Sequence[Question]) -> None:
        """Raises DataError for a question whose prompt is too long for a rollout."""
        for question in questions:
            self._check_prompt(question, self.prompt_tokens(question.question))

    def _check_prompt(self, question: Question, prompt: Sequence[int]) -> None:
        limit, needs = self.config.max_prompt_length, "needs"
        needed = len(prompt)
        if self.config.retrieve_first:  # its documents are cut to fit, but some must fit
            needs = "needs, with room for a first search,"
            needed += self.first_search_room(question.question)
        if needed > limit:
            raise DataError(
                f"the prompt of question {question.id} ({question.question[:60]!r}) {needs} "
                f"{needed} tokens, more than rollout.max_prompt_length={limit}: raise the limit or "
                "leave the question out"
            )
