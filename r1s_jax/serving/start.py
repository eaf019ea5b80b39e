"""From a model's reference to a server of it."""

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1s_jax.border import listen
from r1s_jax.border.errors import ConfigError
from r1s_jax.border.origins import Callers
from r1s_jax.config import RolloutConfig
from r1s_jax.models.checkpoint import run_of
from r1s_jax.models.pretrained import default_dtype, load_pretrained
from r1s_jax.retrieval.api import Retriever
from r1s_jax.serving.exchange import Limits
from r1s_jax.serving.searcher import Searcher
from r1s_jax.serving.server import Service, check_key, make_app
from r1s_jax.system.console import console

# Answers seldom get their documents at the same moment: a chunk of one of them, and a long one.
PREFILL: dict[str, Any] = {"prefill_rows": 1, "prefill_chunk": 128}


def start(
    model: str,
    retriever: Retriever,
    *,
    engine: str = "r1s",
    name: str = "",
    key: str = "",
    slots: int = 16,
    waiting: int = 64,
    k: int = 3,
    max_length: int = 4096,
    max_searches: int = 8,
    first_search: bool = False,
    deadline_s: float = 300.0,
    dialect: str = "",
    thinking: str = "",
    force_dialect: bool = False,
) -> Service:
    """Loads and compiles; what is returned answers at once.

    Raises what `load_pretrained` and `Pretrained.speaking` raise, and ConfigError for a key that no
    client can send.
    """
    check_key(key)
    policy = load_pretrained(model, default_dtype()).speaking(
        dialect, thinking, force=force_dialect
    )
    length = min(max_length, policy.model.max_position)
    config = RolloutConfig(
        slots=slots,
        **PREFILL,
        max_length=length,
        max_prompt_length=length - 1,
        max_turn_length=min(2048, length),
        max_documents_length=min(768, length),
        max_searches=max_searches,
        documents_per_query=k,
    )
    console.print("Compiling")
    searcher = _kind(engine)(policy, retriever, config, waiting=waiting)
    told, limits = name or name_of(model), Limits(deadline_s=deadline_s)
    return Service(searcher, told, key=key, first_search=first_search, limits=limits)


def name_of(model: str) -> str:
    """What a model is called by clients: without where it comes from, which revision it is or
    which checkpoint of a run."""
    kind, _, rest = model.partition(":")
    if kind in ("hf", "wheel"):
        named = re.split("@|==|:", rest)[0]
    else:
        path = Path(os.path.abspath(Path(model).expanduser()))
        named = str(run_of(path) or path)
    return Path(named).name or "model"


def _kind(engine: str) -> Callable[..., Any]:
    if engine != "jetstream":
        return Searcher
    try:
        from r1s_jax.serving.jetstream import JetStreamSearcher
    except ImportError as error:
        raise ConfigError(
            f"--engine jetstream needs the extra `jetstream` (pip install 'r1s-jax[jetstream]'): "
            f"{error}"
        ) from error
    return JetStreamSearcher


def serve(
    service: Service,
    bound: socket.socket,
    announce: Callable[[str], None],
    allowed: Callers | None = None,
) -> None:
    """Until SIGTERM or SIGINT. Answers in flight are finished, new requests refused."""

    def stopping() -> None:
        service.stopping = True

    app = make_app(service, allowed)
    listen.serve(app, bound, announce, stopping, service.limits.deadline_s)
