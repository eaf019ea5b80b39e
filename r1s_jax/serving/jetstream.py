"""Serving through JetStream: a search ends one of its requests and begins the next.

Decoding is greedy. After every search the whole sequence is prefilled again. If a client goes away,
its slot stays busy until the current JetStream request ends.
"""

import asyncio
import logging
import queue
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from r1s_jax.config import RolloutConfig, SearchConfig
from r1s_jax.models.pretrained import Pretrained
from r1s_jax.models.sharding import shard_params
from r1s_jax.retrieval.api import Retriever
from r1s_jax.rollout.trajectory import Finish
from r1s_jax.serving.jetstream_engine import ActiveRequest, SearchEngine, start_driver
from r1s_jax.serving.jobs import Job, Jobs, Update
from r1s_jax.serving.turns import Event, Turns

logger = logging.getLogger(__name__)


class JetStreamLoop(Jobs):
    """See the module; one thread per slot."""

    greedy_only = True

    def __init__(
        self,
        policy: Pretrained,
        retriever: Retriever,
        config: RolloutConfig,
        *,
        search: SearchConfig | None = None,
        waiting: int = 256,
        compute_dtype: np.dtype | None = None,
    ):
        """Raises ConfigError for more than one device."""
        super().__init__(policy, config, search, waiting, compute_dtype=compute_dtype)
        self.engine.broker.begin(retriever)
        params = shard_params(policy.params, policy.model, self.engine.mesh)
        self._driver = start_driver(SearchEngine(self.engine, self.engine.programs.prepare(params)))
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.slots_busy = 0
        self._threads = [
            threading.Thread(target=self._work, daemon=True) for _ in range(config.slots)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Accepts no more jobs, finishes the accepted ones and stops the driver."""
        super().close()
        for thread in self._threads:
            thread.join()
        self._driver.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                job = self._queue.popleft()
                self.slots_busy += 1
            try:
                self._answer(job)
            except Exception as error:
                logger.exception("an answer failed")
                text = f"the policy failed: {type(error).__name__}"
                job.update(Update([], [], [], Finish.ABORTED, text))
            with self._changed:
                self.slots_busy -= 1

    def _answer(self, job: Job) -> None:
        turns = _Turns(
            config=self.config,
            eos_ids=self.engine.eos_ids,
            broker=self.engine.broker,
            decode=self.engine.decode,
            driver=self._driver,
            loop=self._loop,
            most=job.max_tokens or self.config.max_length,
        )
        last: Event | None = None  # reported once it is known whether it is the last one
        for event in turns.run(job.prompt, None):
            self.engine.broker.take_log()
            if job.cancelled:
                return
            full = job.max_tokens is not None and job.wrote >= job.max_tokens
            if last:
                job.update(_update(last, Finish.LENGTH if full else Finish.NONE))
            if full:
                return
            by_policy = event.kind == "policy"
            job.wrote += len(event.tokens) * by_policy
            self.tokens += len(event.tokens) * by_policy
            self.documents += len(event.tokens) * (not by_policy)
            last = event
        if last:
            job.update(_update(last, turns.finish))


def _update(event: Event, finish: Finish) -> Update:
    mask = [event.kind == "policy"] * len(event.tokens)
    return Update(event.tokens, mask, list(event.searches), finish)


@dataclass(kw_only=True)
class _Turns(Turns):
    """A trajectory whose tokens JetStream samples."""

    driver: Any
    loop: asyncio.AbstractEventLoop
    most: int  # the most tokens that the policy may write

    _stream: queue.Queue | None = None

    def _sample(self, key: Any) -> int:
        if self._stream is None or (token := self._stream.get()) is None:
            self._stream = self._request()
            token = self._stream.get()
        if token is None:
            raise RuntimeError("JetStream ended a request without a token")
        if isinstance(token, Exception):
            raise token
        self.tokens.append(token)
        self.mask.append(True)
        return token

    def _search(self, turn: list[int]) -> Event:
        self._stream = None
        return super()._search(turn)

    def _request(self) -> queue.Queue:
        """Requests the continuation of all tokens so far; the queue gets its tokens, then None."""
        out: queue.Queue = queue.Queue()
        room = min(self.most - sum(self.mask), self.config.max_length - len(self.tokens))

        async def forward() -> None:
            from jetstream.core.utils.async_multifuture import AsyncMultifuture

            try:
                channel = AsyncMultifuture()
                request = ActiveRequest(
                    max_tokens=max(room, 1),
                    return_channel=channel,
                    history_path="given whole",  # without it JetStream puts a token in front
                    prefill_content=np.array(self.tokens, np.int32),
                    is_client_side_tokenization=True,
                )
                self.driver.place_request_on_prefill_queue(request)
                async for samples in channel:
                    for token in samples[0].token_ids:
                        out.put(token)
                out.put(None)
            except Exception as error:
                out.put(error)

        asyncio.run_coroutine_threadsafe(forward(), self.loop)
        return out
