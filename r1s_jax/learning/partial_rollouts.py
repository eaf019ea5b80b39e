"""Partial rollouts: a step learns from the complete groups, and the next step continues the others.

Twice as many groups as a step learns from are in flight. A carried trajectory is prefilled again
under the new parameters, so no entry of the KV cache is stale. Each token keeps the log-probability
under the parameters that sampled it, for the importance ratio of the loss.
"""

import base64
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from r1s_jax.config import Config
from r1s_jax.data.environment import Environment
from r1s_jax.data.question_forms import Question
from r1s_jax.io.errors import reading
from r1s_jax.models.params import Params
from r1s_jax.models.sharding import batch_shards
from r1s_jax.retrieval.api import Retriever
from r1s_jax.rollout.broker import Search
from r1s_jax.rollout.engine import Engine, Rolled
from r1s_jax.rollout.in_flight import ARRAYS, InFlight, group_numbers
from r1s_jax.rollout.loop import Until
from r1s_jax.rollout.session import Session
from r1s_jax.rollout.trajectory import Position

Group = list[InFlight]  # the samples of one question
_WHERE = "the checkpoint's carried trajectories"


class PartialRollouts:
    """The groups in flight between the steps of a run."""

    def __init__(self, config: Config, engine: Engine, environment: Environment):
        self.config, self.engine, self.environment = config, engine, environment
        self.groups: list[Group] = []

    def roll(self, params: Params, step: int, size: int) -> Rolled:
        """Continues until `size` groups are complete and returns them, oldest first.

        Raises SearchFailure, NotFinite; then newly drawn groups have been added and nothing else
        has changed.
        """
        started = time.perf_counter()
        first_searches = self._draw(step, size)
        missing = size - sum(map(whole, self.groups))
        open_groups = [group for group in self.groups if not whole(group)]
        counters = self._roll_on(params, open_groups, step, size, missing)
        ready = [group for group in self.groups if whole(group)][:size]
        self.groups = [group for group in self.groups if all(group is not r for r in ready)]
        self._expire_old_ones(step)
        flights = [flight for group in ready for flight in group]
        rows = [f for flight in flights for f in flight.tree.values()]
        ages = np.zeros((len(rows), self.config.rollout.max_length), np.int32)
        for row, flight in enumerate(rows):
            ages[row, : len(flight.tokens)] = np.where(flight.loss_mask, step - flight.drawn, 0)
        rolled = self.engine.rolled(
            flights,
            seconds=time.perf_counter() - started,
            counters=counters,
            ages=ages,
            carried=sum(bool(f.loss_mask.any()) and not f.over for g in self.groups for f in g),
        )
        return replace(rolled, outcomes=dict(first_searches + Counter(rolled.outcomes)))

    def _draw(self, step: int, size: int) -> Counter[str]:
        """Draws groups until 2 * size are in flight; returns the outcomes of their first searches,
        which the system makes with `rollout.retrieve_first`."""
        draw, first_searches, broker = 0, Counter[str](), self.engine.broker
        while len(self.groups) < 2 * size:
            batch = self.environment.batch(step, size, draw)
            broker.begin(batch.retriever)
            samples = self.config.algorithm.samples_per_question
            flights = self.engine.begin(batch.questions, samples=samples, step=step, draw=draw)
            broker.share()
            broker.check()
            first_searches += broker.counts
            self.groups += split(flights)
            draw += 1
        return first_searches

    def _roll_on(
        self, params: Params, groups: Sequence[Group], step: int, size: int, missing: int
    ) -> dict[str, np.ndarray]:
        """Samples until `missing` of `groups` are complete; returns the loop's counters."""
        if missing <= 0:
            self.engine.broker.begin(None)
            names = ("decode_steps", "prefill_chunks", "prefill_tokens", "busy", "room")
            names += ("forks", "forks_left_out") if self.config.rollout.forks else ()
            return {name: np.zeros(1, int) for name in names}
        engine, shards = self.engine, batch_shards(self.engine.mesh)
        placed = self._places(groups, size, shards)
        retrievers: dict[tuple[int, int], Retriever] = {}

        def retriever(flight: InFlight) -> Retriever:
            batch = flight.step, flight.draw
            if batch not in retrievers:
                retrievers[batch] = self.environment.retriever_of(*batch)
            return retrievers[batch]

        size = self.config.rollout.tree_rows
        by_row = [f and retriever(f) for f in placed for _ in range(size)]
        engine.broker.begin(None, by_row, steady=True)
        engine.broker.others = engine.others(placed)
        prompts = engine.prompts(placed, self.config.seed, self.config.rollout.max_length)
        session = Session(engine.programs, params, prompts, engine.tag_table)
        session.run(Until(groups=-(-missing // shards)))
        engine.broker.share()
        engine.broker.check()
        (trajectory, counters), at = session.results(), session.positions()
        engine.absorb(placed, trajectory, step=step, at=at)
        return counters

    def _places(self, groups: Sequence[Group], size: int, shards: int) -> list[InFlight | None]:
        """All trajectories that have not ended, forks included; groups go to the shards in turn.

        The number of rows is the same at every step of a stage, so that the loop compiles once.
        """
        samples = self.config.algorithm.samples_per_question
        rows = samples * max(-(-2 * size // shards), -(-len(groups) // shards))
        placed: list[InFlight | None] = []
        for shard in range(shards):
            mine = [f for group in groups[shard::shards] for f in group if not f.over]
            placed += [*mine, *[None] * (rows - len(mine))]
        return placed

    def _expire_old_ones(self, step: int) -> None:
        for group in self.groups:
            for flight in group:
                if step - flight.step >= self.config.rollout.max_staleness:
                    flight.expire()

    # Checkpoints.

    def state(self) -> str | None:
        """The in-flight groups as text (compressed MessagePack in base64); None without any."""
        if not self.groups:
            return None
        saved = [[_Saved.of(flight) for flight in group] for group in self.groups]
        # A step waits for this: the fastest level of compression, and base64, which runs in C.
        return base64.b64encode(zlib.compress(msgspec.msgpack.encode(saved), 1)).decode()

    def restore(self, state: str | None) -> None:
        """Restores what `state` returned. Raises BadInput where it is damaged."""
        if not state:
            self.groups = []
            return
        with reading(_WHERE):
            packed = zlib.decompress(base64.b64decode(state, validate=True))
            saved = msgspec.msgpack.decode(packed, type=list[list[_Saved]])
            self.groups = [[flight.flight() for flight in group] for group in saved]


def whole(group: Group) -> bool:
    """Whether every trajectory of the group has ended, forks included."""
    return all(flight.over for flight in group)


def split(flights: Sequence[InFlight]) -> list[Group]:
    """Splits trajectories into groups: neighbours with the same group number."""
    groups: list[Group] = []
    for number, flight in zip(group_numbers(flights), flights, strict=True):
        if number == len(groups):
            groups.append([])
        groups[-1].append(flight)
    return groups


_SEARCH = ("trajectory", "query", "outcome", "documents", "seconds", "detail", "number")


class _Saved(msgspec.Struct):
    """An in-flight trajectory in a checkpoint."""

    question: Question
    sample: int
    occurrence: int
    step: int
    draw: int
    prompt_length: int
    start: int
    arrays: dict[str, bytes]
    at: list[int]
    found: int
    finish: int
    searches: list[dict[str, Any]]
    node: int = 0
    forked: int = 0
    shared: int = 0
    forks: list["_Saved"] = []

    @staticmethod
    def of(f: InFlight) -> "_Saved":
        arrays = {n: getattr(f, n).astype(kind).tobytes() for n, kind in ARRAYS.items()}
        searches = [{name: getattr(s, name) for name in _SEARCH} for s in f.searches]
        same = {name: getattr(f, name) for name in _SAME}
        forks = [_Saved.of(fork) for fork in f.forks.values()]
        return _Saved(**same, at=list(f.at), arrays=arrays, searches=searches, forks=forks)

    def flight(self) -> InFlight:
        """The trajectory; raises ValueError, KeyError or TypeError for inconsistent parts."""
        saved = {"kept": b"", "log_kept": bytes(len(self.arrays["policy_logprobs"]))} | self.arrays
        arrays: dict[str, Any] = {
            n: np.frombuffer(saved[n], kind).copy() for n, kind in ARRAYS.items()
        }
        tokens = len(arrays["tokens"])
        arrays["kept"] = arrays["kept"].reshape(tokens, len(arrays["kept"]) // max(1, tokens))
        if len({len(array) for array in arrays.values()}) != 1:
            raise ValueError("its arrays differ in length")
        same = {name: getattr(self, name) for name in _SAME}
        searches = [Search(**{**s, "documents": tuple(s["documents"])}) for s in self.searches]
        forks = {fork.node: fork.flight() for fork in self.forks}
        return InFlight(**same, **arrays, at=self._position(), searches=searches, forks=forks)

    def _position(self) -> tuple[int, ...]:
        """The position; one saved before there were forks has two numbers less."""
        at = self.at if len(self.at) != 6 else [*self.at[:5], 0, 0, self.at[5]]
        return tuple(Position(*at))


_PARTS = ("arrays", "at", "searches", "forks")
_SAME = tuple(n for n in _Saved.__struct_fields__ if n not in _PARTS)
