"""Profiling of a run: compilations, memory, utilisation, and traces of chosen steps."""

import gc
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import psutil

from r1s_jax.io.errors import ConfigError
from r1s_jax.system.assets import cache_dir
from r1s_jax.system.chips import CHIPS

_MANY_MAPS = 25_000
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts the programs that XLA compiles in this process."""

    def __init__(self) -> None:
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def take(self) -> int:
        """Compilations since the last call."""
        count, self._count = self._count, 0
        return count

    def _note(self, event: str, duration_secs: float, **more: Any) -> None:
        self._count += event == _COMPILED


def host_memory_gib() -> float:
    """Host memory that this process holds."""
    return psutil.Process().memory_info().rss / 2**30


def keep_compiled_programs() -> None:
    """Keeps programs compiled for accelerators on disk, so that a resumed run starts sooner.

    They are kept in JAX_COMPILATION_CACHE_DIR, by default in this package's cache. On a CPU there
    is no default: programs compile in seconds there, and fit only the CPU that compiled them.
    """
    directory = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]  # defined at import
    if jax.default_backend() != "cpu" and not directory:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))


def forget_compiled_programs() -> None:
    """Frees the compiled programs of finished work, if there are many.

    On Linux a process may have 65,530 memory maps; each program takes several, and a process that
    needs more crashes.
    """
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()
        gc.collect()


def model_flops_utilization(params: Any, tokens: float, seconds: float) -> float | None:
    """Share of the chips' peak that learning from `tokens` in `seconds` used.

    Six FLOPs a parameter and token (Chowdhery et al., 2022), recomputation not counted; None on
    hardware whose peak is not known.
    """
    devices = jax.devices()
    chip = CHIPS.get(devices[0].device_kind)
    if chip is None or seconds <= 0:
        return None
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    return 6 * parameters * tokens / (seconds * len(devices) * chip.tflops * 1e12)


class StepTrace:
    """Traces the steps `first` to `last` for Perfetto and TensorBoard, in `directory`."""

    def __init__(self, steps: str, directory: Path):
        """`steps` is `N:M` (or `N`), counted from 1; "" traces none. Raises ConfigError."""
        self._first, self._last = _parse(steps)
        self._directory, self._running = directory, False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surrounds one step."""
        if self._first <= number <= self._last and not self._running:
            jax.profiler.start_trace(str(self._directory), create_perfetto_trace=True)
            self._running = True
        yield
        if number >= self._last:
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is being taken."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def _parse(steps: str) -> tuple[int, int]:
    if not steps:
        return 0, 0
    match = re.fullmatch(r"(\d+)(?::(\d+))?", steps)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(f"--profile {steps}: take N or N:M, the first and the last step, from 1")
    return first, last
