"""The job of one of several processes in a test: `python -m tests.distributed_worker JOB DIR`."""

import random
import sys
import traceback
from pathlib import Path

from r1s_jax.config import CorpusConfig, EvalConfig, override
from r1s_jax.configs import tiny_world
from r1s_jax.data.environment import Batch, TinyWorldEnvironment
from r1s_jax.system.distributed import (
    ProcessError,
    check_alike,
    gather,
    is_main,
    join,
    leave,
    on_main,
    together,
)
from tests.fakes import RaisingRetriever

# The tiny world with small numbers: every part of a run, in seconds.
SHORT = (
    "cold_start.steps=4",
    "cold_start.cooldown_steps=2",
    "cold_start.batch_size=8",
    "stage1.steps=1",
    "stage1.questions_per_step=4",
    "stage2.steps=2",
    "stage2.questions_per_step=4",
    "eval.questions=0",
    "rollout.slots=8",
    "rollout.prefill_rows=4",
    "rollout.max_length=192",
    "rollout.max_prompt_length=96",
    "rollout.retrieve_first=true",
    "algorithm.samples_per_question=4",
)


def agree(_: Path) -> None:
    """Values and errors reach every process."""
    import jax

    me = jax.process_index()
    assert gather({"me": me, "long": "x" * 1000 * me}) == [
        {"me": i, "long": "x" * 1000 * i} for i in range(jax.process_count())
    ]
    assert on_main(lambda: f"from {me}") == "from 0"
    try:
        on_main(lambda: 1 / 0)
    except ProcessError as error:
        assert str(error) == "process 0: division by zero"
    else:
        raise AssertionError("the main process' error did not arrive")

    def fails_on_the_last() -> int:
        if me == jax.process_count() - 1:
            raise FileNotFoundError("no index here")
        return me

    try:
        together(fails_on_the_last)
    except ProcessError as error:
        assert str(error) == f"process {jax.process_count() - 1}: no index here"
    else:
        raise AssertionError("the last process' error did not arrive")
    assert together(lambda: me) == me
    assert is_main() == (me == 0)
    check_alike("colour", lambda: "red")
    try:
        check_alike("colour", lambda: me)
    except ProcessError as error:
        assert "process 1 has another colour than process 0" in str(error)
    else:
        raise AssertionError("two colours were taken for one")
    decide_alike(me)
    print("agreed")


def decide_alike(me: int) -> None:
    """Decisions that each process would make differently by itself."""
    import signal
    from types import SimpleNamespace

    import jax
    import numpy as np

    from r1s_jax.learning import micro_batch_rows
    from r1s_jax.learning.collect import Collector
    from r1s_jax.protocol.solution import Solution
    from r1s_jax.rewards.registry import batch_reward
    from r1s_jax.tracking.run_dir import StopRequest

    rewards = {name: batch_reward(f"{__spec__.name}:{name}") for name in ("lottery", "on_the_last")}
    collector = Collector.__new__(Collector)
    collector.rewards, collector.engine = rewards, SimpleNamespace(render=str)
    questions = [SimpleNamespace(question="q", answers=("a",))] * 3
    rolled = SimpleNamespace(questions=questions, solutions=[Solution.of_text("a")] * 3)
    drawn = gather([reward.value for reward in collector.reward(rolled, "lottery")])
    assert all(values == drawn[0] for values in drawn) and len(set(drawn[0])) == 3
    assert [reward.value for reward in collector.reward(rolled, "on_the_last")] == [0.0] * 3
    rewards["fails"] = batch_reward(f"{__spec__.name}:fails")
    try:
        collector.reward(rolled, "fails")
    except ProcessError as error:
        assert "process 0" in str(error) and "no reward today" in str(error)
    else:
        raise AssertionError("the error of a reward did not arrive")

    micro_batch_rows._memory = lambda learner, state: 100.0 * (me + 1)
    micro_batch_rows._bytes = lambda config, learner, state, sequences, rows: 20.0 * rows
    config = override(
        tiny_world.config(), ["optimizer.micro_batch_rows=0", "rollout.max_length=160"]
    )
    devices = np.array(jax.local_devices()[:1])
    learner = SimpleNamespace(mesh=SimpleNamespace(shape={"data": 1, "fsdp": 1}, devices=devices))
    assert (
        micro_batch_rows.micro_batch_rows(config, learner, None, 64) == 4
    )  # from the memory of process 0

    with StopRequest() as stop:
        if me == 1:
            signal.raise_signal(signal.SIGTERM)
        assert not stop.requested  # or the loop of this process alone would end
        assert stop.agree() == stop.requested == "SIGTERM"


