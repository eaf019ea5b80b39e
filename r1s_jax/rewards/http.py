"""Rewards from a server, by the protocol of R1-Searcher's released reward servers.

`POST /get_reward {"query": ["prompt and solution", ...]}` is answered `{"rewards": [0.5, ...]}`.
"""

import math
from collections.abc import Sequence

import msgspec

from r1s_jax.io.errors import BadInput, UserError, shorten
from r1s_jax.io.http import Client, without_credentials
from r1s_jax.io.json import parse_object
from r1s_jax.io.schema import check
from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards.rules import Reward, reward_parts

_TIMEOUT_S = 300.0  # a server may score a whole batch with a model of its own
_RETRIES = 5  # with growing pauses: half a minute in all


class RewardServerError(UserError, RuntimeError):
    """A reward server does not answer, or its reply is not a list of rewards."""


class _Rewards(msgspec.Struct):
    """The reply of a server."""

    rewards: list[float]


class HttpReward:
    """Asks one server for the rewards of a batch."""

    def __init__(self, url: str):
        self.url = url
        self._client = Client(timeout_s=_TIMEOUT_S, retries=_RETRIES)

    def __call__(
        self,
        prompts: Sequence[str],
        solutions: Sequence[Solution],
        golds: Sequence[Sequence[str]],
    ) -> list[Reward]:
        """The rewards of solutions to rendered prompts; the parts are computed here.

        Raises RewardServerError if the server fails, or replies with a wrong number of rewards or
        with one that is not finite.
        """
        queries = [prompt + s.text for prompt, s in zip(prompts, solutions, strict=True)]
        values = self._ask(queries)
        return [
            Reward(value, reward_parts(solution, gold))
            for value, solution, gold in zip(values, solutions, golds, strict=True)
        ]

    def _ask(self, queries: list[str]) -> list[float]:
        where = f"the reward server {without_credentials(self.url)}"
        try:
            reply = parse_object(self._client.post(self.url, {"query": queries}), where)
            rewards = check(reply, _Rewards, where).rewards
            if len(rewards) != len(queries) or not all(map(math.isfinite, rewards)):
                raise BadInput(
                    f"{len(rewards)} rewards for {len(queries)} solutions, or one is not finite"
                )
        except UserError as error:
            raise RewardServerError(
                f"{where} gave no rewards: {shorten(str(error), 200)}. "
                "Check the server, then go on with --resume."
            ) from error
        return rewards
