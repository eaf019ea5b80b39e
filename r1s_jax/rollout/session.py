"""A rollout that can be paused and resumed."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from r1s_jax.models.params import Params
from r1s_jax.rollout.loop import Rollout, Until
from r1s_jax.rollout.state import Phase, State
from r1s_jax.rollout.trajectory import Position, Prompts, Trajectory
from r1s_jax.system.distributed import to_host


class Programs(NamedTuple):
    """The search loop, compiled: whole, and as the parts that a session calls."""

    whole: Callable[..., Any]
    prepare: Callable[..., Params]
    start: Callable[..., State]
    run: Callable[..., State]
    results: Callable[..., Any]
    admit: Callable[..., State]

    @staticmethod
    @lru_cache(maxsize=8)
    def of(roll: Rollout) -> "Programs":
        """`whole` and `prepare` take the learner's parameters, adapters included.

        Equal loops share their programs.
        """
        return Programs(
            whole=jax.jit(roll),
            prepare=jax.jit(roll.prepare),
            start=jax.jit(roll.start),
            run=jax.jit(roll.run, donate_argnums=3),
            results=jax.jit(roll.results),
            admit=jax.jit(roll.admit, donate_argnums=1),
        )


class Session:
    """One batch of prompts in the loop.

    Pausing changes no token. Searches that are pending at a pause are answered after it, so the
    broker must not begin another rollout in between.
    """

    def __init__(
        self, programs: Programs, params: Params, prompts: Prompts, tag_table: Int[Array, "Q V"]
    ):
        """`params` are the learner's, `prompts` on the mesh."""
        self._programs, self._prompts, self._tag_table = programs, prompts, tag_table
        self._params = programs.prepare(params)
        self._state = programs.start(prompts)

    def run(self, until: Until | None = None) -> None:
        """Runs to the end, or to `until`."""
        until = Until() if until is None else until
        self._state = self._programs.run(
            self._params, self._prompts, self._tag_table, self._state, until
        )

    @property
    def over(self) -> bool:
        """Whether every trajectory has ended."""
        return bool((to_host(self._state.slots.phase) == Phase.EMPTY).all())

    def results(self) -> tuple[Trajectory[np.ndarray], dict[str, np.ndarray]]:
        """The trajectories, finished or not, and the loop's counters by shard."""
        return to_host(self._programs.results(self._state))

    def positions(self) -> Position[np.ndarray]:
        """The position of each unfinished trajectory."""
        slots, begins = to_host((self._state.slots, self._state.at))
        count, shards = len(self._prompts.lengths), len(self._state.busy)
        shard = np.repeat(np.arange(shards), len(slots.row) // shards)
        busy = slots.phase != Phase.EMPTY
        rows = (shard * (count // shards) + slots.row)[busy]

        def by_row(begin: np.ndarray, values: np.ndarray) -> np.ndarray:
            out = begin.copy()
            out[rows] = values[busy]
            return out

        asked = np.isin(slots.phase, (Phase.SUBMIT, Phase.WAIT)).astype(np.int32)
        now = {name: getattr(slots, name) for name in Position._fields if name != "asked"}
        now["asked"] = asked
        return Position(*(by_row(getattr(begins, name), now[name]) for name in Position._fields))
