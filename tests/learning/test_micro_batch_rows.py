"""The number of micro-batch rows where a recipe leaves it open."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from r1s_jax.config import override
from r1s_jax.configs import tiny_world
from r1s_jax.learning import micro_batch_rows as module
from r1s_jax.learning.micro_batch_rows import micro_batch_rows, most_rows
from tests import makers

OPEN = override(tiny_world.config(), ["optimizer.micro_batch_rows=0", "rollout.max_length=160"])


@pytest.mark.parametrize(
    ("sequences", "pack_length", "shards", "rows"),
    [(64, 160, 1, 8), (64, 320, 1, 4), (64, 160, 4, 2), (40, 160, 1, 4), (2, 160, 1, 1)],
)
def test_at_most_eight_passes_take_the_longest_batch(sequences, pack_length, shards, rows):
    config = override(OPEN, [f"optimizer.pack_length={pack_length}"])
    assert most_rows(config, sequences, shards) == rows


@pytest.mark.slow
def test_memory_limits_the_micro_batch_rows(monkeypatch, capsys):
    learner = makers.make_learner()
    state = learner.init(makers.make_params())
    assert micro_batch_rows(OPEN, learner, state, 64) == 8
    assert "optimizer.micro_batch_rows: 8 at a time (the update takes" in capsys.readouterr().err
    sizes = {rows: module._bytes(OPEN, learner, state, 64, rows) for rows in (8, 4, 1)}
    assert sizes[1] < sizes[4] < sizes[8]
    for memory, rows, warned in [(sizes[4], 4, False), (sizes[1] / 2, 1, True)]:
        free = memory / module._MARGIN + 1
        monkeypatch.setattr(module, "_memory", lambda *_, free=free: free)
        assert micro_batch_rows(OPEN, learner, state, 64) == rows
        assert ("slow or killed" in capsys.readouterr().err) == warned
    fixed = dataclasses.replace(OPEN.optimizer, micro_batch_rows=3)
    assert micro_batch_rows(dataclasses.replace(OPEN, optimizer=fixed), learner, state, 64) == 3


def test_the_update_that_was_measured_is_the_one_that_runs():
    learner = makers.make_learner()
    params = makers.make_params()
    batch, micro = makers.packed(makers.make_sequences())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
    expected = makers.step(learner, batch, micro)
    program = learner.compile(learner.init(params, keep_reference=True), shapes)
    assert learner.compiled == {batch.tokens.shape: program}
    got = makers.step(learner, batch, micro)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(("length", "rows"), [(1024, 2), (4096, 1)])
def test_on_a_cpu_a_pass_takes_few_tokens(monkeypatch, length, rows):
    config = override(OPEN, [f"rollout.max_length={length}"])
    learner = makers.make_learner()
    assert most_rows(config, 1024, 1) == 128
    monkeypatch.setattr(module, "_bytes", lambda *_: 0.0)
    state = learner.init(makers.make_params())
    assert micro_batch_rows(config, learner, state, 1024) == rows


def test_what_a_device_holds_besides_the_state_is_not_free():
    """Such as a teacher."""

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 1000, "bytes_in_use": 500}

    device = Device()
    data = SimpleNamespace(nbytes=100)
    shards = [SimpleNamespace(data=data, device=d) for d in (device, device, Device())]
    learner = SimpleNamespace(mesh=SimpleNamespace(local_devices=[device]))
    state = SimpleNamespace(addressable_shards=shards)
    assert module._memory(learner, state) == 1000 - (500 - 200)
