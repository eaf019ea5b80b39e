"""`r1s eval`: answers questions, scores and judges the answers."""

import itertools
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from r1s_jax.commands.options import (
    WIKIPEDIA,
    AsJson,
    Changes,
    Model,
    Online,
    SearchedIndex,
    SearchUrl,
    Site,
)

app = typer.Typer(no_args_is_help=True, help="Answer questions, score and judge the answers.")


QuestionsFile = Annotated[
    str,
    typer.Argument(
        help="JSON lines {question, answer}, .gz too, or another published form; or a benchmark "
        "by name (r1s data benchmarks)."
    ),
]
AnswersOut = Annotated[Path, typer.Option(help="File of answers to write, or to continue.")]
How = Annotated[
    Literal["search", "rag", "direct"],
    typer.Option(help="rag: one search, for the question itself; direct: no search."),
]
FirstFew = Annotated[int, typer.Option(min=0, help="Only the first N questions; 0: all.")]
Forks = Annotated[
    Literal["", "nothing", "random", "answer"],
    typer.Option(
        help="Also answer as if each search had found nothing, or the documents of another "
        "question, or had not been made: what was it worth?"
    ),
]
Samples = Annotated[
    int,
    typer.Option(min=1, help="Answers per question; several need rollout.temperature above 0."),
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Answer again the rows whose search failed.")
]


@app.command("run")
def run(
    questions: QuestionsFile,
    model: Model,
    out: AnswersOut,
    changes: Changes = None,
    index: SearchedIndex = None,
    retriever: SearchUrl = "",
    online: Online = False,
    site: Site = WIKIPEDIA,
    mode: How = "search",
    samples: Samples = 1,
    forks: Forks = "",
    limit: FirstFew = 0,
    retry_failed: RetryFailed = False,
) -> None:
    """Answer a file of questions, for `r1s eval score`.

    Writes one row per answer, in order, as they finish; a stopped run continues where its file
    ends. If too many searches fail, the exit status is 1; the rows show which ones. With --forks,
    `r1s eval score` tells what searches were worth and `r1s traces` shows what became of each row.
    """
    from r1s_jax import presets
    from r1s_jax.eval.run import EvalRun, answer_file
    from r1s_jax.presets import Settings
    from r1s_jax.retrieval.references import open_search_engine
    from r1s_jax.system.console import progress_bar

    settings = Settings(presets.evaluation, [*presets.all_forks(forks), *(changes or ())])
    run = EvalRun(questions, model, settings, mode, samples, limit)
    engine, source = None, {}
    if mode != "direct":
        engine, source = open_search_engine(index, retriever, site if online else None)
    with progress_bar("Answering") as advance:
        answer_file(run, engine, source, out, advance, retry_failed=retry_failed)
    _print_searches(out)
    typer.echo(str(out))


def _print_searches(out: Path) -> None:
    from r1s_jax.data.results import read_header
    from r1s_jax.system.console import console

    if searches := (read_header(out) or {}).get("searches"):
        counts = ", ".join(f"{n} {outcome}" for outcome, n in searches.items())
        console.print(f"Searches: {counts}")


@app.command("score")
def score(
    files: Annotated[
        list[Path], typer.Argument(help="JSON lines {question, answer, pred_ans, ...}; .gz too.")
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per file, then one per comparison.")
    ] = False,
) -> None:
    """EM, cover-EM, F1 and judged accuracy with 95 % intervals; files compared pairwise.

    Each score names its normaliser: R1-Searcher's replaces punctuation by spaces, SQuAD's
    (HotpotQA, Search-R1) removes it. Several samples per question add avg@k and pass@k. Percentages
    have one decimal, as in papers; `exact` in the JSON has them in full.
    """
    from r1s_jax.data.results import read_header, read_results
    from r1s_jax.eval import score as scoring
    from r1s_jax.system.console import warn

    results = [read_results(file) for file in files]
    headers = [read_header(file) or {} for file in files]
    if len({h["questions"]["sha256"] for h in headers if "questions" in h}) > 1:
        warn("these files answer different questions: comparisons are over the common ones")
    summaries = [
        {"file": str(f), **scoring.summarize(r)} for f, r in zip(files, results, strict=True)
    ]
    pairs = itertools.combinations(range(len(files)), 2)
    gains = [
        {"first": str(files[i]), "second": str(files[j]), **gain}
        for i, j in pairs
        if (gain := scoring.compare(results[i], results[j]))
    ]
    if as_json:
        for row in (*summaries, *gains):
            typer.echo(json.dumps(row, ensure_ascii=False))
    else:
        scoring.print_tables(summaries, gains)


