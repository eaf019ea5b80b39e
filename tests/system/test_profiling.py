from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from r1s_jax.io.errors import ConfigError
from r1s_jax.system import profiling
from r1s_jax.system.chips import Chip
from r1s_jax.system.profiling import (
    Compilations,
    StepTrace,
    forget_compiled_programs,
    model_flops_utilization,
)


def test_compilations_are_counted_once():
    counted = Compilations()
    double = jax.jit(lambda x: x * 2)
    double(jnp.ones(3))
    assert counted.take() >= 1
    double(jnp.ones(3))
    assert counted.take() == 0
    double(jnp.ones(4))
    assert counted.take() >= 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory maps are Linux's")
def test_programs_of_finished_runs_hold_no_memory(monkeypatch):
    """A process that compares many runs would reach the limit of memory maps."""
    monkeypatch.setattr(profiling, "_MANY_MAPS", 0)

    def maps() -> int:
        return Path("/proc/self/maps").read_bytes().count(b"\n")

    def a_run() -> list:
        programs = [jax.jit(lambda x, i=i: jnp.sort(x @ x) * i) for i in range(15)]
        for program in programs:
            program(jnp.ones((7, 7))).block_until_ready()
        return programs

    programs_of_runs = [a_run()]
    forget_compiled_programs()
    before = maps()
    programs_of_runs.append(a_run())
    assert maps() > before + 15
    forget_compiled_programs()
    assert maps() <= before + 10
    monkeypatch.undo()
    programs_of_runs.append(a_run())
    forget_compiled_programs()
    assert maps() > before + 15  # few programs stay, for runs of the same settings


def test_utilisation_is_reported_for_known_chips(monkeypatch):
    params = {"w": jnp.ones((1000, 1000)), "b": jnp.ones(1000)}
    assert model_flops_utilization(params, 10, 1.0) is None
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(profiling.CHIPS, kind, Chip(1, 100, 1, 1))
    share = model_flops_utilization(params, 5000, 2.0)
    assert share == pytest.approx(6 * 1_001_000 * 5000 / (2 * 1e14 * jax.device_count()))


def test_the_named_steps_are_traced(tmp_path):
    trace = StepTrace("2:3", tmp_path)
    for number in range(1, 5):
        with trace.step(number):
            jax.jit(jnp.sin)(jnp.ones(number)).block_until_ready()
        assert bool(list(tmp_path.rglob("*.json.gz"))) == (number >= 3)


def test_a_run_that_ends_early_still_writes_its_trace(tmp_path):
    trace = StepTrace("1:9", tmp_path)
    with trace.step(4):  # a resumed run
        pass
    trace.close()
    assert list(tmp_path.rglob("*.json.gz"))
    with StepTrace("", tmp_path / "none").step(1):
        pass
    assert not (tmp_path / "none").exists()


def test_compiled_programs_are_kept_for_accelerators(monkeypatch, tmp_path, request):
    monkeypatch.setenv("R1S_CACHE", str(tmp_path))
    name, update, updates = "jax_compilation_cache_dir", jax.config.update, {}
    request.addfinalizer(partial(update, name, jax.config.jax_compilation_cache_dir))
    update(name, None)  # the tests set one
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    profiling.keep_compiled_programs()
    assert not updates
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    profiling.keep_compiled_programs()
    assert updates == {name: str(tmp_path / "compiled")}


@pytest.mark.parametrize("steps", ["0:3", "3:1", "a", "1:2:3", "-1"])
def test_an_invalid_range_is_refused(steps, tmp_path):
    with pytest.raises(ConfigError, match="take N or N:M"):
        StepTrace(steps, tmp_path)