def lottery(solution, golds) -> float:
    """A user's reward with random values, different in each process."""
    return random.random()


def on_the_last(solution, golds) -> float:
    """A user's reward that fails in all processes except process 0."""
    import jax

    return 0.0 if jax.process_index() == 0 else 1 / 0


def fails(solution, golds) -> float:
    """A user's reward that fails in process 0."""
    import jax

    return 1 / 0 if jax.process_index() else float("no reward today")


def own_reward(run_dir: Path) -> None:
    """A whole run with a random reward; prints a digest of the final parameters."""
    import hashlib

    import jax

    from r1s_jax import train as box

    learn = box.Run.learn

    def noted(self, state, stop, trace):
        state = learn(self, state, stop, trace)
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(state.params):
            digest.update(jax.device_get(leaf.addressable_data(0)).tobytes())
        print(f"parameters {digest.hexdigest()}")
        return state

    box.Run.learn = noted
    reward = f"{__spec__.name}:lottery"
    more = (f"stage1.reward={reward}", f"stage2.reward={reward}", "mesh.data=2", "mesh.fsdp=1")
    more += ("algorithm.dynamic_sampling=2",)
    box.train(override(tiny_world.config(), (*SHORT, *more)), run_dir)


def pieces(_: Path) -> None:
    """A rollout that all processes leave and enter again at the same points."""
    import numpy as np

    from r1s_jax.config import MeshConfig
    from r1s_jax.models.sharding import make_mesh
    from tests import makers

    engine = makers.make_engine(mesh=make_mesh(MeshConfig()))
    whole = makers.roll(engine).trajectory
    np.testing.assert_array_equal(makers.roll_in_pieces(engine).tokens, whole.tokens)
    print(f"{int(whole.lengths.sum())} tokens")


def failing_search(run_dir: Path) -> None:
    """A whole run in which the retriever of the last process always fails."""
    import jax

    from r1s_jax.train import train

    serve = TinyWorldEnvironment.batch

    def batch(self: TinyWorldEnvironment, step: int, size: int, draw: int = 0) -> Batch:
        drawn = serve(self, step, size, draw)
        last = jax.process_index() == jax.process_count() - 1
        return drawn._replace(retriever=RaisingRetriever()) if last else drawn

    TinyWorldEnvironment.batch = batch
    train(override(tiny_world.config(), SHORT), run_dir)


def served(folder: Path) -> None:
    """Only process 0 opens the index, and all processes search it."""
    from dataclasses import replace

    from r1s_jax.data import environment

    corpus = CorpusConfig((str(folder / "q.jsonl"),), passages=(str(folder / "p.tsv"),))
    config = replace(tiny_world.config(), environment=corpus, eval=EvalConfig(questions=1))
    opened, open_retriever = [], environment.open_retriever

    def noted(config: CorpusConfig):
        opened.append(config.passages)
        return open_retriever(config)

    environment.open_retriever = noted
    config = override(config, ["search.served_by=main"])
    world = environment.open_environment(config, str)
    hits = world.batch(0, 2).retriever.search(["novel Dune by Herbert", "city Rome"], 1)
    local = sum(bool(passages) for passages in opened)
    print(gather(1) and f"{local} opened, found {' | '.join(h[0].line for h in hits)}")


if __name__ == "__main__":
    join()
    try:
        jobs = {f.__name__: f for f in (agree, failing_search, own_reward, pieces, served)}
        jobs[sys.argv[1]](Path(sys.argv[2]))
    except Exception:
        traceback.print_exc()
        leave(1)
