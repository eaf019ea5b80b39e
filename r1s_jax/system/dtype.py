"""The dtype in which this machine multiplies matrices fastest: `policy.compute_dtype=auto`.

Accelerators and CPUs with bfloat16 matrix units (AMX) multiply bfloat16 several times as fast as
float32. Other CPUs convert each bfloat16 operand first, and take twice as long.
"""

import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from r1s_jax.kernels.matmul import matmul
from r1s_jax.system.assets import cache_dir
from r1s_jax.system.console import console, warn
from r1s_jax.system.files import write_json

AUTO = "auto"
_TOKENS, _DIM = 256, 1024  # a product of 0.5 GFLOP
_SECONDS = 0.25  # of timing
_GAIN = 1.3  # bfloat16 must be this much faster: a model does more than multiply


def default_dtype() -> np.dtype:
    """The dtype for a policy in use: the faster one of this machine."""
    return np.dtype("float32" if bfloat16_speedup() < _GAIN else jnp.bfloat16)


def choose_dtype(requested: str, before: str = "") -> str:
    """The compute dtype of a run; prints the choice.

    `requested` is the recipe's; with `auto`, a resumed run keeps the dtype `before`. Warns if this
    machine computes the dtype slowly.
    """
    speedup = bfloat16_speedup()
    chosen = requested
    if requested == AUTO:
        chosen = before or default_dtype().name
        console.print(f"policy.compute_dtype: {chosen} ({_reason(chosen, before, speedup)})")
    if chosen == "bfloat16" and speedup < 1:
        warn(f"this machine multiplies bfloat16 {1 / speedup:.1f} times slower than float32")
    if chosen == "float32" and jax.default_backend() == "cpu" and speedup >= _GAIN:
        warn(f"this machine multiplies float32 {speedup:.1f} times slower than bfloat16")
    return chosen


def _reason(chosen: str, before: str, speedup: float) -> str:
    if before:
        return "as the run began"
    if jax.default_backend() != "cpu":
        return "an accelerator"
    return f"this CPU multiplies bfloat16 {speedup:.2g} times as fast as float32"


def bfloat16_speedup() -> float:
    """Speed of bfloat16 matrix products over float32 ones; infinity on accelerators."""
    return _cpu_speedup() if jax.default_backend() == "cpu" else float("inf")


@functools.cache
def _cpu_speedup() -> float:
    """That of this CPU, timed once in half a second and cached with the machine's facts."""
    file = cache_dir() / "dtype" / f"{machine()}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return float(json.loads(file.read_bytes())["bfloat16_speedup"])
    speedup = _measure()
    with suppress(OSError):  # a cache that cannot be written is measured again
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"bfloat16_speedup": speedup})
    return speedup


def _measure() -> float:
    """The ratio of the processor times of one product, in the form that a policy on a CPU uses.

    Processor time, unlike elapsed time, does not count other programs on the machine.
    """
    products = {dtype: _product(dtype) for dtype in ("float32", "bfloat16")}
    seconds = dict.fromkeys(products, 0.0)
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        for dtype, run in products.items():
            begin = time.process_time()
            run()
            seconds[dtype] += time.process_time() - begin
    return seconds["float32"] / max(seconds["bfloat16"], 1e-9)


def _product(dtype: str) -> Callable[[], object]:
    x, w = jnp.ones((_TOKENS, _DIM), dtype), jnp.ones((_DIM, _DIM), dtype)
    compiled = jax.jit(matmul, static_argnums=2).lower(x, w, False).compile()
    return lambda: compiled(x, w).block_until_ready()


def machine() -> str:
    """A name for this processor and the compiler that generates code for it."""
    facts = [platform.machine(), str(os.cpu_count()), jaxlib.version.__version__]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        facts += sorted({line for line in lines if line.startswith(("model name", "flags"))})
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
