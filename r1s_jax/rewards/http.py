"""Rewards from a server, by the contract of R1-Searcher's released reward servers.

`POST /get_reward {"query": ["prompt and solution", ...]}` is answered `{"rewards": [0.5, ...]}`.
"""

import math
from collections.abc import Sequence

import urllib3

from r1s_jax.border.errors import UserError
from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards.rules import Reward, reward_parts
from r1s_jax.system.distributed import on_main

_TIMEOUT_S = 300.0  # a server may score a whole batch with a model of its own
_RETRIES = 5  # with growing pauses: half a minute in all


class RewardServerError(UserError, RuntimeError):
    """A reward server that does not answer, or answers something else than rewards."""


class HttpReward:
    """Asks one server for the rewards of a batch; with several processes, the first one asks."""

    def __init__(self, url: str):
        self.url = url
        retry = urllib3.Retry(
            _RETRIES,
            backoff_factor=0.5,
            status_forcelist=(429, 502, 503, 504),
            allowed_methods=None,
        )
        self._pool = urllib3.PoolManager(timeout=_TIMEOUT_S, retries=retry)

    def __call__(
        self,
        prompts: Sequence[str],
        solutions: Sequence[Solution],
        golds: Sequence[Sequence[str]],
    ) -> list[Reward]:
        """The rewards of solutions to rendered prompts, with our own parts beside them.

        Raises RewardServerError, also for an answer of another length or with a number that is
        not finite.
        """
        queries = [prompt + s.text for prompt, s in zip(prompts, solutions, strict=True)]
        values = on_main(lambda: self._ask(queries))
        return [
            Reward(value, reward_parts(solution, gold))
            for value, solution, gold in zip(values, solutions, golds, strict=True)
        ]

    def _ask(self, queries: list[str]) -> list[float]:
        try:
            response = self._pool.request("POST", self.url, json={"query": queries})
            if response.status != 200:
                raise ValueError(f"status {response.status}: {response.data[:200]!r}")
            values = [float(value) for value in response.json()["rewards"]]
            if len(values) != len(queries) or not all(map(math.isfinite, values)):
                raise ValueError(
                    f"{len(values)} rewards for {len(queries)} solutions, or one is not finite"
                )
        except (urllib3.exceptions.HTTPError, ValueError, KeyError, TypeError) as error:
            raise RewardServerError(
                f"the reward server {self.url} gave no rewards: {type(error).__name__}: {error}. "
                "Check it, then go on with --resume."
            ) from error
        return values
