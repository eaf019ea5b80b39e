"""Which configs belong to the same run, and the files of a run directory."""

import json
import os
import pty
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from r1s_jax.config import ConfigError, CorpusConfig, PolicyConfig
from r1s_jax.configs import wiki_smollm2
from r1s_jax.data import digests
from r1s_jax.io.errors import UserError
from r1s_jax.models.checkpoint_owner import read_versions
from r1s_jax.models.pretrained import load_pretrained, make_policy, save_policy
from r1s_jax.tracking.run_dir import ADDED, StopRequest, as_written, check_data, open_run_dir
from tests.makers import letters, save_other_weights, save_small_model


def config(**changes):
    environment = CorpusConfig(
        questions=("q.jsonl",),
        retriever="http://me:secret@host:8000/queries?key=hidden",
    )
    return replace(wiki_smollm2.config(), environment=environment, **changes)


def begin(path, recipe) -> None:
    open_run_dir(path, recipe, resume=False)
    (path / "metrics.jsonl").touch()


def test_no_credentials_are_written(tmp_path):
    written = json.dumps(as_written(config()))
    assert "secret" not in written and "hidden" not in written and "host:8000/queries" in written
    begin(tmp_path / "run", config())
    assert "secret" not in (tmp_path / "run" / "config.json").read_text()
    open_run_dir(tmp_path / "run", config(), resume=True)


def test_a_run_of_another_config_is_refused_with_the_difference(tmp_path):
    begin(tmp_path / "run", config())
    file = tmp_path / "run" / "config.json"
    with pytest.raises(ConfigError, match="another config: seed was 0, now 3"):
        open_run_dir(tmp_path / "run", config(seed=3), resume=True)
    old = json.loads(file.read_text())
    del old["search"]["served_by"]
    file.write_text(json.dumps(old))
    with pytest.raises(ConfigError, match=r"search\.served_by was None, now "):
        open_run_dir(tmp_path / "run", config(), resume=True)


def test_a_run_of_020_lacks_later_fields_and_is_resumed_unless_they_change_it(tmp_path):
    begin(tmp_path / "run", config())
    file = tmp_path / "run" / "config.json"
    old = json.loads(file.read_text())
    for section, name in (place.split(".") for place in ADDED):
        old[section].pop(name, None)  # `environment` is of one kind
    file.write_text(json.dumps(old))
    open_run_dir(tmp_path / "run", config(), resume=True)
    credited = replace(config().algorithm, credit="igpo")
    with pytest.raises(ConfigError, match=r"algorithm\.credit was None, now 'igpo'"):
        open_run_dir(tmp_path / "run", config(algorithm=credited), resume=True)
    old["algorithm"]["llds_coefficient"] = 0.1
    file.write_text(json.dumps(old))
    priced = replace(config().algorithm, llds_coefficient=0.1)
    with pytest.raises(ConfigError, match=r"llds_gate was None, now 'action'"):
        open_run_dir(tmp_path / "run", config(algorithm=priced), resume=True)
    by_response = replace(priced, llds_gate="response")
    open_run_dir(tmp_path / "run", config(algorithm=by_response), resume=True)


def test_a_run_of_an_earlier_version_is_refused(tmp_path):
    begin(tmp_path / "run", config())
    versions = tmp_path / "run" / "versions.json"
    content = json.loads(versions.read_text())
    del content["format"]
    versions.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"versions\.json: .* an earlier version.*start a new run"):
        open_run_dir(tmp_path / "run", config(), resume=True)
    with pytest.raises(UserError, match="an earlier version"):
        load_pretrained(str(tmp_path / "run"))
    versions.unlink()
    with pytest.raises(UserError, match=r"holds no versions\.json"):
        read_versions(tmp_path / "run")


def test_two_paths_of_one_file_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begin(tmp_path / "run", config())
    monkeypatch.chdir("/")
    named = replace(config().environment, questions=(str(tmp_path / "q.jsonl"),))
    open_run_dir(tmp_path / "run", replace(config(), environment=named), resume=True)
    other = replace(named, questions=(str(tmp_path / "other.jsonl"),))
    with pytest.raises(ConfigError, match=r"environment.questions was \['q.jsonl'\]"):
        open_run_dir(tmp_path / "run", replace(config(), environment=other), resume=True)