@app.command("explain")
def explain(
    file: Annotated[Path, typer.Argument(help="Answers, as `r1s eval run` writes them; .gz too.")],
    index: Annotated[Path, typer.Option(help="Directory of the index that was searched.")],
    questions: Annotated[
        str,
        typer.Option(help="Questions with supporting titles. [default: those that were answered]"),
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Write the rows with their `cause`.")] = None,
    as_json: AsJson = False,
) -> None:
    """Where do the errors come from: the corpus, the search engine or the policy?

    Every wrong answer has one cause, so that the shares add up to the loss. See examples with
    `r1s traces OUT --cause never_asked`.
    """
    from r1s_jax.eval.explain import as_table, explain_file
    from r1s_jax.retrieval.references import open_saved_index
    from r1s_jax.system.console import bars, console

    with bars() as progress:
        result = explain_file(file, open_saved_index(index), questions, out, progress)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    console.print(as_table(result))
    console.print(f"{result['with_titles']} of {result['answers']} answers have known titles")
    if out:
        console.print(f"Examples: r1s traces {out} --cause never_asked")


@app.command("judge")
def judge(
    file: Annotated[Path, typer.Argument(help="Answers, as `r1s eval run` writes them; .gz too.")],
    url: Annotated[
        str, typer.Option(help="Base of an OpenAI-compatible API (http://...:8000/v1).")
    ],
    model: Annotated[str, typer.Option(help="Name of the judge at that endpoint.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write. [default: FILE.judged.jsonl]")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    requests_per_minute: Annotated[int, typer.Option(min=0, help="0: no limit.")] = 0,
    temperature: Annotated[
        float, typer.Option(min=-1, help="-1: not sent, for models that refuse it.")
    ] = 0.0,
) -> None:
    """Ask a language model whether each answer is right; `r1s eval score` shows the share.

    The API key comes from OPENAI_API_KEY. A stopped or failed run resumes when called again.
    The last line printed is JSON: the count of each verdict.
    """
    from r1s_jax.eval.judge import judge_file
    from r1s_jax.system.chat_api import ChatEndpoint
    from r1s_jax.system.console import progress_bar

    name = file.name.removesuffix(".gz").removesuffix(".jsonl")
    out = out or file.with_name(f"{name}.judged.jsonl")
    sent = None if temperature < 0 else temperature
    judge = ChatEndpoint(url, model, concurrency, requests_per_minute, sent)
    with progress_bar("Judging") as advance:
        verdicts = judge_file(file, judge, out, advance)
    typer.echo(json.dumps({"file": str(out), **verdicts}))


@app.command("table")
def table(
    files: Annotated[
        list[Path], typer.Argument(help="Answers, judged or not; one file per benchmark.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Also write OUT.md, OUT.csv and OUT.png.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="EM on Search-R1's seven benchmarks, and their average.")
    ] = False,
) -> None:
    """The paper's table (cover-EM / judge, by benchmark) with the published rows beside yours.

    --all shows only your rows: exact match by SQuAD's normaliser on seven benchmarks, as Search-R1
    reports it, and the macro-average of each model that was measured on all of them.
    """
    from r1s_jax.eval import table as paper

    cells = [*(() if every else paper.published()), *paper.measured(files)]
    text = paper.as_wide_markdown(cells) if every else paper.as_markdown(cells)
    typer.echo(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(out.name + ".md").write_text(text + "\n", "utf-8")
        out.with_name(out.name + ".csv").write_text(paper.as_csv(cells), "utf-8")
        paper.plot(cells, out.with_name(out.name + ".png"), wide=every)


@app.command("export")
def export(
    file: Annotated[Path, typer.Argument(help="Answers, as `r1s eval run` writes them; .gz too.")],
    form: Annotated[str, typer.Option("--format", help="hotpotqa, 2wiki, musique or search_r1.")],
    out: Annotated[Path, typer.Option(help="File to write; it must not exist yet.")],
) -> None:
    """Write answers as the official scorer of a benchmark reads them, by the benchmark's own ids.

    The last line printed is JSON: the file and its number of answers.
    """
    from r1s_jax.eval.export import export as export_answers

    answers = export_answers(file, form, out)
    typer.echo(json.dumps({"file": str(out), "answers": answers}))
