"""Several real processes on this machine, and failures of one of them."""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from r1s_jax.io.journal import rows_so_far
from r1s_jax.system import distributed
from r1s_jax.tracking.metrics import without_times
from tests.distributed_worker import SHORT
from tests.makers import with_devices

TRAIN = ["r1s_jax.cli", "train", "tiny_world", *SHORT]
WORKER = ["tests.distributed_worker"]


def start(count, module, *, devices=1):
    """Starts `count` processes of `python -m module ...` in one distributed group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = with_devices(devices)
    named = [{"R1S_COORDINATOR": address, "R1S_PROCESSES": str(count), "R1S_PROCESS": str(i)}
             for i in range(count)]  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", *module],
            env=env | (named[i] if count > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes, timeout=900):
    """(exit status, stdout, stderr) of each process; kills all when one takes too long."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def learned(run_dir):
    """The journals of a run, without columns that depend on time."""
    metrics = [
        {k: v for k, v in without_times(row).items() if k != "digests"}  # bits differ
        for row in rows_so_far(run_dir / "metrics.jsonl")
    ]
    traces = rows_so_far(run_dir / "traces.jsonl")
    for row in traces:
        for search in row["searches"]:
            del search["seconds"]
    cold_start = [without_times(row) for row in rows_so_far(run_dir / "cold_start.jsonl")]
    return [cold_start, metrics, traces]


def assert_alike(a, b):
    """Equal up to the order of reductions over four processes."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), [b[key] for key in a]
    if isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_alike(x, y)
    else:
        assert a == (pytest.approx(b, rel=1e-4, abs=1e-5) if isinstance(b, float) else b)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process with as many devices as the several processes together."""
    folder = tmp_path_factory.mktemp("alone")

    def run(devices):
        run_dir = folder / f"{devices}"
        if not run_dir.exists():
            ((status, _, error),) = finish(
                start(1, [*TRAIN, "--run-dir", str(run_dir)], devices=devices)
            )
            assert status == 0, error
        return learned(run_dir)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_learn_the_same_as_one(alone, tmp_path, count):
    run_dir = tmp_path / "run"
    ended = finish(start(count, [*TRAIN, "--run-dir", str(run_dir), "--distributed"]))
    assert [status for status, *_ in ended] == [0] * count, ended[0][2]
    assert json.loads(ended[0][1].splitlines()[-1])["steps"] == 3
    assert all("steps" not in out for _, out, _ in ended[1:])  # only process 0 prints
    cold_start, metrics, traces = learned(run_dir)
    assert_alike([cold_start, metrics, traces], alone(count))
    assert all(row["searches"] >= 16 for row in metrics)
    assert all(row["searches"][0]["outcome"] == "found" for row in traces)


@pytest.mark.slow
def test_forks_are_the_same_in_several_processes(tmp_path):
    forks = ["rollout.forks=1", "rollout.fork=random", "algorithm.credit=fork"]
    forks += ["algorithm.forks_teach=true", "rollout.forks_per_trajectory=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    ((status, _, error),) = finish(start(1, [*TRAIN, *forks, "--run-dir", str(one)], devices=2))
    assert status == 0, error
    ended = finish(start(2, [*TRAIN, *forks, "--run-dir", str(two), "--distributed"]))
    assert [status for status, *_ in ended] == [0, 0], ended[0][2]
    assert_alike(learned(two), learned(one))
    assert sum(row["forks"] for row in learned(two)[1]) > 0


def test_values_and_errors_reach_every_process(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy"):  # a dead proxy: processes must connect directly
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    ended = finish(start(2, [*WORKER, "agree", str(tmp_path)]))
    outcomes = [(status, out.splitlines()[-1]) for status, out, _ in ended]
    assert outcomes == [(0, "agreed")] * 2, ended[1][2]


@pytest.mark.slow
def test_a_random_reward_is_the_same_in_all_processes(tmp_path):
    ended = finish(start(2, [*WORKER, "own_reward", str(tmp_path / "run")]))
    assert [status for status, *_ in ended] == [0, 0], ended[0][2][-3000:] + ended[1][2][-3000:]
    one, two = [re.findall("parameters .*", out) for _, out, _ in ended]
    assert one == two and len(one) == 1


@pytest.mark.slow
def test_a_rollout_may_be_interrupted_and_resumed(tmp_path):
    ended = finish(start(2, [*WORKER, "pieces", str(tmp_path)]))
    one, two = [(status, out.splitlines()[-1:]) for status, out, _ in ended]
    assert one == two and one[0] == 0, ended[0][2][-3000:]
    assert one[1][0].endswith("tokens")


def test_search_may_be_served_by_one_process_for_all(tmp_path, monkeypatch):
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    monkeypatch.setenv("R1S_CACHE", str(tmp_path / "cache"))
    lines = ["Rome   Rome is a city in Italy.", "Dune   Dune is a novel by Herbert."]
    (tmp_path / "p.tsv").write_text("".join(f"{i}\t{line}\n" for i, line in enumerate(lines)))
    rows = [{"question": f"Who wrote Dune {i}?", "answer": "Herbert"} for i in range(4)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = finish(start(2, [*WORKER, "served", str(tmp_path)]))
    hits = f"found {lines[1]} | {lines[0]}"
    last_lines = [out.splitlines()[-1] for _, out, _ in ended]
    assert last_lines == [f"1 opened, {hits}", f"0 opened, {hits}"], ended[1][2][-2000:]


@pytest.mark.slow
def test_a_failing_retriever_of_one_process_ends_all(tmp_path):
    ended = finish(start(2, [*WORKER, "failing_search", str(tmp_path / "run")]))
    messages = [error.strip().splitlines()[-1] for _, _, error in ended]
    assert messages[0] == messages[1]
    assert re.search(r"SearchFailure: 2 of \d+ searches failed", messages[0])
    assert "ConnectionError: no route to the index (2x)" in messages[0]
    assert all(status == 1 for status, *_ in ended)


@pytest.mark.slow
def test_after_a_crash_the_other_processes_end_and_name_it(tmp_path):
    run_dir = tmp_path / "run"
    many = ["cold_start.steps=100000", "cold_start.checkpoint_every=100000"]
    train = ["r1s_jax.cli", "train", "tiny_world", *SHORT, *many]
    processes = start(2, [*train, "--run-dir", str(run_dir), "--distributed"])
    while not (run_dir / "cold_start.jsonl").exists() and processes[0].poll() is None:
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGKILL)
    died = time.monotonic()
    (status, _, error), _ = finish(processes)
    assert time.monotonic() - died < 60
    assert status != 0 and re.search(r"stopped sending heartbeats\):\s+1\b", error), error[-3000:]


def test_unknown_process_numbers_are_refused_with_advice(monkeypatch):
    monkeypatch.setenv("R1S_COORDINATOR", "localhost:1")
    with pytest.raises(distributed.ProcessError, match="set all of R1S_COORDINATOR, R1S_PROCESSES"):
        distributed.join()


def test_a_run_directory_must_be_named():
    ((status, _, error),) = finish(start(1, [*TRAIN, "--distributed"]))
    assert status == 1 and "--distributed needs --run-dir" in error


def test_one_process_needs_no_communication():
    assert distributed.gather(1) == [1] and distributed.on_main(lambda: 2) == 2
    with pytest.raises(ZeroDivisionError):
        distributed.together(lambda: 1 / 0)
