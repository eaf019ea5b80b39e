"""The cost of a program, loop trips counted: its FLOPs and the bytes of its collectives."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def traced_flops(jaxpr: Any, trips: Mapping[str, float]) -> float:
    """Floating-point operations of matrix products, each times the trip counts of its loops.

    A scan counts its length; everything inside a scope `s` of `trips` also counts `trips[s]` times.
    Kernels count by their own estimate, a conditional by its costliest branch.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        stack, kind = str(eqn.source_info.name_stack), eqn.primitive.name
        entered = [scope for scope in trips if scope in stack]
        rest = {scope: n for scope, n in trips.items() if scope not in entered}
        if kind == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            size = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
            flops = 2.0 * size * math.prod(eqn.outvars[0].aval.shape)
        elif kind == "pallas_call":
            flops = eqn.params["cost_estimate"].flops
        else:
            inner = [traced_flops(sub, rest) for sub in _jaxprs(eqn)]
            flops = max(inner, default=0.0) if kind == "cond" else sum(inner)
            flops *= eqn.params["length"] if kind == "scan" else 1
        total += flops * math.prod(trips[scope] for scope in entered)
    return total


def _jaxprs(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def collective_bytes(text: str, trips: Mapping[str, float]) -> dict[str, float]:
    """Bytes of the results of one device's collectives in one run of the program, by kind.

    `text` is optimised HLO, in which loops have no lengths: a collective inside a loop runs
    `trips[scope]` times for each scope (`jax.named_scope`) in its name.
    """
    computations, entry = _parse(text)
    total: dict[str, float] = {}
    for name, in_loop in _visits(computations, entry):
        for kind, size, scope in computations[name][0]:
            times = math.prod(n for s, n in trips.items() if in_loop and s in scope)
            total[kind] = total.get(kind, 0) + size * times
    return total


# Collectives as (kind, bytes, op_name); calls as (computation, whether a loop runs it).
_Computation = tuple[list[tuple[str, int, str]], list[tuple[str, bool]]]


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", ([], [])
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], ([], []))
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            _add(current, *match.groups())
    return computations, entry


def _add(computation: _Computation, shape: str, operation: str, rest: str) -> None:
    collectives, calls = computation
    kind = operation.removesuffix("-start")
    if kind in _COLLECTIVES:
        sizes = [_size(*array) for array in _ARRAY.findall(shape)]
        # The shape of an asynchronous collective holds its operand and its result.
        size = max(sizes) if operation.endswith("-start") else sum(sizes)
        name = _OP_NAME.search(rest)
        collectives.append((kind, size, name[1] if name else ""))
    called = _CALLED.findall(rest)
    if branches := _BRANCHES.search(rest):
        called += [name.strip().lstrip("%") for name in branches[1].split(",")]
    calls += [(name, operation == "while") for name in called]


def _size(kind: str, dims: str) -> int:
    return _BYTES.get(kind, 4) * math.prod(int(d) for d in dims.split(",") if d)


def _visits(
    computations: Mapping[str, _Computation], name: str, in_loop: bool = False
) -> Iterator[tuple[str, bool]]:
    """Every call of every computation, and whether the call is inside a loop."""
    yield name, in_loop
    for called, by_loop in computations[name][1]:
        if called in computations:
            yield from _visits(computations, called, in_loop or by_loop)
