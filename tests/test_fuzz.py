"""A short run of the fuzzer, and checks that it detects each kind of bad outcome."""

import time

import pytest

from r1s_jax.io.errors import BadInput
from tests.fuzz import engine as fuzz
from tests.fuzz.reader import BAD, Reader, digest


def test_damaged_input_is_refused_by_name():
    counts = fuzz.run(list(fuzz.READERS), seed=0, inputs=300)
    bad = {name: dict(outcomes) for name, outcomes in counts.items() if set(outcomes) & set(BAD)}
    assert not bad
    assert sum(outcomes["clear"] for outcomes in counts.values()) > 130


def fails(error):
    def call(folder):
        raise error

    return call


@pytest.mark.parametrize(
    ("call", "outcome"),
    [
        (fails(KeyError("x")), "traceback"),
        (fails(BadInput("something is wrong")), "unnamed"),
        (fails(BadInput("a.npy: no numbers")), "clear"),
        (fails(OSError("x" * 500)), "long"),
        (lambda folder: "good", "same"),
        (lambda folder: "bad", "used"),
    ],
)
def test_the_judge_detects(call, outcome, tmp_path):
    (tmp_path / "a.npy").touch()
    reader = Reader(lambda folder: None, call, sealed=("*.npy",))
    assert fuzz.judge(reader, tmp_path, "a.npy", digest("good"))[0] == outcome


def test_a_reader_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(fuzz, "PATIENCE_S", 0.25)
    worker = fuzz._Worker()
    monkeypatch.setattr(worker.tasks, "put", lambda task: time.sleep(0))
    assert worker.ask("questions", 0)[3] == "hang"
