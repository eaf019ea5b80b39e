"""Our attention beside the alternatives of a JAX user, all timed in one run.

Every implementation gets the same inputs in its preferred layout and is checked against float32
before it is timed. The timings of all implementations alternate.
"""

import importlib.util
import itertools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from r1s_jax.kernels.attention import api, reference
from r1s_jax.kernels.attention.visibility import seen_keys

# Work of forward + backward in units of the forward pass: seven matrix products against two.
_BACKWARD = 3.5
OURS = "r1s"
# Of whole rows: one sequence, several, and several that share their beginning.
MODES = ("causal", "packed", "shared")
_UNITS = (("tflops", "TFLOP/s"), ("gb_per_s", "GB/s"))


@dataclass(frozen=True)
class Sweep:
    """Sizes to measure. A batch has `tokens` tokens: the longer its rows, the fewer."""

    lengths: tuple[int, ...] = (1024, 4096, 8192)
    head_dims: tuple[int, ...] = (64, 128)
    tokens: int = 16384
    width: int = 2048  # query heads x head width
    per_group: int = 4  # query heads for each key/value head
    dtype: str = "bfloat16"
    capacities: tuple[int, ...] = (1024, 4096, 16384)
    decode_rows: int = 32
    copy_mb: int = 1024
    calls: int = 10  # calls in flight for one timing
    repeats: int = 5


QUICK = Sweep(
    lengths=(192,),
    head_dims=(16,),
    tokens=192,
    width=32,
    per_group=2,
    dtype="float32",
    capacities=(128,),
    decode_rows=2,
    copy_mb=16,
    calls=1,
    repeats=2,
)
# A CPU shows ratios, not the limits of hardware: short rows and few heads suffice.
CPU = Sweep(
    lengths=(1024, 2048),
    tokens=2048,
    width=256,
    dtype="float32",
    capacities=(1024, 4096),
    decode_rows=8,
    copy_mb=256,
    calls=1,
    repeats=3,
)


def bench_attention(sweep: Sweep, progress: Callable[[str], None] = lambda _: None) -> dict:
    """Measures every case of the sweep.

    Returns `device`, `jax`, `copy_gb_per_s`, `callback_us` and `cases`: for each case its shape,
    milliseconds and TFLOP/s (`rows`) or GB/s (`decode`) of each implementation, the largest error
    against float32, and `ratio`: the speed-up of ours over each other implementation.
    """
    cases = []
    for length, head_dim, mode, backward in itertools.product(
        sweep.lengths, sweep.head_dims, MODES, (False, True)
    ):
        cases.append(_rows_case(sweep, length, head_dim, mode, backward))
        progress(_in_words(cases[-1]))
    copy = _copy_gb_per_s(sweep)
    for capacity, head_dim in itertools.product(sweep.capacities, sweep.head_dims):
        cases.append(_decode_case(sweep, capacity, head_dim, copy))
        progress(_in_words(cases[-1]))
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "copy_gb_per_s": copy,
        "callback_us": callback_seconds() * 1e6,
        "cases": cases,
    }


def as_markdown(result: dict) -> str:
    """The cases as a table: our rate, then our speed-up over each other implementation."""
    names = dict.fromkeys(name for case in result["cases"] for name in case["ratio"])
    header = ["case", "length", "width", "ours", *(f"vs {name}" for name in names)]
    lines = [header, ["---"] * len(header)]
    for case in result["cases"]:
        name, rate = _name_and_rate(case)
        ratios = (f"{case['ratio'][n]:.2f}" if n in case["ratio"] else "-" for n in names)
        lines.append([name, str(case["length"]), str(case["head_dim"]), rate, *ratios])
    notes = (
        f"{result['device']}, jax {result['jax']}: copies at {result['copy_gb_per_s']:.0f} GB/s, "
        f"a host callback in a loop costs {result['callback_us']:.0f} us"
    )
    return "\n".join([notes, "", *("| " + " | ".join(line) + " |" for line in lines)])


def _name_and_rate(case: dict) -> tuple[str, str]:
    ours = case["implementations"][OURS]
    rate = next((f"{ours[u]:.3g} {t}" for u, t in _UNITS if u in ours), ours.get("error", ""))
    return f"{case['mode']} {case['pass']}" if case["kind"] == "rows" else "decode", rate


def _in_words(case: dict) -> str:
    """One line, printed at once, so that an interrupted sweep has shown its results."""
    name, rate = _name_and_rate(case)
    ratios = "".join(f", {ratio:.2f}x {peer}" for peer, ratio in case["ratio"].items())
    return f"{name} {case['length']} x {case['head_dim']}: {rate}{ratios}"


