"""Random damage to one file of an example."""

import json
import random
from pathlib import Path
from typing import Any

STRANGE = [None, True, -1, 0, 3.5, 10**30, float("nan"), float("inf"), "", "x" * 5000, "\ud83d"]
STRANGE += ["1e400", "\u0663", "9" * 5000, 10**400, 1e308, -1e308, 1e-320, "1_0", "True", 1, 2]
STRANGE += ["../../etc/passwd", [], {}, [[]], {"a": {"b": []}}, "<|im_end|>", "\x1b]52;c;x\x07"]


def damage(folder: Path, rng: random.Random) -> str:
    """Damages one file of an example; returns its path relative to the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = rng.choice(files)
    data = path.read_bytes()
    kinds = [_bytes_damage]
    if path.suffix in (".json", ".jsonl") or (data[:1] in b"{[" and data):
        kinds += [_value_damage] * 3
    if len(files) > 1:
        kinds.append(lambda d, r: r.choice(files).read_bytes())
    path.write_bytes(rng.choice(kinds)(data, rng))
    return path.relative_to(folder).as_posix()


def _bytes_damage(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((1, 4, 64, 1024)))
    choices = [
        lambda: data[:at],
        lambda: data[:at] + data[end:],
        lambda: data[:at] + bytes(end - at) + data[end:],
        lambda: data[:at] + rng.randbytes(max(1, end - at)) + data[end:],
        lambda: data[:end] + data[at:],
        lambda: b"",
        lambda: bytes(b ^ 1 if i == at else b for i, b in enumerate(data)),
        lambda: b"[" * 100_000,
        lambda: b"\xff\xfe" + data,
        lambda: data.replace(b"\n", b"\r"),
    ]
    return rng.choice(choices)()


def _value_damage(data: bytes, rng: random.Random) -> bytes:
    """Changes one value or key of a JSON text, or of one JSON line."""
    lines = data.split(b"\n")
    whole = data.strip().startswith((b"{\n", b"[\n")) or len(lines) < 2
    i = 0 if whole else rng.randrange(len(lines))
    try:
        value = json.loads(data if whole else lines[i])
    except ValueError:
        return _bytes_damage(data, rng)
    changed = json.dumps(_changed(value, rng)).encode()
    if whole:
        return changed
    return b"\n".join([*lines[:i], changed, *lines[i + 1 :]])


def _changed(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        if rng.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]
    if rng.random() < 0.05:
        deep: Any = value
        for _ in range(500):
            deep = [deep]
        return deep
    return rng.choice(STRANGE)