def test_a_run_without_steps_may_be_replaced(tmp_path):
    open_run_dir(tmp_path / "run", config(), resume=False)
    (tmp_path / "run" / "policy").mkdir()
    (tmp_path / "run" / "data.json").write_text("{}")
    open_run_dir(tmp_path / "run", config(seed=3), resume=False)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "versions.json"}


def test_a_resumed_run_keeps_its_architecture_and_tokenizer(tmp_path):
    """The folder of policy.model may have changed; the run uses its own parameters."""
    policy_config = PolicyConfig(model=str(save_small_model(tmp_path / "m")))
    save_policy(tmp_path / "run", make_policy(policy_config, 0))
    save_other_weights(tmp_path / "m")  # not read: the run has its own policy
    save_policy(tmp_path / "run", policy := make_policy(policy_config, 0, run=tmp_path / "run"))
    other = policy._replace(model=replace(policy.model, rope_theta=5.0))
    with pytest.raises(ConfigError, match=r"run: architecture .* changed since the run began"):
        save_policy(tmp_path / "run", other)
    with pytest.raises(ConfigError, match="ends of a text of "):
        save_policy(tmp_path / "run", policy._replace(eos_ids=(5,)))
    tokenizer = letters("{{ messages }}", bos=False)
    with pytest.raises(ConfigError, match="tokenizer of "):
        save_policy(tmp_path / "run", policy._replace(tokenizer=tokenizer))


def test_a_changed_encoder_is_changed_data(tmp_path, monkeypatch):
    (tmp_path / "q.jsonl").write_text('{"question": "Who?", "answer": "A"}\n')
    (tmp_path / "p.tsv").write_text("0\tA   is who\n")
    files = {"questions": (str(tmp_path / "q.jsonl"),), "passages": (str(tmp_path / "p.tsv"),)}
    recipe = replace(wiki_smollm2.config(), environment=CorpusConfig(**files))
    check_data(tmp_path, recipe, accept_changed=False)
    check_data(tmp_path, recipe, accept_changed=False)
    other = SimpleNamespace(fingerprint="another")
    monkeypatch.setattr(digests, "load_encoder", lambda reference: other)
    with pytest.raises(ConfigError, match="hash changed since the run began"):
        check_data(tmp_path, recipe, accept_changed=False)
    check_data(tmp_path, recipe, accept_changed=True)


def test_a_run_keeps_its_identity(tmp_path):
    """Also a run that ended before its first step."""
    run = open_run_dir(tmp_path / "run", config(), resume=False)
    first = read_versions(run).id
    open_run_dir(run, config(seed=3), resume=False)
    (run / "metrics.jsonl").touch()
    open_run_dir(run, config(seed=3), resume=True)
    assert read_versions(run).id == first != ""
    assert read_versions(open_run_dir(tmp_path / "other", config(), resume=False)).id != first


@pytest.mark.parametrize(
    "damaged", ['{"format": 1, "id": "a", "folder": 3}', "[]", '{"format": 1, "folder": "."}']
)
def test_damaged_versions_are_named(tmp_path, damaged):
    begin(tmp_path / "run", config())
    (tmp_path / "run" / "versions.json").write_text(damaged)
    with pytest.raises(UserError, match=r"versions\.json: "):
        open_run_dir(tmp_path / "run", config(), resume=True)


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_a_signal_stops_the_run_after_the_step(number):
    chosen = signal.Signals[number]
    outside = signal.signal(chosen, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), chosen)
            assert stop.agree() == number
        assert signal.getsignal(chosen) == signal.SIG_DFL
    finally:
        signal.signal(chosen, outside)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_an_ignored_signal_stays_ignored(number):
    """nohup ignores SIGHUP."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            assert not stop.agree()
    finally:
        signal.signal(number, before)


ON_A_TERMINAL = """
import fcntl, signal, sys, termios, time
from r1s_jax.tracking.run_dir import StopRequest
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # its terminal from now on
with StopRequest() as stop:
    print("begun", flush=True)
    while not stop.agree():
        time.sleep(0.01)
    print("a step", flush=True)
    open(sys.argv[1], "w").write(stop.requested)
"""


def test_a_closed_terminal_stops_the_run_and_nothing_else(tmp_path):
    terminal, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, str(tmp_path / "saved")],
        stdin=other,
        stdout=other,
        stderr=other,
        start_new_session=True,
    )
    os.close(other)
    said = b""
    while b"begun" not in said:
        said += os.read(terminal, 1 << 16)
    os.close(terminal)  # the kernel sends SIGHUP
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "saved").read_text() == "SIGHUP"
