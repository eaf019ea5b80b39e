"""Dialects by name, and their files beside the policies' weights."""

from pathlib import Path
from typing import Any

import msgspec

from r1s_jax.config import Thinking
from r1s_jax.io.errors import ConfigError, UserError
from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check
from r1s_jax.protocol.dialect import Dialect
from r1s_jax.protocol.r1_searcher import R1Searcher
from r1s_jax.protocol.search_r1 import SearchR1
from r1s_jax.protocol.tool_call import Frame, ToolCall

DIALECTS: dict[str, type[Dialect]] = {d.name: d for d in (R1Searcher, SearchR1, ToolCall)}
# Stands beside a model's config.json; only r1s_jax reads it.
FILE = "r1s_protocol.json"


class _Saved(msgspec.Struct):
    """The JSON form of `Dialect.as_dict`."""

    dialect: str
    thinking: Thinking = "template"
    prompt: str | None = None
    tell_invalid: bool = True
    frame: Frame | None = None


def make_dialect(name: str, thinking: str = "template", prompt: str | None = None) -> Dialect:
    """The dialect `name`. Raises ConfigError for an unknown name or a prompt without {question}."""
    return from_dict({"dialect": name, "thinking": thinking, "prompt": prompt}, "the dialect")


def from_dict(
    saved: dict[str, Any], where: str | Path, error: type[UserError] = ConfigError
) -> Dialect:
    """The dialect of a `Dialect.as_dict`; raises `error`, naming `where`, for anything else."""
    fields = check(saved, _Saved, where, error)
    if fields.dialect not in DIALECTS:
        raise error(f"{where}: no dialect {fields.dialect!r}; there are: {', '.join(DIALECTS)}")
    if fields.prompt is not None and "{question}" not in fields.prompt:
        raise error(f"{where}: a prompt template needs the field {{question}}; this one has none")
    own: dict[str, Any] = {}
    if fields.dialect == ToolCall.name and fields.frame is not None:
        own = {"frame": fields.frame}
    return DIALECTS[fields.dialect](fields.thinking, fields.prompt, fields.tell_invalid, **own)


def read_dialect(folder: Path, error: type[UserError] = ConfigError) -> Dialect | None:
    """The dialect file in a model's folder; None if there is none."""
    file = folder / FILE
    return from_dict(read_object(file, error), file, error) if file.is_file() else None
