"""`r1s serve`: a trained policy for others to ask."""

from typing import Annotated, Literal

import typer

from r1s_jax.commands.options import (
    DialectOption,
    ForceDialect,
    SearchedIndex,
    SearchUrl,
    ThinkingOption,
)


def serve(
    model: Annotated[
        str, typer.Argument(help="A run's directory, or a path, hf:org/name, wheel:name==version.")
    ],
    index: SearchedIndex = None,
    retriever: SearchUrl = "",
    online: Annotated[bool, typer.Option("--online", help="Or the live web.")] = False,
    site: Annotated[str, typer.Option(help="With --online: pages of this site alone.")] = "",
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0: everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[
        str, typer.Option(envvar="R1S_API_KEY", help="That clients must send; none: anybody may.")
    ] = "",
    name: Annotated[str, typer.Option(help="Of the model, to clients. [default: MODEL's]")] = "",
    slots: Annotated[int, typer.Option(min=1, help="Answers made at once.")] = 16,
    waiting: Annotated[int, typer.Option(min=0, help="More that may wait; then 429.")] = 64,
    k: Annotated[int, typer.Option(min=1, help="Documents a search.")] = 3,
    max_length: Annotated[
        int, typer.Option(min=16, help="Tokens of a question, its documents and its answer.")
    ] = 4096,
    max_searches: Annotated[int, typer.Option(min=0, help="Of one answer.")] = 8,
    first_search: Annotated[
        bool, typer.Option(help="Search the question itself before the model starts.")
    ] = False,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds for one answer.")] = 300.0,
    engine: Annotated[
        Literal["r1s", "jetstream"],
        typer.Option(help="jetstream: greedy, one device; the extra `jetstream`."),
    ] = "r1s",
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
        from r1s_jax.serving import start
    except ImportError as error:
        raise ConfigError(
            "serving needs the extra `serve`: pip install 'r1s-jax[serve]'"
        ) from error
    found, _ = open_search_engine(index, retriever, site if online else None)
    with listen.bind(host, port) as bound:
        service = start.start(
            model,
            found,
            engine=engine,
            name=name,
            key=api_key,
            slots=slots,
            waiting=waiting,
            k=k,
            max_length=max_length,
            max_searches=max_searches,
            first_search=first_search,
            deadline_s=deadline,
            **{"dialect": dialect, "thinking": thinking, "force_dialect": force_dialect},
        )
        start.serve(service, bound, announce=typer.echo)
