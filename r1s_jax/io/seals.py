"""Seals: digests inside JSON objects and lines, so that a change of them shows."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEAL = "seal"
_SEALED = re.compile(rb', "seal": "([0-9a-f]{16})"\}\n')
_WHOLE = re.compile(rb"[0-9a-f]{16}.?.?.?$")  # the end of a line but for its last characters


def digest(*parts: Any) -> str:
    """16 hexadecimal digits (BLAKE2b) of texts, of bytes, and of arrays with dtype and shape.

    Other values count by their JSON.
    """
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bytes):
            kind, data = b"b", part
        elif hasattr(part, "dtype"):
            kind, data = f"{part.dtype}{part.shape}".encode(), part.tobytes()
        else:
            text = (
                part if isinstance(part, str) else json.dumps(part, sort_keys=True, default=float)
            )
            kind, data = b"t", text.encode("utf-8", "surrogatepass")
        total.update(b"%s %d " % (kind, len(data)))
        total.update(data)
    return total.hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values together with a digest of them, which replaces an older one."""
    plain = {k: v for k, v in values.items() if k != SEAL}
    return {**plain, SEAL: _of_object(plain)}


def is_sealed(values: Mapping[str, Any]) -> bool:
    """Whether the seal in `values` matches them."""
    return values.get(SEAL) == _of_object({k: v for k, v in values.items() if k != SEAL})


def _of_object(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def sealed_line(row: Mapping[str, Any], before: str) -> tuple[str, str]:
    """The line of a row, which must not be empty, and its seal, the last key.

    `before` is the seal of the line before; "": there is none. As the seal is a digest of that and
    of the line's own text, no character can change, and no line can go missing from the middle or
    change its place.
    """
    text = json.dumps(row, ensure_ascii=False)[:-1]
    seal = digest(before, text)
    return f'{text}, "{SEAL}": "{seal}"}}\n', seal


def last_seal(rows: list[dict[str, Any]]) -> str:
    """The seal of the last of these rows; "" where there is none."""
    return str(rows[-1].get(SEAL, "")) if rows else ""


def broken_seal(path: Path, unsealed: int = 0) -> str:
    """What is wrong with the first line that does not follow from the one before; "": nothing is.

    The first `unsealed` lines may have no seal: a version without seals wrote them. A last line
    that a crash cut off is passed over.
    """
    before = ""
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        match = _SEALED.search(line)
        if not match or match.end() != len(line):
            if number <= unsealed and not match:
                continue
            if not (line.endswith(b"\n") or _WHOLE.search(line)):
                return ""
            return f"line {number} is not as it was written: it ends without its seal"
        text = line[: match.start()].decode("utf-8", "replace")
        if digest(before, text) != (seal := match[1].decode()):
            return f"line {number} is not as it was written"
        before = seal
    return ""
