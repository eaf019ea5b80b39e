"""`r1s serve`: a trained policy for others to ask."""

from typing import Annotated, Literal

import typer

from r1s_jax.commands.options import (
    CorsOption,
    DialectOption,
    ForceDialect,
    SearchedIndex,
    SearchUrl,
    ThinkingOption,
)

Served = Annotated[
    str, typer.Argument(help="A run's directory, or a path, hf:org/name, wheel:name==version.")
]
Online = Annotated[bool, typer.Option("--online", help="Or the live web.")]
Site = Annotated[str, typer.Option(help="With --online: pages of this site alone.")]
Host = Annotated[str, typer.Option(help="Where to listen; 0.0.0.0: everywhere.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]
ApiKey = Annotated[
    str, typer.Option(envvar="R1S_API_KEY", help="That clients must send; none: anybody may.")
]
Name = Annotated[str, typer.Option(help="Of the model, to clients. [default: MODEL's]")]
Slots = Annotated[int, typer.Option(min=1, help="Answers made at once.")]
Waiting = Annotated[int, typer.Option(min=0, help="More that may wait; then 429.")]
Documents = Annotated[int, typer.Option(min=1, help="Documents a search.")]
Longest = Annotated[
    int, typer.Option(min=16, help="Tokens of a question, its documents and its answer.")
]
Searches = Annotated[int, typer.Option(min=0, help="Of one answer.")]
FirstSearch = Annotated[
    bool, typer.Option(help="Search the question itself before the model starts.")
]
Deadline = Annotated[float, typer.Option(min=1, help="Seconds for one answer.")]
EngineName = Annotated[
    Literal["r1s", "jetstream"],
    typer.Option(help="jetstream: greedy, one device; the extra `jetstream`."),
]


def serve(
    model: Served,
    index: SearchedIndex = None,
    retriever: SearchUrl = "",
    online: Online = False,
    site: Site = "",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = "",
    cors: CorsOption = None,
    name: Name = "",
    slots: Slots = 16,
    waiting: Waiting = 64,
    k: Documents = 3,
    max_length: Longest = 4096,
    max_searches: Searches = 8,
    first_search: FirstSearch = False,
    deadline: Deadline = 300.0,
    engine: EngineName = "r1s",
    dialect: DialectOption = "",
    thinking: ThinkingOption = "",
    force_dialect: ForceDialect = False,
) -> None:
    """Serve a policy that searches: a chat API for OpenAI's clients, and a page to ask on.

    Prints the address once it listens. The API is `POST /v1/chat/completions`, streamed or not:
    `content` is the answer, `reasoning_content` the thoughts, `searches` what was looked up and
    found. SIGTERM and Ctrl-C finish what is in flight. /health and /metrics tell how it is.
    """
    from r1s_jax.border.errors import ConfigError
    from r1s_jax.data.corpora import open_search_engine

    try:
        from r1s_jax.border import listen
        from r1s_jax.border.origins import callers
        from r1s_jax.serving import start
    except ImportError as error:
        raise ConfigError(
            "serving needs the extra `serve`: pip install 'r1s-jax[serve]'"
        ) from error
    allowed = callers(host, cors or (), key=bool(api_key))
    found, _ = open_search_engine(index, retriever, site if online else None)
    limits = {"slots": slots, "waiting": waiting, "k": k, "max_length": max_length}
    limits |= {"max_searches": max_searches, "first_search": first_search, "deadline_s": deadline}
    how = {"dialect": dialect, "thinking": thinking, "force_dialect": force_dialect}
    with listen.bind(host, port) as bound:
        names = {"engine": engine, "name": name, "key": api_key}
        service = start.start(model, found, **names, **limits, **how)
        start.serve(service, bound, typer.echo, allowed)
