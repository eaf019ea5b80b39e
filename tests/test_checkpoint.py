"""Checkpoints: what is saved comes back, and a failed save costs only itself."""

import resource
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.checkpoint import CheckpointError, Checkpoints
from r1s_jax.update import LearnerState


def state(value: float) -> LearnerState:
    return LearnerState({"w": jnp.full((64, 1024), value)}, {"mu": jnp.full(3, value)})


def test_restores_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.progress() is None
    for i in (1, 2, 3):
        checkpoints.save(i, state(i), {"step": i, "before": None})
    checkpoints.wait()
    again = Checkpoints(tmp_path / "c", keep=2)
    assert again.progress() == {"step": 3, "before": None}
    restored = again.restore(state(0))
    np.testing.assert_array_equal(restored.params["w"], state(3).params["w"])
    np.testing.assert_array_equal(restored.optimizer["mu"], state(3).optimizer["mu"])
    assert sorted(int(p.name) for p in (tmp_path / "c").iterdir()) == [2, 3]


def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path):
    """A limit on the size of files stands in for a disk without room."""
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    checkpoints.save(1, state(1), {"step": 1})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(CheckpointError, match="Earlier checkpoints are whole"):
            checkpoints.save(2, state(2), {"step": 2})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    again = Checkpoints(tmp_path / "c", keep=2)
    assert again.progress() == {"step": 1}
    np.testing.assert_array_equal(again.restore(state(0)).params["w"], state(1).params["w"])
