"""Starting a server for a model's reference."""

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1s_jax.io import listen
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.fields import check
from r1s_jax.io.origins import Callers
from r1s_jax.models.checkpoint import run_of
from r1s_jax.models.pretrained import load_pretrained
from r1s_jax.presets import SERVING, InferenceConfig, Settings
from r1s_jax.retrieval.api import Retriever
from r1s_jax.serving.completion import Limits
from r1s_jax.serving.loop import ServingLoop
from r1s_jax.serving.server import Service, check_key, make_app
from r1s_jax.system.console import console
from r1s_jax.system.dtype import default_dtype


def start(
    model: str,
    retriever: Retriever,
    settings: Settings = SERVING,
    *,
    engine: str = "r1s",
    name: str = "",
    key: str = "",
    waiting: int = 64,
    deadline_s: float = 300.0,
) -> Service:
    """Loads the model and compiles; the returned service answers at once.

    Raises the errors of `load_pretrained`, `Pretrained.speaking` and `Settings.config`, and
    ConfigError for a key that no client can send.
    """
    check_key(key)
    protocol = checked(settings).protocol
    policy = load_pretrained(model, default_dtype()).speaking(protocol)
    config = settings.config(policy.model.max_position)
    console.print("Compiling")
    make_loop = _loop_class(engine)
    serving_loop = make_loop(
        policy, retriever, config.rollout, search=config.search, waiting=waiting
    )
    limits = Limits(deadline_s=deadline_s)
    return Service(serving_loop, name or name_of(model), key=key, limits=limits)


def checked(settings: Settings) -> InferenceConfig:
    """The settings, before the model is known. Raises ConfigError for one that cannot apply."""
    config = settings.config()
    check(not config.seed, "seed is a setting of each request: leave it out")
    return config


def name_of(model: str) -> str:
    """The model's name for clients: its reference without source, revision and checkpoint."""
    kind, _, rest = model.partition(":")
    if kind in ("hf", "wheel"):
        name = re.split("@|==|:", rest)[0]
    else:
        path = Path(os.path.abspath(Path(model).expanduser()))
        name = str(run_of(path) or path)
    return Path(name).name or "model"


def _loop_class(engine: str) -> Callable[..., Any]:
    if engine != "jetstream":
        return ServingLoop
    try:
        from r1s_jax.serving.jetstream import JetStreamLoop
    except ImportError as error:
        raise ConfigError(
            "--engine jetstream needs the extra `jetstream` (pip install 'r1s-jax[jetstream]'): "
            f"{error}"
        ) from error
    return JetStreamLoop


def serve(
    service: Service,
    bound: socket.socket,
    announce: Callable[[str], None],
    allowed: Callers | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT; then refuses new requests and finishes running answers."""

    def stopping() -> None:
        service.stopping = True

    app = make_app(service, allowed)
    listen.serve(app, bound, announce, stopping, service.limits.deadline_s)