def last_queries(mode: str, rows: int, length: int) -> np.ndarray:
    """`last_query` int32[rows, length] of rows that hold six parts of uneven lengths.

    "packed": each part is a trajectory. "shared": the first part is the beginning of the others.
    No padding, so that peers are neither timed nor compared on discarded values.
    """
    rng = np.random.default_rng(length)
    cuts = np.sort([rng.choice(np.arange(1, length), 5, replace=False) for _ in range(rows)])
    ends = np.column_stack([cuts, np.full(rows, length)])
    part = (np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1)
    if mode == "shared":
        ends[:, 0] = length
    return (np.take_along_axis(ends, part, axis=1) - 1).astype(np.int32)


def callback_seconds(calls: int = 1000) -> float:
    """Seconds per host callback inside a jitted `while_loop`."""

    def loop(n: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct((), jnp.int32)

        def body(i: jax.Array) -> jax.Array:
            return io_callback(lambda i: np.int32(i + 1), shape, i, ordered=False)

        return jax.lax.while_loop(lambda i: i < n, body, jnp.int32(0))

    run = jax.jit(loop)
    run(2).block_until_ready()
    begin = time.perf_counter()
    run(calls).block_until_ready()
    return (time.perf_counter() - begin) / calls


def untuned() -> dict[str, int]:
    """Compiler options for programs whose speed does not matter.

    On a GPU, XLA autotunes every matrix product, which takes a minute for a float32 program.
    """
    return {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else {}


def _rows_case(sweep: Sweep, length: int, head_dim: int, mode: str, backward: bool) -> dict:
    heads = max(1, sweep.width // head_dim)
    kv_heads, rows = max(1, heads // sweep.per_group), max(1, sweep.tokens // length)
    q, k, v, dout = normal(
        sweep.dtype, *[(rows, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    )
    last = mask = None
    pairs = rows * length * (length + 1) // 2
    if mode != "causal":
        last = jnp.asarray(last_queries(mode, rows, length))
        pairs = int((last - jnp.arange(length) + 1).sum())
        mask = seen_keys(last)[:, None]

    def timed(attend: Callable) -> Callable:
        if not backward:
            return lambda q, k, v, dout, last, mask: attend(q, k, v, last, mask)
        return jax.value_and_grad(
            lambda q, k, v, dout, last, mask: jnp.sum(
                (attend(q, k, v, last, mask) * dout).astype(jnp.float32)
            ),
            (0, 1, 2),
        )

    runs = {name: timed(attend) for name, attend in _row_peers().items()}
    exact = timed(_without_mask(partial(api.attention, impl="xla")))
    flops = 4 * heads * head_dim * pairs * (_BACKWARD if backward else 1)
    # Inputs are arguments, not constants: XLA takes minutes to fold a mask of 8,192 tokens.
    measured = _measure(runs, exact, (q, k, v, dout, last, mask), sweep)
    return {
        "kind": "rows",
        "length": length,
        "head_dim": head_dim,
        "mode": mode,
        "pass": "forward+backward" if backward else "forward",
        "shape": {"rows": rows, "heads": heads, "kv_heads": kv_heads, "dtype": sweep.dtype},
        "implementations": {
            name: m | ({"tflops": flops / m["ms"] / 1e9} if "ms" in m else {})
            for name, m in measured.items()
        },
        "ratio": _ratios(measured),
    }


def _row_peers() -> dict[str, Callable]:
    """Implementations of attention over whole rows, as functions (q, k, v, last_query, mask)."""
    ours = {OURS: _without_mask(api.attention)}
    if api.default_impl() == "xla":
        ours["interpret"] = _without_mask(partial(api.attention, impl="interpret"))

    def dot_product(function: Callable, q: Any, k: Any, v: Any, last: Any, mask: Any) -> Any:
        masking = {"is_causal": True} if mask is None else {"mask": mask}
        return function(q, k, v, **masking)

    return {
        **ours,
        "reference": _without_mask(reference.attention),
        **{name: partial(dot_product, peer) for name, peer in _dot_product_attentions().items()},
    }


def _without_mask(attend: Callable) -> Callable:
    return lambda q, k, v, last, mask: attend(q, k, v, last_query=last)


def _dot_product_attentions() -> dict[str, Callable]:
    """`dot_product_attention` of JAX and of tokamax, where available."""
    peers = {"jax.nn xla": partial(jax.nn.dot_product_attention, implementation="xla")}
    if jax.default_backend() == "gpu":
        peers["jax.nn cudnn"] = partial(jax.nn.dot_product_attention, implementation="cudnn")
    if importlib.util.find_spec("tokamax"):
        peers["tokamax"] = importlib.import_module("tokamax").dot_product_attention
    return peers


def _decode_case(sweep: Sweep, capacity: int, head_dim: int, copy_gb_per_s: float) -> dict:
    """One new token per row against KV caches that are half full to full."""
    heads = max(1, sweep.width // head_dim)
    kv_heads, rows = max(1, heads // sweep.per_group), sweep.decode_rows
    stored = api.cache_dims(capacity, head_dim)
    q, k, v = normal(
        sweep.dtype,
        (rows, 1, heads, head_dim),
        *[(1, rows, kv_heads, capacity, head_dim)] * 2,
    )
    pad = [(0, 0)] * 3 + [(0, s - n) for s, n in zip(stored, (capacity, head_dim), strict=True)]
    lengths = jnp.asarray(np.linspace(capacity // 2, capacity, rows, dtype=np.int32))
    ours = partial(_with_cache, api.decode_attention, jnp.pad(k, pad), jnp.pad(v, pad), lengths)
    exact = partial(_with_cache, reference.decode_attention, k, v, lengths)
    runs = {OURS: ours, "reference": exact}
    flat = [jnp.asarray(x[0].swapaxes(1, 2)) for x in (k, v)]  # [rows, tokens, heads, width]
    for name, peer in _dot_product_attentions().items():
        runs[name] = partial(_with_flat_cache, peer, *flat, lengths)
    measured = _measure(runs, exact, (q,), sweep)
    cache_bytes = 2 * int(lengths.sum()) * kv_heads * head_dim * jnp.dtype(sweep.dtype).itemsize
    for m in measured.values():
        if "ms" in m:
            m["gb_per_s"] = cache_bytes / m["ms"] / 1e6
            m["of_copy_bandwidth"] = m["gb_per_s"] / copy_gb_per_s
    return {
        "kind": "decode",
        "length": capacity,
        "head_dim": head_dim,
        "shape": {"rows": rows, "heads": heads, "kv_heads": kv_heads, "dtype": sweep.dtype},
        "implementations": measured,
        "ratio": _ratios(measured),
    }


def _with_cache(decode: Callable, k: Any, v: Any, lengths: Any, q: Any) -> Any:
    return decode(q, k, v, jnp.int32(0), lengths)


def _with_flat_cache(attend: Callable, k: Any, v: Any, lengths: Any, q: Any) -> Any:
    return attend(q, k, v, key_value_seq_lengths=lengths)


def _measure(
    runs: dict[str, Callable], exact: Callable, inputs: tuple, sweep: Sweep
) -> dict[str, dict[str, Any]]:
    """Milliseconds and largest error of each implementation, or the `error` that it raised."""
    with jax.default_matmul_precision("highest"):
        wide = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == sweep.dtype else x, inputs
        )
        expected = jax.jit(exact, compiler_options=untuned())(*wide)
    measured: dict[str, dict[str, Any]] = {}
    compiled: dict[str, Callable] = {}
    with ThreadPoolExecutor() as pool:
        programs = {name: pool.submit(_compiled, run, inputs) for name, run in runs.items()}
    for name, program in programs.items():
        try:
            compiled[name] = program.result()
            got = jax.block_until_ready(compiled[name](*inputs))
            measured[name] = {"max_error": _largest_error(got, expected), "ms": math.inf}
        except Exception as error:  # the limits of one implementation must not end the sweep
            measured[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            compiled.pop(name, None)
    del expected
    for _ in range(sweep.repeats):
        for name, run in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready([run(*inputs) for _ in range(sweep.calls)])
            ms = (time.perf_counter() - begin) / sweep.calls * 1e3
            measured[name]["ms"] = min(ms, measured[name]["ms"])
    return measured


def _compiled(run: Callable, inputs: tuple) -> Callable:
    return jax.jit(run).lower(*inputs).compile()


def _largest_error(got: Any, expected: Any) -> float:
    """The largest error in any array, relative to the array's largest expected value."""
    errors = [
        jnp.max(jnp.abs(g.astype(jnp.float32) - e)) / jnp.max(jnp.abs(e))
        for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
        if g.ndim
    ]
    return float(max(errors))


def _ratios(measured: dict[str, dict[str, Any]]) -> dict[str, float]:
    ours = measured[OURS].get("ms")
    others = {n: m["ms"] for n, m in measured.items() if n != OURS and "ms" in m}
    return {name: ms / ours for name, ms in others.items()} if ours else {}


def _copy_gb_per_s(sweep: Sweep) -> float:
    """Memory bandwidth for reading and writing one large array."""
    x = jnp.zeros(sweep.copy_mb * 2**20 // 4, jnp.float32)
    measured = _measure({"copy": lambda x: x + 1}, lambda x: x + 1, (x,), sweep)
    return 2 * x.nbytes / measured["copy"]["ms"] / 1e6


def normal(dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]
