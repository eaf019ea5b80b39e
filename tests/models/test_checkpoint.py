"""Checkpoints: what is saved comes back, and a failed save costs only itself."""

import importlib
import os
import resource
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.learning.learner import LearnerState
from r1s_jax.models.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint, checksums


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


def test_the_best_is_kept_whatever_its_age(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.best() is None
    checkpoints.save(1, state(1), {"step": 1})
    for i, score in enumerate((0.2, 0.9, 0.3, 0.1, 0.4), start=2):
        checkpoints.save(i, state(i), {"step": i}, score)
    checkpoints.wait()
    assert checkpoints.best() == tmp_path / "c" / "3"
    assert sorted(int(p.name) for p in (tmp_path / "c").iterdir()) == [3, 5, 6]
    again = Checkpoints(tmp_path / "c", keep=2)
    assert again.progress() == {"step": 6} and again.best() == tmp_path / "c" / "3"


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


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def random_state(seed: int) -> LearnerState:
    """Numbers that no compression makes small, in several dtypes."""
    key = jax.random.key(seed)
    params = {"w": jax.random.normal(key, (64, 1024))}
    params["half"] = jax.random.normal(key, (32, 32)).astype(jnp.bfloat16)
    return LearnerState(params, {"mu": jnp.full(3, seed), "count": jnp.int32(seed)})


@pytest.mark.parametrize("what", ["numbers", "description"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, what):
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    for i in (1, 2):
        checkpoints.save(i, random_state(i), {"step": i})
    checkpoints.close()
    files = [p for p in (tmp_path / "c" / "2" / "state").rglob("*") if p.is_file()]
    numbers = max(files, key=lambda p: p.stat().st_size)
    if what == "numbers":
        flip(numbers, numbers.stat().st_size // 2)
    else:
        flip(tmp_path / "c" / "2" / "state" / "_METADATA", 40)
    again = Checkpoints(tmp_path / "c", keep=3)
    with pytest.raises(DamagedCheckpoint, match=rf"checkpoint {tmp_path}/c/2 is damaged.*moved to"):
        again.progress()
        again.restore(random_state(0))
    assert (tmp_path / "damaged-checkpoints" / "2").is_dir()
    sound = Checkpoints(tmp_path / "c", keep=3)
    assert sound.progress() == {"step": 1}
    restored = sound.restore(random_state(0))
    flip(tmp_path / "c" / "1" / "state" / "_METADATA", 40)
    with pytest.raises(CheckpointError, match=r"c/1 is damaged.*there is no other"):
        Checkpoints(tmp_path / "c", keep=3).restore(random_state(0))
    assert (tmp_path / "c" / "1").is_dir()
    for read, saved in zip(
        jax.tree.leaves(restored), jax.tree.leaves(random_state(1)), strict=True
    ):
        np.testing.assert_array_equal(read, saved)


def test_checksums_notice_every_array():
    whole = checksums(random_state(0))
    assert whole == checksums(random_state(0)) and len(whole) == 4
    other = checksums(random_state(1))
    assert all(other[name] != value for name, value in whole.items())


IN_A_BUCKET = """
import jax, jax.numpy as jnp, pytest
from r1s_jax.models.checkpoint import Checkpoints, DamagedCheckpoint, newest_checkpoint
from r1s_jax.learning.learner import LearnerState

def state(seed):
    return LearnerState({"w": jnp.arange(9.0) * seed}, {"mu": jnp.full(3, float(seed))})

checkpoints = Checkpoints("gs://bucket/runs/one/checkpoints", keep=2)
for step in (1, 2, 3):
    checkpoints.save(step, state(step), {"step": step}, score=1.0 / step)
    checkpoints.wait()
best = checkpoints.best()
checkpoints.close()
again = Checkpoints("gs://bucket/runs/one/checkpoints", keep=2)
assert again.progress() == {"step": 3}
assert jax.tree.all(jax.tree.map(jnp.array_equal, again.restore(state(0)), state(3)))
newest = newest_checkpoint(best.parent)
(newest / "progress" / "metadata").write_text("{")
with pytest.raises(DamagedCheckpoint, match="gs://bucket/runs/one/damaged-checkpoints/3"):
    again.progress()
again = Checkpoints("gs://bucket/runs/one/checkpoints", keep=2)
assert jax.tree.all(jax.tree.map(jnp.array_equal, again.restore(state(0)), state(2)))
print(best, newest, newest_checkpoint(best.parent))
"""


def test_checkpoints_in_a_bucket(monkeypatch):
    """A real client and a real server of the storage protocol."""
    storage = pytest.importorskip("gcp_storage_emulator.server", reason="no storage emulator")
    pytest.importorskip("gcsfs", reason="the extra `gcs` is not installed")
    objects = importlib.import_module("gcp_storage_emulator.handlers.objects")
    download = objects.download

    def with_generation(request, response, files, *args, **kwargs):
        # The emulator leaves this header out. Whoever writes a file once more after reading it, as
        # tensorstore does when its batches fall so, names the generation that it read.
        download(request, response, files, *args, **kwargs)
        if response.status != 404:
            named = request.params["bucket_name"], request.params["object_id"]
            response["X-Goog-Generation"] = files.get_file_obj(*named)["generation"]

    monkeypatch.setattr(objects, "download", with_generation)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
    env = os.environ | dict.fromkeys(names, f"http://127.0.0.1:{port}")
    env["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "anyone"
    server = storage.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        done = subprocess.run(
            [sys.executable, "-c", IN_A_BUCKET], env=env, capture_output=True, text=True
        )
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr[-3000:]
    where = "gs://bucket/runs/one/checkpoints"
    assert done.stdout.split() == [f"{where}/1", f"{where}/3", f"{where}/2"]
