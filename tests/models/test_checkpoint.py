"""Checkpoints: saved state is restored, and a failed save loses only itself."""

import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from r1s_jax.config import ModelConfig
from r1s_jax.io.errors import BadInput
from r1s_jax.learning.learner import LearnerState
from r1s_jax.models.checkpoint import (
    CheckpointError,
    Checkpoints,
    DamagedCheckpoint,
    newest_params,
)
from r1s_jax.models.checksums import checksums, host_checksum
from r1s_jax.system.locks import InUse


def progress_fields(saved: dict) -> dict:
    """The fields of progress that the test passed to `save`."""
    return {name: saved[name] for name in ("step", "before") if name in saved}


def state(value: float) -> LearnerState:
    return LearnerState({"w": jnp.full((64, 1024), value)}, {"mu": jnp.full(3, value)})


def test_restores_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.progress(progress_fields) is None
    for i in (1, 2, 3):
        checkpoints.save(i, state(i), {"step": i, "before": None})
    checkpoints.wait()
    again = Checkpoints(tmp_path / "c", keep=2)
    assert again.progress(progress_fields) == {"step": 3, "before": None}
    restored = again.restore(state(0))
    np.testing.assert_array_equal(restored.params["w"], state(3).params["w"])
    np.testing.assert_array_equal(restored.optimizer["mu"], state(3).optimizer["mu"])
    assert sorted(int(p.name) for p in (tmp_path / "c").iterdir()) == [2, 3]


