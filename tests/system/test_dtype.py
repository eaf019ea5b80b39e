"""policy.compute_dtype=auto: the faster dtype, measured once, and what a run says about it."""

import json

import jax
import numpy as np
import pytest

from r1s_jax.config import override
from r1s_jax.configs import wiki_smollm2
from r1s_jax.io.errors import ConfigError
from r1s_jax.system import dtype
from r1s_jax.tracking.run_dir import open_run_dir, with_dtype

AUTO = override(wiki_smollm2.config(), [])
FORCED = override(wiki_smollm2.config(), ["policy.compute_dtype=bfloat16"])


@pytest.fixture
def speedup(monkeypatch):
    """Sets how much faster bfloat16 is on this machine."""

    def set_to(value: float) -> None:
        monkeypatch.setattr(dtype, "bfloat16_speedup", lambda: value)

    return set_to


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Counts the measurements, with an empty cache."""
    calls: list[float] = []
    monkeypatch.setenv("R1S_CACHE", str(tmp_path))
    monkeypatch.setattr(dtype, "_measure", lambda: calls.append(2.5) or 2.5)
    dtype._cpu_speedup.cache_clear()
    yield calls
    dtype._cpu_speedup.cache_clear()


def test_a_cpu_is_measured_once(measured, tmp_path):
    assert dtype.bfloat16_speedup() == 2.5
    dtype._cpu_speedup.cache_clear()  # as in another process
    assert dtype.bfloat16_speedup() == 2.5 and len(measured) == 1
    (file,) = (tmp_path / "dtype").glob("*.json")
    for content in ("{", "[]", '{"bfloat16_speedup": "x"}', '{"bfloat16_speedup": null}'):
        file.write_text(content)
        dtype._cpu_speedup.cache_clear()
        assert dtype.bfloat16_speedup() == 2.5
    assert len(measured) == 5


def test_a_cache_that_cannot_be_written_is_no_error(measured, tmp_path, monkeypatch):
    monkeypatch.setenv("R1S_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    assert dtype.bfloat16_speedup() == 2.5


def test_accelerators_are_not_measured(measured, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dtype.default_dtype() == np.dtype("bfloat16") and not measured


def test_the_measurement_is_a_ratio():
    assert 0.01 < dtype._measure() < 100


@pytest.mark.parametrize(("value", "name"), [(5.0, "bfloat16"), (1.1, "float32"), (0.5, "float32")])
def test_auto_takes_the_faster_one_and_says_so(speedup, value, name, tmp_path, capsys):
    speedup(value)
    config = with_dtype(AUTO, tmp_path, False)
    assert config.policy.compute_dtype == name and dtype.default_dtype() == np.dtype(name)
    said = " ".join(capsys.readouterr().err.split())
    assert f"policy.compute_dtype: {name} (this CPU multiplies bfloat16 {value:.2g} times" in said
    assert "warning" not in said


def test_a_resumed_run_keeps_its_dtype_on_another_machine(speedup, tmp_path, capsys):
    speedup(5.0)
    run = open_run_dir(tmp_path / "run", with_dtype(AUTO, tmp_path / "run", False), False)
    (run / "metrics.jsonl").touch()
    assert json.loads((run / "config.json").read_text())["policy"]["compute_dtype"] == "bfloat16"
    speedup(0.4)
    config = with_dtype(AUTO, run, True)
    assert open_run_dir(run, config, True) == run
    said = " ".join(capsys.readouterr().err.split())
    assert "bfloat16 (as the run began)" in said
    assert "this machine multiplies bfloat16 2.5 times slower than float32" in said


def test_a_forced_dtype_is_used_and_its_slowness_told(speedup, tmp_path, capsys):
    speedup(0.5)
    assert with_dtype(FORCED, tmp_path, False).policy.compute_dtype == "bfloat16"
    assert "bfloat16 2.0 times slower" in " ".join(capsys.readouterr().err.split())
    speedup(4.0)
    float32 = override(AUTO, ["policy.compute_dtype=float32"])
    assert with_dtype(float32, tmp_path, False).policy.compute_dtype == "float32"
    assert "float32 4.0 times slower" in " ".join(capsys.readouterr().err.split())


def test_a_resumed_run_of_another_forced_dtype_is_refused(speedup, tmp_path):
    speedup(0.5)
    run = open_run_dir(tmp_path / "run", with_dtype(AUTO, tmp_path / "run", False), False)
    (run / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="compute_dtype was 'float32', now 'bfloat16'"):
        open_run_dir(run, with_dtype(FORCED, run, True), True)


@pytest.mark.parametrize("written", ["{", "{}", '{"policy": {"compute_dtype": "int4"}}'])
def test_a_damaged_config_of_a_run_is_named(written, tmp_path):
    (tmp_path / "config.json").write_text(written)
    with pytest.raises(ConfigError, match=r"config\.json"):
        with_dtype(AUTO, tmp_path, True)
