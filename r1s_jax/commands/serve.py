"""`r1s serve`: serves a trained policy over HTTP."""

from typing import Annotated, Literal

import typer

from r1s_jax.commands.options import (
    WIKIPEDIA,
    Changes,
    CorsOption,
    Online,
    SearchedIndex,
    SearchUrl,
    Site,
)

Served = Annotated[
    str, typer.Argument(help="A run's directory, or a path, hf:org/name, wheel:name==version.")
]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")]
ApiKey = Annotated[
    str, typer.Option(envvar="R1S_API_KEY", help="Key that clients must send; empty: no key.")
]
Name = Annotated[str, typer.Option(help="Model name for clients. [default: MODEL's]")]
Waiting = Annotated[int, typer.Option(min=0, help="Requests that may wait; more get status 429.")]
Deadline = Annotated[float, typer.Option(min=1, help="Seconds for one answer.")]
EngineName = Annotated[
    Literal["r1s", "jetstream"],
    typer.Option(help="jetstream: greedy, one device; needs the extra `jetstream`."),
]


def serve(
    model: Served,
    changes: Changes = None,
    index: SearchedIndex = None,
    retriever: SearchUrl = "",
    online: Online = False,
    site: Site = WIKIPEDIA,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = "",
    cors: CorsOption = None,
    name: Name = "",
    waiting: Waiting = 64,
    deadline: Deadline = 300.0,
    engine: EngineName = "r1s",
) -> None:
    """Serve a policy that searches: a chat API for OpenAI's clients, and a page to ask on.

    Prints the address once it listens. The API is `POST /v1/chat/completions`, streamed or not:
    `content` is the answer, `reasoning_content` the thoughts, `searches` the queries and their
    documents. SIGTERM and Ctrl-C finish the requests in flight. /health and /metrics report state.
    """
    from r1s_jax import presets
    from r1s_jax.io.errors import ConfigError
    from r1s_jax.presets import Settings
    from r1s_jax.retrieval.references import open_search_engine

    try:
        from r1s_jax.io import listen
        from r1s_jax.io.origins import callers
        from r1s_jax.serving import start
    except ImportError as error:
        raise ConfigError(
            "serving needs the extra `serve`: pip install 'r1s-jax[serve]'"
        ) from error
    allowed = callers(host, cors or (), key=bool(api_key))
    settings = Settings(presets.serving, changes or ())
    start.checked(settings)  # reports wrong settings before anything is loaded
    search_engine, _ = open_search_engine(index, retriever, site if online else None)
    with listen.bind(host, port) as bound:
        service = start.start(
            model,
            search_engine,
            settings,
            engine=engine,
            name=name,
            key=api_key,
            waiting=waiting,
            deadline_s=deadline,
        )
        start.serve(service, bound, typer.echo, allowed)
