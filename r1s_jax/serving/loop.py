"""Serving with the search loop of training, entered for a few iterations at a time.

Between two entries finished answers leave their slots and new ones take them, so that answers begin
and end at any time and searches overlap. An answer depends on its prompt, seed and settings alone,
not on the other answers.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from r1s_jax.config import Attention, RolloutConfig, SearchConfig
from r1s_jax.models.pretrained import Pretrained
from r1s_jax.models.sharding import batch_sharding, place, shard_params
from r1s_jax.retrieval.api import Retriever
from r1s_jax.rollout.broker import Search
from r1s_jax.rollout.loop import Until
from r1s_jax.rollout.trajectory import Finish, Prompts, Settings
from r1s_jax.serving.jobs import Job, Jobs, Update
from r1s_jax.system.distributed import to_host

logger = logging.getLogger(__name__)

# Iterations per entry: fewer start new requests sooner, more save overhead between entries.
_ITERATIONS = 4
_BITS = 0xFFFFFFFF


class ServingLoop(Jobs):
    """One policy with its retriever; one thread runs all slots."""

    def __init__(
        self,
        policy: Pretrained,
        retriever: Retriever,
        config: RolloutConfig,
        *,
        search: SearchConfig | None = None,
        waiting: int = 256,
        attention: Attention = "auto",
        compute_dtype: np.dtype | None = None,
    ):
        """At most `waiting` answers wait for a slot. Compiles, which may take a minute."""
        engine = {"attention": attention, "compute_dtype": compute_dtype}
        super().__init__(policy, config, search, waiting, **engine)
        mesh, programs = self.engine.mesh, self.engine.programs
        self._params = programs.prepare(shard_params(policy.params, policy.model, mesh))
        self._prompts = _unused_rows(self.rows, config.max_length, self.engine.broker.number)
        self._state = programs.start(self._placed())
        self.engine.broker.begin(retriever)
        self._jobs: dict[int, Job] = {}  # by row
        self._thread = threading.Thread(target=self._work, name="serving_loop", daemon=True)
        self._thread.start()
        self._warm_up()

    @property
    def slots_busy(self) -> int:
        return len(self._jobs)

    def close(self) -> None:
        """Accepts no more jobs and finishes the accepted ones."""
        super().close()
        self._thread.join()

    # On the thread.

    def _work(self) -> None:
        try:
            while self._wait():
                new, ended = self._replace_rows()
                if new or ended:
                    self._admit(new, ended)
                if self._jobs:
                    self._state = self.engine.programs.run(
                        self._params,
                        self._on_mesh,
                        self.engine.tag_table,
                        self._state,
                        Until(iterations=_ITERATIONS),
                    )
                    self.engine.broker.check()  # a stopped broker would answer no more searches
                    self._report()
        except Exception as error:
            logger.exception("the serving loop stopped")
            with self._changed:
                self.failed = f"the policy failed: {type(error).__name__}"
                unfinished = [*self._jobs.values(), *self._queue]
                self._jobs, self._queue = {}, deque()
            for job in unfinished:
                job.update(Update([], [], [], Finish.ABORTED, self.failed))

    def _wait(self) -> bool:
        """Waits for jobs; False once closed and all jobs are done."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._queue or self._closed)
            return bool(self._jobs or self._queue)

    def _replace_rows(self) -> tuple[list[int], list[int]]:
        """Frees cancelled rows and fills free ones from the queue; returns (new, ended) rows."""
        with self._changed:
            ended = [row for row, job in self._jobs.items() if job.cancelled]
            for row in ended:
                del self._jobs[row]
            free = [row for row in range(self.rows) if row not in self._jobs]
            new = free[: len(self._queue)]
            for row in new:
                self._jobs[row] = self._queue.popleft()
        return new, ended

    def _admit(self, new: list[int], ended: list[int]) -> None:
        self.engine.broker.forget({*new, *ended})
        p, settings = self._prompts, self._prompts.settings
        assert settings is not None  # _unused_rows makes them
        for row in new:
            job, length = self._jobs[row], len(self._jobs[row].prompt)
            job.seen = length
            p.tokens[row, :length] = job.prompt
            p.lengths[row] = p.prompt_lengths[row] = p.at.turn_start[row] = length
            p.groups[row] = job.group
            p.keys[row] = _key_data(job.seed, job.sample)
            settings.temperature[row], settings.top_p[row] = job.temperature, job.top_p
        masks = [np.isin(np.arange(self.rows), rows) for rows in (new, ended)]
        masks = place(masks, batch_sharding(self.engine.mesh))
        self._state = self.engine.programs.admit(self._placed(), self._state, *masks)

    def _placed(self) -> Prompts:
        p = jax.tree.map(np.copy, self._prompts)  # JAX may read placed arrays later
        p = p._replace(keys=jax.random.wrap_key_data(jnp.asarray(p.keys)))
        self._on_mesh = place(p, batch_sharding(self.engine.mesh))
        return self._on_mesh

    def _report(self) -> None:
        """Sends every job its update, and frees the slots of finished answers."""
        t, _ = to_host(self.engine.programs.results(self._state))
        searches: dict[int, list[Search]] = {}
        for search in [*self.engine.broker.take_log(), *self.engine.broker.pending()]:
            turn_searches = search.turn.searches if search.turn else [search]  # in call order
            searches.setdefault(search.trajectory, []).extend(turn_searches)
        over = []
        for row, job in list(self._jobs.items()):
            if job.cancelled:
                continue
            new = slice(job.seen, max(job.seen, int(t.lengths[row])))
            finish = Finish(int(t.finish[row]))
            update = self._new(job, t.tokens[row, new], t.loss_mask[row, new], finish)
            update = update._replace(searches=_unreported(job, searches.get(row, [])))
            if update.finish:
                over.append(row)
                if not finish:
                    job.cancelled = True  # the job's own limit, which the program does not know
            if update.tokens or update.searches or update.finish:
                job.update(update)
        with self._changed:
            for row in over:
                if not self._jobs[row].cancelled:
                    del self._jobs[row]

    def _new(self, job: Job, tokens: np.ndarray, mask: np.ndarray, finish: Finish) -> Update:
        """The new tokens, cut at the job's own limit."""
        if job.max_tokens is not None:
            wrote = job.wrote + np.cumsum(mask)
            if (full := np.flatnonzero(mask & (wrote == job.max_tokens))).size:
                last = full[0] + 1
                finish = finish if finish and last == len(tokens) else Finish.LENGTH
                tokens, mask = tokens[:last], mask[:last]
        job.seen += len(tokens)
        job.wrote += int(mask.sum())
        self.tokens += int(mask.sum())
        self.documents += int((~mask).sum())
        return Update(tokens.tolist(), mask.tolist(), [], finish)

    def _warm_up(self) -> None:
        done = threading.Event()
        prompt = self.engine.prompt_tokens("?")[: self.config.max_length - 1]

        def update(new: Update) -> None:
            if new.finish:
                done.set()

        self.submit([Job(prompt, 0, update, max_tokens=1)])
        done.wait()
        if self.failed:
            raise RuntimeError(f"{self.failed}; the log has its traceback")
        self.tokens = self.documents = 0


