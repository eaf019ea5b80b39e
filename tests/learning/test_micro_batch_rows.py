"""The number of micro-batch rows where a recipe leaves it open."""

import dataclasses
from types import SimpleNamespace

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
    assert "optimizer.micro_batch_rows: 8 rows at a time" in capsys.readouterr().err
    sizes = {rows: module._bytes(OPEN, learner, state, 64, rows) for rows in (8, 4, 2)}
    assert sizes[2] < sizes[4] < sizes[8]
    memory = SimpleNamespace(total=sizes[4] / module._MARGIN + 1)
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: memory)
    assert micro_batch_rows(OPEN, learner, state, 64) == 4
    fixed = dataclasses.replace(OPEN.optimizer, micro_batch_rows=3)
    assert micro_batch_rows(dataclasses.replace(OPEN, optimizer=fixed), learner, state, 64) == 3
