"""The launch scripts: linted, dry runs, and one real script against runs that stop."""

import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "configs" / "launch"
SCRIPTS = sorted(p.name for p in LAUNCH.glob("[a-z]*.sh"))
INPUTS = {
    "single_gpu.sh": {},
    "slurm.sh": {"R1S_REPOSITORY": str(LAUNCH.parents[1])},
    "tpu_pod.sh": {
        "NAME": "mine",
        "PROJECT": "p",
        "ZONE": "us-east5-a",
        "ACCELERATOR": "v5p-32",
        "RUNTIME": "v2-alpha-tpuv5",
        "SOURCE": "git+https://host/r1s_jax.git",
        "SETUP": "sudo mount /shared",
    },
    "gke_jobset.sh": {
        "NAME": "mine",
        "IMAGE": "host/r1s:1",
        "ACCELERATOR": "tpu-v6e-slice",
        "TOPOLOGY": "4x8",
        "HOSTS": "8",
        "CHIPS": "4",
        "CLAIM": "disk",
    },
}
COMMON = {"RECIPE": "qwen2_5_7b_stage2", "RUN_DIR": "/shared/runs/my run"}
OVERRIDE = "environment.index=/shared/my index"


def launch(script, *arguments, dry=True, **env):
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env = clean | ({"DRY_RUN": "1"} if dry else {}) | env
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], env=env, capture_output=True, text=True
    )


def test_every_script_is_tested():
    assert sorted(INPUTS) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_the_commands(script):
    done = launch(script, OVERRIDE, **COMMON, **INPUTS[script])
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    if script == "tpu_pod.sh":
        # The command for the hosts is one quoted argument of ssh.
        (said,) = [w for w in shlex.split(said) if "r1s_jax.cli" in w]
        said = said.removeprefix("--command=")
    elif script == "gke_jobset.sh":
        (job,) = yaml.safe_load(said)["spec"]["replicatedJobs"]
        pods = job["template"]["spec"]
        assert pods["parallelism"] == pods["completions"] == 8
        (container,) = pods["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == {"google.com/tpu": 4}
        said = container["command"][2]
    words = shlex.split(said)
    train = words[words.index("train") :]
    assert train[1:3] == ["qwen2_5_7b_stage2", OVERRIDE]
    assert train[3:6] == ["--run-dir", "/shared/runs/my run", "--resume"]
    assert ("--distributed" in train) == (script != "single_gpu.sh")


def test_a_pod_is_requested_and_set_up_first():
    done = launch("tpu_pod.sh", **COMMON, **INPUTS["tpu_pod.sh"], SPOT="1")
    create, setup, install, train = done.stderr.splitlines()
    assert "queued-resources create mine" in create and create.endswith("--spot")
    assert "--worker=all" in setup and "mount" in setup
    assert "pip" in install and "train" in train


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_variables_are_named(script):
    inputs = COMMON | INPUTS[script]
    inputs.pop("R1S_REPOSITORY", None)
    needed = INPUTS[script].keys() & inputs.keys() - {"SETUP"} | {"RECIPE", "RUN_DIR"}
    for name in needed:
        env = {k: v for k, v in (INPUTS[script] | inputs).items() if k != name}
        done = launch(script, **env)
        assert done.returncode == 2 and f"error: set {name}:" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_programs_are_named(script, tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = launch(script, dry=False, PATH=str(tmp_path), **COMMON, **INPUTS[script])
    assert done.returncode == 2 and "is not installed" in done.stderr


def pretend_r1s(folder: Path, body: str) -> str:
    """A PATH on which `r1s` is a fake script."""
    program = folder / "r1s"
    program.write_text(f"#!/bin/bash\ncd {shlex.quote(str(folder))}\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return f"{folder}:{os.environ['PATH']}"


def test_a_run_resumes_after_a_kill_and_after_a_stop(tmp_path):
    """The first attempt is killed, the second stops at a signal, the third completes the run."""
    path = pretend_r1s(
        tmp_path,
        'echo "$@" >> calls; case $(wc -l < calls) in 1) kill -9 $$;; 2) exit 0;; '
        "3) touch run/summary.json;; esac",
    )
    (tmp_path / "run").mkdir()
    env = {"RECIPE": "tiny_world", "RUN_DIR": str(tmp_path / "run"), "PATH": path}
    done = launch("single_gpu.sh", "seed=1", dry=False, **env)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"train tiny_world seed=1 --run-dir {tmp_path}/run --resume"] * 3
    assert "stopped with status 137" in done.stderr and "restart 2" in done.stderr


def test_an_error_is_not_retried(tmp_path):
    path = pretend_r1s(tmp_path, "echo x >> calls; exit 1")
    env = {"RECIPE": "r", "RUN_DIR": str(tmp_path / "run"), "PATH": path}
    done = launch("single_gpu.sh", dry=False, **env)
    assert done.returncode == 1 and "failed with status 1" in done.stderr
    assert (tmp_path / "calls").read_text() == "x\n"


def test_scripts_pass_shellcheck():
    scripts = [str(path) for path in sorted(LAUNCH.glob("*.sh"))]
    shellcheck = Path(sys.executable).with_name("shellcheck")
    options = ["--external-sources", "--source-path=SCRIPTDIR", "--shell=bash"]
    done = subprocess.run([shellcheck, *options, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