def _unreported(job: Job, searches: Sequence[Search]) -> list[Search]:
    """Searches not yet reported, or whose outcome changed; marks them reported."""
    outcomes, unreported = {id(search): outcome for search, outcome in job.reported}, []
    for search in searches:
        if outcomes.get(id(search)) != search.outcome:
            job.reported.append((search, search.outcome))
            outcomes[id(search)] = search.outcome
            unreported.append(search)
    return unreported


def _key_data(seed: int, sample: int) -> np.ndarray:
    key = jax.random.fold_in(jax.random.key(seed & _BITS), sample)
    return np.asarray(jax.random.key_data(key))


def _unused_rows(rows: int, width: int, broker: int) -> Prompts[np.ndarray]:
    """Writable NumPy arrays of unused rows."""
    zeros = np.zeros(rows, np.int32)
    prompts = Prompts.fresh(
        tokens=np.zeros((rows, width), np.int32),
        lengths=np.ones(rows, np.int32),
        groups=-1 - np.arange(rows, dtype=np.int32),
        keys=np.stack([_key_data(0, 0)] * rows),
        live=np.zeros(rows, bool),
        limits=np.full(rows, width, np.int32),
        broker=broker,
    )
    settings = Settings(np.zeros(rows, np.float32), np.ones(rows, np.float32))
    copies = jax.tree.map(np.copy, prompts._replace(settings=settings))
    return copies._replace(at=type(copies.at)(*(zeros.copy() for _ in copies.at)))