def test_the_best_is_kept_at_any_age(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.best() is None
    checkpoints.save(1, state(1), {"step": 1})
    for i, score in enumerate((0.2, 0.9, 0.3, 0.1, 0.4), start=2):
        checkpoints.save(i, state(i), {"step": i}, score)
    checkpoints.wait()
    assert checkpoints.best() == tmp_path / "c" / "3"
    assert sorted(int(p.name) for p in (tmp_path / "c").iterdir()) == [3, 5, 6]
    again = Checkpoints(tmp_path / "c", keep=2)
    assert again.progress(progress_fields) == {"step": 6} and again.best() == tmp_path / "c" / "3"


def test_a_full_disk_is_one_clear_error_without_loss(tmp_path, capfd, caplog):
    """A limit on file sizes simulates a full disk."""
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    checkpoints.save(1, state(1), {"step": 1})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(CheckpointError, match=r"/c: .*File too large\. Earlier .* are whole"):
            checkpoints.save(2, state(2), {"step": 2})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    checkpoints.close_after_error()
    assert not capfd.readouterr().err and not caplog.records, "nothing but the error is said"
    again = Checkpoints(tmp_path / "c", keep=2)
    assert again.progress(progress_fields) == {"step": 1}
    np.testing.assert_array_equal(again.restore(state(0)).params["w"], state(1).params["w"])


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def random_state(seed: int) -> LearnerState:
    """Incompressible numbers in several dtypes."""
    key = jax.random.key(seed)
    params = {"w": jax.random.normal(key, (64, 1024))}
    params["half"] = jax.random.normal(key, (32, 32)).astype(jnp.bfloat16)
    return LearnerState(params, {"mu": jnp.full(3, seed), "count": jnp.int32(seed)})


@pytest.mark.parametrize("what", ["numbers", "description"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, what):
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
        again.progress(progress_fields)
        again.restore(random_state(0))
    assert (tmp_path / "damaged-c" / "2").is_dir()
    sound = Checkpoints(tmp_path / "c", keep=3)
    assert sound.progress(progress_fields) == {"step": 1}
    restored = sound.restore(random_state(0))
    flip(tmp_path / "c" / "1" / "state" / "_METADATA", 40)
    with pytest.raises(CheckpointError, match=r"c/1 is damaged.*there is no other"):
        Checkpoints(tmp_path / "c", keep=3).restore(random_state(0))
    assert (tmp_path / "c" / "1").is_dir()
    for read, saved in zip(
        jax.tree.leaves(restored), jax.tree.leaves(random_state(1)), strict=True
    ):
        np.testing.assert_array_equal(read, saved)


def test_checksums_cover_every_array():
    whole = checksums(random_state(0))
    assert whole == checksums(random_state(0)) and len(whole) == 4
    other = checksums(random_state(1))
    assert all(other[name] != value for name, value in whole.items())


@pytest.mark.parametrize("width", [7, 29])  # in one piece, and in blocks with a rest
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_checksums_depend_on_positions(dtype, width):
    """Also numbers that differ only in sign, on the device as on the host."""
    x = jax.random.normal(jax.random.key(0), (300, width, 32)) * 8
    x = np.asarray(x).astype(jnp.dtype(dtype))
    x[2, 0, :2] = 1, -1
    rows, signs = x.copy(), x.copy()
    rows[[3, 250]] = rows[[250, 3]]
    signs[2, 0, :2] = -1, 1
    assert len({host_checksum(values) for values in (x, rows, signs)}) == 3
    for values in (x, rows, signs):
        assert checksums([jnp.asarray(values)]) == {"[0]": host_checksum(values)}


def saved_twice(folder, run=None) -> epath.Path:
    """Checkpoints 1 and 2, with scores; returns the newer one."""
    checkpoints = Checkpoints(folder, keep=3, run=run)
    for i in (1, 2):
        checkpoints.save(i, state(i), {"step": i, "carried": "abc"}, 0.5 * i)
    checkpoints.close()
    return epath.Path(folder) / "2"


def changed(name: str, **values) -> Callable[[epath.Path], None]:
    """Changes fields of a JSON file of a checkpoint."""

    def change(folder: epath.Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return change


DAMAGES = {
    "a step of another checkpoint": changed("progress/metadata", step=1),
    "another phase": changed("progress/metadata", phase="learning"),
    "what was in flight": changed("progress/metadata", carried="abd"),
    "a checksum": changed("progress/metadata", array_checksums={}),
    "a seal that fits nothing": changed("progress/metadata", seal=None),
    "no seal": lambda f: (f / "progress" / "metadata").write_text('{"checksums": {}, "step": 2}'),
    "another file": lambda f: (f / "progress" / "metadata").write_text("{}"),
    "a score in its place": lambda f: (f / "progress" / "metadata").write_bytes(
        (f / "metrics" / "metrics").read_bytes()
    ),
    "no progress": lambda f: (f / "progress" / "metadata").unlink(),
    "no object": lambda f: (f / "progress" / "metadata").write_text("[]"),
    "description of another type": lambda f: (f / "_CHECKPOINT_METADATA").write_text("[]"),
    "a time that is a text": changed("_CHECKPOINT_METADATA", init_timestamp_nsecs="x"),
    "a time no clock has": changed("_CHECKPOINT_METADATA", commit_timestamp_nsecs=10**400),
    "no description": lambda f: (f / "_CHECKPOINT_METADATA").unlink(),
    "half copied": lambda f: (f / "state").rmtree(),
    "empty": lambda f: (f.rmtree(), f.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_an_incomplete_checkpoint_is_moved_away_and_the_previous_one_used(tmp_path, capsys, damage):
    newest = saved_twice(tmp_path / "c")
    damage(newest)
    again = Checkpoints(tmp_path / "c", keep=3)
    assert again.progress(progress_fields) == {"step": 1}
    np.testing.assert_array_equal(again.restore(state(0)).params["w"], state(1).params["w"])
    assert again.best() == tmp_path / "c" / "1"
    again.close()
    said = "".join(capsys.readouterr().err.split())  # ignores line breaks of the terminal
    assert f"checkpoint{newest}isdamaged" in said and "wasmovedto" in said


def test_an_unreachable_checkpoint_is_not_moved(tmp_path):
    newest = saved_twice(tmp_path / "c")
    (newest / "_CHECKPOINT_METADATA").unlink()
    (newest / "_CHECKPOINT_METADATA").mkdir()
    with pytest.raises(OSError, match="_CHECKPOINT_METADATA"):
        Checkpoints(tmp_path / "c", keep=3)
    assert newest.is_dir()


def test_the_only_checkpoint_stays_where_it_is(tmp_path):
    newest = saved_twice(tmp_path / "c")
    for folder in (newest, newest.parent / "1"):
        (folder / "progress" / "metadata").write_text("[]")
    with pytest.raises(CheckpointError, match=r"c/2 is damaged.*no whole one"):
        Checkpoints(tmp_path / "c", keep=3)
    assert len(list((tmp_path / "c").iterdir())) == 2


@pytest.mark.parametrize("damaged", ['{"scores": 1}', '{"score": "x"}', "[]", '{"score": 9.0}'])
def test_a_changed_score_is_ignored(tmp_path, damaged):
    newest = saved_twice(tmp_path / "c")
    if "9" in damaged:
        damaged = json.dumps(json.loads((newest / "metrics/metrics").read_text()) | {"score": 9.0})
    (newest / "metrics" / "metrics").write_text(damaged)
    again = Checkpoints(tmp_path / "c", keep=3)
    assert again.best() == tmp_path / "c" / "1" and again.progress(progress_fields) == {"step": 2}


def test_a_checkpoint_whose_content_cannot_be_read_is_moved_away(tmp_path):
    newest = saved_twice(tmp_path / "c")
    again = Checkpoints(tmp_path / "c", keep=3)
    named = pytest.raises(DamagedCheckpoint, match=rf"{newest} is damaged \(no flights\)")
    with named, again.reading():
        raise BadInput("no flights")
    assert Checkpoints(tmp_path / "c", keep=3).progress(progress_fields) == {"step": 1}


def a_run(folder: Path, identity: str = "") -> Path:
    folder.mkdir()
    versions = {"format": 1, "id": identity or folder.name, "folder": "."}
    (folder / "versions.json").write_text(json.dumps(versions))
    return folder


def test_a_folder_of_checkpoints_belongs_to_one_run(tmp_path):
    one, two, shared = a_run(tmp_path / "one"), a_run(tmp_path / "two"), tmp_path / "shared"
    first = Checkpoints(shared, keep=2, run=one)
    with pytest.raises(InUse, match=r"shared: this folder of checkpoints .* process \d+"):
        Checkpoints(shared, keep=2, run=two)
    first.close()
    Checkpoints(shared, keep=2, run=two).close()  # allowed while the folder is empty
    saved_twice(shared, two)
    with pytest.raises(CheckpointError, match=rf"{shared} belongs to the run in {two}: give this"):
        Checkpoints(shared, keep=2, run=one)
    moved = two.rename(tmp_path / "moved")
    again = Checkpoints(shared, keep=2, run=moved)
    assert again.progress(progress_fields) == {"step": 2}
    again.close()
    for run, words in ((one, "belongs to the run"), (moved, "cannot be read")):
        with pytest.raises(CheckpointError, match=words):
            newest_params(run, epath.Path(shared), ModelConfig(9, 4, 4, 1, 1, 1, 4), np.float32)
    (shared / "run.json").unlink()
    with pytest.raises(CheckpointError, match="holds checkpoints of another run"):
        Checkpoints(shared, keep=2, run=moved)
    inside = saved_twice(moved / "checkpoints")  # without an owner
    with pytest.raises(CheckpointError, match="holds checkpoints of another run"):
        Checkpoints(inside.parent, keep=2, run=moved)
    (one / "versions.json").write_text('{"jax": "0.10.2", "id": "one"}')
    with pytest.raises(CheckpointError, match=r"made by an earlier version.*start a new run"):
        Checkpoints(one / "checkpoints", keep=2, run=one)


IN_A_BUCKET = """
import json, os, pathlib
import jax, jax.numpy as jnp, pytest
from r1s_jax.models.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint
from r1s_jax.models.checkpoint_owner import saved_in
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
assert again.progress(dict)["step"] == 3
assert jax.tree.all(jax.tree.map(jnp.array_equal, again.restore(state(0)), state(3)))
newest = saved_in(best.parent)[0]
(newest / "progress" / "metadata").write_text("{")
with pytest.raises(DamagedCheckpoint, match="gs://bucket/runs/one/damaged-checkpoints/3"):
    again.progress(dict)
again = Checkpoints("gs://bucket/runs/one/checkpoints", keep=2)
assert jax.tree.all(jax.tree.map(jnp.array_equal, again.restore(state(0)), state(2)))
again.close()

runs = [pathlib.Path(os.environ["RUNS"], name) for name in ("one", "two")]
for run in runs:
    run.mkdir()
    versions = {"format": 1, "id": run.name, "folder": "."}
    (run / "versions.json").write_text(json.dumps(versions))
theirs = Checkpoints("gs://bucket/theirs", keep=2, run=runs[0])
with pytest.raises(CheckpointError, match="gs://bucket/theirs belongs to the run in .*one"):
    Checkpoints("gs://bucket/theirs", keep=2, run=runs[1])
(theirs._directory / "run.json").write_text(json.dumps({"run": "two", "folder": "x"}))
with pytest.raises(CheckpointError, match="belongs to the run in x"):
    theirs.save(1, state(1), {"step": 1})
print(best, newest, saved_in(best.parent)[0])
"""


@pytest.mark.slow
def test_checkpoints_in_a_bucket(monkeypatch, tmp_path):
    """A real client with an emulator of the storage server."""
    storage = pytest.importorskip("gcp_storage_emulator.server", reason="no storage emulator")
    pytest.importorskip("gcsfs", reason="the extra `gcs` is not installed")
    objects = importlib.import_module("gcp_storage_emulator.handlers.objects")
    download = objects.download

    def with_generation(request, response, files, *args, **kwargs):
        # The emulator omits this header. A client that rewrites a file after reading it, as
        # tensorstore does for some batches, sends the generation that it read.
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
    env["RUNS"] = str(tmp_path)
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
