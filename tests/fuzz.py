"""Damages valid examples of everything that is read, and looks at what comes of it.

`python -m tests.fuzz [--reader NAME] [--seed S] [--inputs N]` prints a table and ends with status 1
where a reader showed a traceback, hung, died, gave an error that does not name its file or is
longer than 400 characters, or used damaged parameters, vectors or indexes.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import random
import shutil
import socket
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

OUTCOMES = ("clear", "unnamed", "long", "traceback", "hang", "crash", "same", "other", "used")
BAD = ("unnamed", "long", "traceback", "hang", "crash", "used")
PATIENCE_S = 60.0
MOST_CHARACTERS = 400


@dataclass(frozen=True)
class Reader:
    """How an example is made, what is called, and which of its files must never be used damaged."""

    make: Callable[[Path], None]
    call: Callable[[Path], Any]
    sealed: tuple[str, ...] = ()  # patterns of files whose numbers are under a checksum
    weight: int = 10  # its share of the inputs


def _lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _questions(folder: Path) -> None:
    rows = [{"id": i, "question": f"Who is {i}?", "answer": ["a", "b"]} for i in range(4)]
    (folder / "q.jsonl").write_text(_lines(*rows))


def _published_questions() -> list[dict[str, Any]]:
    """A row of each published form, which may stand together in one file."""
    facts = {"title": ["Ada", "Bo"], "sent_id": [0, 1]}
    pages = [{"idx": 0, "title": "Ada", "is_supporting": True}, {"idx": 1, "title": "Bo"}]
    steps = [{"id": 1, "support_paragraph": {"title": "Ada"}}]
    messages = [{"role": "user", "content": "Answer it. Question: who sings x?"}]
    truth = {"ground_truth": {"target": ["a", "b"]}, "style": "rule"}
    asked = {"question": "Who?"}
    return [
        asked | {"_id": "h", "answer": "yes", "supporting_facts": [["Ada", 0], ["Bo", 1]]},
        asked | {"id": "w", "answer": "yes", "supporting_facts": facts},
        asked | {"id": "m", "answer": "a", "answer_aliases": ["b"], "paragraphs": pages},
        asked | {"answers": ["a"], "positive_ctxs": []},
        asked | {"question_id": "t", "answer": {"value": "a", "aliases": ["b", "c"]}},
        asked | {"id": 42, "possible_answers": '["a", "b"]'},
        {"prompt": messages, "reward_model": truth, "extra_info": {"index": 0}},
        asked | {"id": "f", "golden_answers": ["a"], "metadata": {"supporting_facts": facts}},
        asked | {"id": "g", "golden_answers": ["a"], "metadata": {"question_decomposition": steps}},
    ]


def _tables(folder: Path) -> None:
    """Questions in CSV, TSV and DPR's form."""
    rows = [f'{i},"Who, then, is {i}?","[""a"", ""b""]"' for i in range(3)]
    (folder / "q.csv").write_text("\n".join(["id,question,answer", *rows]) + "\n")
    rows = [f"Who is {i}?\t['a', \"b\"]\n" for i in range(3)]
    (folder / "q.tsv").write_text("problem\tanswers\n" + "".join(rows))
    (folder / "dpr.csv").write_text("".join(rows))


def _read_tables(folder: Path) -> Any:
    return [_read_questions(name)(folder) for name in ("q.csv", "q.tsv", "dpr.csv")]


def _squad(folder: Path) -> None:
    answers = [{"text": "a", "answer_start": 3}, {"text": "b", "answer_start": 9}]
    asked = [{"id": f"q{i}", "question": f"Who is {i}?", "answers": answers} for i in range(3)]
    asked[2] |= {"is_impossible": True, "answers": []}
    whole = {
        "version": "2",
        "data": [{"title": "T", "paragraphs": [{"context": "c", "qas": asked}]}],
    }
    (folder / "squad.json").write_text(json.dumps(whole, indent=1))
    row = {"question": "Who?", "context": "c", "answers": {"text": ["a"], "answer_start": [3]}}
    rows = [row | {"id": "h0"}, row | {"id": "h1", "answers": {"text": [], "answer_start": []}}]
    (folder / "hub.jsonl").write_text(_lines(*rows))


def _read_squad(folder: Path) -> Any:
    return [_read_questions(name)(folder) for name in ("squad.json", "hub.jsonl")]


def _read_questions(name: str) -> Callable[[Path], Any]:
    return lambda folder: _import("data.questions", "read_questions")(folder / name)


def _results(folder: Path) -> None:
    row = {"question": "Who?", "answer": "Ada", "pred_ans": "Ada", "stop_reason_final": "finished"}
    row |= {"gen_text_store": "x </think> <answer> Ada </answer>", "searches": 1, "judge": "True"}
    rows = [row | {"id": i} for i in range(3)]
    rows += [row | {"id": "s", "sample": i, "supporting_recall": 0.5} for i in range(2)]
    (folder / "a.jsonl").write_text(_lines(*rows))
    header = _header() | {"judge": {"model": "j", "url": "u"}}
    (folder / "a.jsonl.header.json").write_text(json.dumps(header))


def _header() -> dict[str, Any]:
    """Of a file of answers to the questions of `_journal_questions`."""
    from r1s_jax.eval.journal import describe
    from r1s_jax.protocol.dialects import make_dialect

    asked = {"model": "m", "mode": "rag", "questions": "q", "k": 5, "prompt": None}
    header = describe(asked, _journal_questions(), {"corpus": "c", "digests": {"a": "b"}})
    header |= {"model": {"sha256": "5" * 64, "checkpoint": 7}, "searches": {"found": 3}}
    return header | {"dialect": make_dialect("r1_searcher").as_dict()}


def _journal_questions() -> list[Any]:
    from r1s_jax.data.questions import Question

    return [Question(i, f"Who is {i}?", ("Ada",)) for i in range(3)]


def _answers(folder: Path) -> None:
    """What a stopped `r1s eval run` leaves, and a stopped `r1s data select`."""
    told = {"answer": "Ada", "stop_reason_final": "finished", "gen_text_store": "x", "searches": 1}
    told |= {"prompt_tokens": 3, "sampled_tokens": 4, "seconds": 0.5, "pred_ans": "Ada"}
    told |= {"search_outcomes": ["found"]}
    rated = {"answer": "Ada", "first_solved": None, "solved": 0, "difficulty": "hard"}
    for name, key, values in (("a.jsonl", "id", told), ("m.jsonl", "idx", rated)):
        rows = [{key: q.id, "question": q.question} | values for q in _journal_questions()]
        (folder / name).write_text(_lines(*rows[:2]))
        (folder / f"{name}.header.json").write_text(json.dumps(_header()))


def _answer_on(folder: Path) -> Any:
    from r1s_jax.eval import difficulty, run

    questions, now = _journal_questions(), _header()
    del now["model"], now["searches"]
    answered, before = run._already(folder / "a.jsonl", now, questions, 1)
    counts = run._Searches(answered, 1.0).counts()
    measured = difficulty._resume(folder / "m.jsonl", now, questions)
    return answered, before and before["model"].get("checkpoint"), counts, measured


def _score(folder: Path) -> Any:
    from r1s_jax.data.results import read_results
    from r1s_jax.data.traces import read_traces
    from r1s_jax.eval.score import summarize
    from r1s_jax.eval.table import as_csv, as_markdown, as_wide_markdown, measured

    file = folder / "a.jsonl"
    cells = measured([file])
    shown = as_markdown(cells), as_wide_markdown(cells), as_csv(cells)
    return summarize(read_results(file)), shown, [trace.title() for trace in read_traces(file)]


def _verdicts(folder: Path) -> None:
    (folder / "v.jsonl").write_text(_lines(*({"key": f"k{i}", "verdict": "True"} for i in "ab")))


def _read_verdicts(folder: Path) -> Any:
    from r1s_jax.border.errors import BadInput
    from r1s_jax.learning.judged import read_verdicts

    return read_verdicts(folder / "v.jsonl", BadInput)


def _run(folder: Path) -> None:
    from tests.makers import save_small_run

    save_small_run(folder / "run")


def _rows_of_run(folder: Path) -> None:
    """What a report reads."""
    _run(folder)
    for name in ("checkpoints", "policy"):
        shutil.rmtree(folder / "run" / name)


def _resumable(folder: Path) -> None:
    """A run with two checkpoints, of small arrays, and a search and its documents in flight."""
    from r1s_jax.config import override
    from r1s_jax.configs import tiny_world
    from r1s_jax.models.checkpoint import Checkpoints
    from r1s_jax.tracking.progress import Progress
    from r1s_jax.tracking.run_dir import open_run_dir

    run = open_run_dir(folder / "run", override(tiny_world.config(), []), resume=False)
    (run / "metrics.jsonl").touch()
    checkpoints = Checkpoints(run / "checkpoints", keep=3, run=run)
    for step in (1, 2):
        progress = Progress(phase="learning", step=step, before={"f1": 0.5}, carried=_carried(step))
        checkpoints.save(step, _state(step), progress.as_dict(), 0.25 * step)
    checkpoints.close()


def _carried(step: int) -> str | None:
    from r1s_jax.data.questions import Question
    from r1s_jax.learning.carry_over import CarryOver
    from r1s_jax.rollout.broker import Search
    from r1s_jax.rollout.flight import Flight

    asked = Question(step, "Who is Bakori?", ("a smith",))
    begun = {"occurrence": 0, "step": step, "draw": 0, "start": 3}
    flights = [Flight.begun(asked, [1, 2, 3], sample=i, **begun) for i in range(2)]
    flights[0].note_first(Search(0, "Bakori", "found", ("Bakori   is a smith",), seconds=0.5))
    carried = CarryOver(None, None, None)
    carried.groups = [flights]
    return carried.state()


def _state(step: int) -> Any:
    import jax

    from r1s_jax.learning.learner import LearnerState

    weights = jax.random.normal(jax.random.key(step), (16, 8))
    return LearnerState({"w": weights, "norm": weights[0]}, {"mu": 2 * weights})


def _resume(folder: Path) -> Any:
    """As a run resumes; what it goes on from, unless that is what was saved."""
    from r1s_jax.config import override
    from r1s_jax.configs import tiny_world
    from r1s_jax.learning.carry_over import CarryOver
    from r1s_jax.models.checkpoint import Checkpoints, DamagedCheckpoint
    from r1s_jax.tracking.progress import Progress
    from r1s_jax.tracking.run_dir import open_run_dir

    run = open_run_dir(folder / "run", override(tiny_world.config(), []), resume=True)
    while True:
        checkpoints = Checkpoints(run / "checkpoints", keep=3, run=run)
        try:
            progress = checkpoints.progress(Progress.of)
            state, carried = checkpoints.restore(_state(0)), CarryOver(None, None, None)
            with checkpoints.reading():
                carried.restore(progress.carried)
            checkpoints.best()
            break
        except DamagedCheckpoint:
            continue
        finally:
            checkpoints.close_after_error()
    step = progress.step
    before = Progress(phase="learning", step=step, before={"f1": 0.5}, carried=_carried(step))
    sound = progress == before and digest(state) == digest(_state(step))
    return "sound" if sound else (state, progress)


def _journals(folder: Path) -> None:
    _rows_of_run(folder)
    spans = [["<answer>", False], ["Ada", True]]
    row = {"question": "Who?", "answers": ["Ada"], "f1": 0.5, "searches": 1, "spans": spans}
    (folder / "run" / "evaluation_before.jsonl").write_text(
        _lines(row | {"id": 1}, row | {"id": 2})
    )


def _go_on(folder: Path) -> Any:
    """What a resumed run does with its journals, to its summary and its card."""
    from r1s_jax.models.export import _card
    from r1s_jax.protocol.solution import R1_SEARCHER
    from r1s_jax.tracking import health
    from r1s_jax.tracking.summary import _evaluated, _gain, _show_trajectories
    from r1s_jax.tracking.telemetry import Telemetry

    run = folder / "run"
    telemetry = Telemetry(run)
    telemetry.rewind(cold_start=100, learning=3)
    rows = telemetry.steps()
    fired = health.check(health.History(rows)) if rows else []
    before = _evaluated(run, "before")
    if before:
        _show_trajectories(before, before, R1_SEARCHER)
    files = [path.read_bytes() for path in sorted(run.glob("*.jsonl"))]
    after = [{"id": 1, "f1": 0.5}, {"id": 2, "f1": 1.0}]
    return fired, files, _gain(before, after), _card(run, R1_SEARCHER)


def _lab(folder: Path) -> None:
    from r1s_jax.commands.lab import _check_same_lab, run_folder
    from r1s_jax.tracking.arms import Arm
    from r1s_jax.tracking.run_dir import open_run_dir

    arm = Arm("a", ())
    _check_same_lab(folder / "lab", "tiny_world", [], [arm])
    run = run_folder(folder / "lab", "a", 0)
    open_run_dir(run, _plan(folder, arm).config, resume=False)
    row = {"step": 1, "answer_f1": 0.5, "seconds_rollout": 1.0, "seconds_update": 0.5, "health": []}
    (run / "metrics.jsonl").write_text(_lines(row, row | {"step": 2}))
    (run / "summary.json").write_text(json.dumps({"f1_before": 0.1, "f1_after": 0.9}))


def _plan(folder: Path, arm: Any) -> Any:
    from r1s_jax.commands.lab import _planned

    return _planned("tiny_world", [], arm, 0, folder / "lab")


def _go_on_with_lab(folder: Path) -> Any:
    from r1s_jax.commands.lab import _check_same_lab, _is_done, _note_move, run_folder
    from r1s_jax.tracking.arms import Arm, as_markdown, plot_arms, run_result, table_of

    arm, out = Arm("a", ()), folder / "lab"
    plan, run = _plan(folder, arm), run_folder(out, "a", 0)
    _check_same_lab(out, "tiny_world", [], [arm])
    _note_move(run, plan)
    done = _is_done(out, arm, 0, plan)
    plot_arms({"a": [run]}, out / "curves.png")
    return done, as_markdown(table_of({"a": [run_result(run)]}))


def _report(folder: Path) -> Any:
    from r1s_jax.tracking.report import _read_run
    from r1s_jax.tracking.trace_view import as_text

    data = _read_run(folder / "run", "run", "A", 5)
    return [as_text(trace).plain for trace in data.traces], data.rows, data.config, data.summary


def _page(folder: Path) -> Any:
    from r1s_jax.tracking.report import write_report

    write_report([folder / "run"], folder / "report.html")


def _load_run(folder: Path) -> Any:
    from r1s_jax.models.pretrained import load_pretrained

    return load_pretrained(str(folder / "run"))._replace(tokenizer=None)


def _tsv(folder: Path) -> None:
    (folder / "p.tsv").write_text("".join(f"{i}\tTown {i}   lies by river {i}.\n" for i in "0123"))


def _jsonl(folder: Path) -> None:
    rows = [{"id": i, "title": f"Town {i}", "text": "lies by a river"} for i in range(3)]
    (folder / "p.jsonl").write_text(_lines(*rows, {"id": 9, "contents": '"T"\nx'}))


def _passages(name: str) -> Callable[[Path], Any]:
    def call(folder: Path) -> Any:
        from r1s_jax.retrieval.corpus import read_passages

        return list(read_passages(folder / name))

    return call


def _index(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from r1s_jax.retrieval.corpus import read_passages
        from r1s_jax.retrieval.encoder import HashEncoder
        from r1s_jax.retrieval.index import build_index, save_index

        _tsv(folder)
        passages = read_passages(folder / "p.tsv")
        save_index(build_index(passages, HashEncoder(64), kind=kind), folder / "i")
        (folder / "p.tsv").unlink()

    return make


def _search(folder: Path) -> Any:
    from r1s_jax.retrieval.encoder import HashEncoder
    from r1s_jax.retrieval.index import open_index

    return open_index(folder / "i", HashEncoder(64)).search(["river 3"], 2)


def _vectors(folder: Path) -> None:
    from r1s_jax.retrieval.api import Passage
    from r1s_jax.retrieval.encoder import HashEncoder
    from r1s_jax.retrieval.vectors import Corpus, encode_shard

    corpus = Corpus(lambda: [Passage(str(i), f"Town {i}   lies") for i in range(8)])
    for shard in range(2):
        encode_shard(corpus, HashEncoder(16), folder / "v", shard=shard, shards=2)


def _read_vectors(folder: Path) -> Any:
    from r1s_jax.retrieval.vectors import VectorShards

    return VectorShards(folder / "v")[:]


def _flat(folder: Path) -> None:
    import struct

    import numpy as np

    rows = np.eye(6, 8, dtype=np.float32)
    head = struct.pack("<4siqqqBiQ", b"IxFI", 8, 6, 1 << 20, 1 << 20, 1, 0, rows.size)
    (folder / "f.index").write_bytes(head + rows.tobytes())
    np.save(folder / "v.npy", rows.astype(np.float16))


def _read_flat(folder: Path) -> Any:
    from r1s_jax.retrieval.flat import FlatVectors

    opened = [FlatVectors(folder / name) for name in ("f.index", "v.npy")]
    for vectors in opened:
        vectors.check(8)
    return [vectors[:] for vectors in opened]


def _model(folder: Path) -> None:
    from tests.makers import save_small_model

    save_small_model(folder / "m")


def _load_config(folder: Path) -> Any:
    from r1s_jax.models.weights import load_config

    return load_config(folder / "m")


def _load_weights(folder: Path) -> Any:
    from r1s_jax.models.weights import load_params

    return load_params(folder / "m")


def _load_tokenizer(folder: Path) -> Any:
    from r1s_jax.models.tokenizer import check_tokenizer, encode, eos_ids, load_tokenizer
    from r1s_jax.models.weights import load_config

    tokenizer = load_tokenizer(folder / "m")
    check_tokenizer(tokenizer, load_config(folder / "m"))
    return encode(tokenizer, "What is the trade?"), eos_ids(tokenizer, folder / "m")


def _tokenizers(folder: Path) -> None:
    """Of SentencePiece's kinds, and one that normalises before it looks for control tokens."""
    from tokenizers import normalizers

    from tests.models.test_tokenizer import SPACED, normalising, sentencepiece

    steps = normalizers.NFKC(), normalizers.Lowercase()
    made = [sentencepiece(**parts) for parts in SPACED.values()]
    for i, tokenizer in enumerate([*made, normalising(*steps, special=True)]):
        tokenizer.save_pretrained(folder / f"t{i}")


def _read_tokenizers(folder: Path) -> Any:
    from r1s_jax.models import tokenizer as ours

    found = []
    for path in sorted(folder.glob("t*")):
        tokenizer = ours.load_tokenizer(path)
        text = ours.foreign(tokenizer)("a <|IM_END|> ＜ｓ＞ <s>\n b")
        ids = ours.encode(tokenizer, text)
        begun = ours.encode_start(tokenizer, "a b")
        found.append((text, ids, ours.decode(tokenizer, ids), begun, ours.token_strings(tokenizer)))
    return found


def _shards(folder: Path) -> None:
    """Weights in two shards, with an index, of a model that was wrapped when it was saved."""
    from safetensors.numpy import load_file, save_file

    _model(folder)
    whole, weight_map = folder / "m" / "model.safetensors", {}
    tensors = load_file(whole)
    names = sorted(tensors)
    whole.unlink()
    for i in (0, 1):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        part = {f"_orig_mod.{name}": tensors[name] for name in names[i::2]}
        save_file(part, folder / "m" / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "m" / "model.safetensors.index.json").write_text(json.dumps(index))


def _gguf(folder: Path) -> None:
    import jax
    import numpy as np

    from r1s_jax.config import ModelConfig
    from r1s_jax.models.params import init_params
    from tests.models.test_weights import write_gguf

    config = ModelConfig(32, 16, 32, 1, 2, 1, 8)
    write_gguf(folder / "m.gguf", jax.tree.map(np.asarray, init_params(config, 0)), config)


def _load_gguf(folder: Path) -> Any:
    from r1s_jax.models.weights import load_config, load_params

    return load_params(folder / "m.gguf", load_config(folder / "m.gguf"))


def _bert(folder: Path) -> None:
    from tests.retrieval.test_encoder import write_bert

    write_bert(folder)


def _encode(folder: Path) -> Any:
    from r1s_jax.retrieval.encoder import BertEncoder

    return BertEncoder(folder, reference="r").encode(["a b c"], kind="query")


def _dialect(folder: Path) -> None:
    _write_dialect(folder, "tool_call")


def _write_dialect(folder: Path, name: str) -> None:
    from r1s_jax.protocol.dialects import FILE, make_dialect

    (folder / FILE).write_text(json.dumps(make_dialect(name, "on", "Q: {question}").as_dict()))


def _read_dialect(folder: Path) -> Any:
    from r1s_jax.protocol.dialects import read_dialect

    dialect = read_dialect(folder)
    return dialect and (dialect.plain("who"), dialect.reply([["Town   text"]]), dialect.as_dict())


def _calls(folder: Path) -> None:
    call = {"name": "search", "arguments": {"query": "the town of Bakori"}}
    (folder / "call.json").write_text(json.dumps(call))


def _read_calls(folder: Path) -> Any:
    """What a policy writes between its tags is from outside as well: it must get a reply."""
    from r1s_jax.protocol.dialects import make_dialect

    dialect = make_dialect("tool_call")
    text = (folder / "call.json").read_bytes().decode("utf-8", "replace")
    (call,) = dialect.calls(f"<tool_call>{text}</tool_call><|im_end|>")
    assert len(dialect.reply([call.problem])) < 300
    return call


def _solutions(folder: Path) -> None:
    row = {"question": "q", "answer": "Rome", "solution": "x </think> <answer> Rome </answer>"}
    (folder / "s.jsonl").write_text(_lines(row, row))


def _rewards(folder: Path) -> Any:
    from r1s_jax.eval.rewards import reward_file

    return list(reward_file(folder / "s.jsonl", "stage2"))


def _reply(contract: str, body: Any) -> Reader:
    def make(folder: Path) -> None:
        (folder / "reply.json").write_text(json.dumps(body))

    def call(folder: Path) -> Any:
        from r1s_jax.retrieval.http import HttpRetriever

        # The address is what a message can name of a server.
        retriever = HttpRetriever(f"http://reply.json/{contract}")
        retriever._client.post = lambda *_: (folder / "reply.json").read_bytes()
        return retriever.search(["a"], 2)

    return Reader(make, call)


# Heads of replies that are well, busy, elsewhere, and half gone.
_HEADS = {
    "ok": "HTTP/1.1 200 OK\r\nContent-Type: application/json",
    "busy": "HTTP/1.1 503 Busy\r\nRetry-After: 7200",
    "elsewhere": "HTTP/1.1 308 Moved\r\nLocation: ./queries/",
}


def _replies(folder: Path) -> None:
    body = json.dumps({"answers": [["1\tTown   text", " "]]})
    for name, head in _HEADS.items():
        head = f"{head}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        (folder / f"{name}.http").write_bytes(f"{head}{body}".encode())


def _read_replies(folder: Path) -> Any:
    """What a retriever makes of each reply, sent over a socket as it stands."""
    from r1s_jax.retrieval.http import HttpRetriever, RemoteError
    from tests.http_server import breaking

    found = []
    for name in _HEADS:
        data = (folder / f"{name}.http").read_bytes()
        listener, url = breaking(data, data)
        with listener:
            retriever = HttpRetriever(f"{url}/{name}.http/queries", timeout_s=2, retries=0)
            try:
                found.append(repr(retriever.search(["a"], 2)))
            except RemoteError as error:
                assert f"{name}.http" in str(error) and len(str(error)) <= MOST_CHARACTERS
                found.append(type(error).__name__)
            with contextlib.suppress(OSError):  # so that the server's thread ends
                socket.create_connection(listener.getsockname(), timeout=1).close()
    return found


def _aliases(folder: Path) -> None:
    row = {"question": "Where?", "answer": "Rome", "answer_id": "Q1"}
    (folder / "dev.jsonl").write_text(_lines(row, row))
    names = {"Q_id": "Q1", "aliases": ["Roma"], "demonyms": ["Roman"]}
    (folder / "id_aliases.json").write_text(_lines(names, names | {"Q_id": "Q2"}))


def _overrides(folder: Path) -> None:
    texts = ["seed=3", "stage2.steps=4", "rollout.temperature=0.5", "algorithm.clip=0.2"]
    (folder / "overrides.json").write_text(json.dumps(texts))


def _override(folder: Path) -> Any:
    from r1s_jax.border.json import parse
    from r1s_jax.recipes import load_recipe

    texts = parse((folder / "overrides.json").read_bytes(), "overrides.json")
    if not isinstance(texts, list):
        return None
    changed = [text for text in texts if isinstance(text, str)]
    try:
        return load_recipe("tiny_world", changed)
    except ValueError as error:
        if hasattr(error, "add_note") and type(error).__name__ == "ConfigError":
            raise type(error)(f"overrides.json: {error}"[:MOST_CHARACTERS]) from error
        raise


def _fields(node: Any, path: str = "") -> dict[str, Any]:
    """Every field of a configuration that holds no section, by its path."""
    import dataclasses

    found = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        inner = dataclasses.is_dataclass(value)
        found |= _fields(value, f"{path}{field.name}.") if inner else {path + field.name: value}
    return found


def _settings(folder: Path) -> None:
    from r1s_jax.configs import tiny_world

    (folder / "settings.json").write_text(json.dumps(_fields(tiny_world.config())))


def _set(folder: Path) -> Any:
    """Each field as a text of the command line."""
    from r1s_jax.border.errors import ConfigError
    from r1s_jax.border.json import parse_object
    from r1s_jax.recipes import load_recipe

    found = parse_object((folder / "settings.json").read_bytes(), "settings.json")
    known = {p: v for p, v in found.items() if v is not None and p not in ("policy.model",)}
    try:
        return load_recipe("tiny_world", [f"{path}={value}" for path, value in known.items()])
    except ConfigError as error:
        raise ConfigError(f"settings.json: {error}"[:MOST_CHARACTERS]) from error


_RECIPE = """
import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

from r1s_jax.configs import tiny_world

VALUES = json.loads(Path(__file__).with_name("values.json").read_text())


def config():
    made = tiny_world.config()
    for path, value in VALUES.items():
        section, _, name = path.rpartition(".")
        if section.count("."):
            continue
        if not section:
            made = replace(made, **{name: value})
        else:
            made = replace(made, **{section: replace(getattr(made, section), **{name: value})})
    return made
"""


def _recipe(folder: Path) -> None:
    from r1s_jax.configs import tiny_world

    known = {p: v for p, v in _fields(tiny_world.config()).items() if p.count(".") < 2}
    (folder / "values.json").write_text(json.dumps(known))
    (folder / "mine.py").write_text(_RECIPE)


def _read_recipe(folder: Path) -> Any:
    from r1s_jax.recipes import load_recipe

    sys.dont_write_bytecode = True  # what Python keeps of a recipe is not read here
    return load_recipe(str(folder / "mine.py"))


def _chat(folder: Path) -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Who wrote Dune?"}]}],
        "temperature": 0.5,
        "stop": ["x"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": 3,
    }
    (folder / "chat.json").write_text(json.dumps(body))


def _read_chat(folder: Path) -> Any:
    from r1s_jax.serving.chat import Refused, read_request

    try:
        asked = read_request((folder / "chat.json").read_bytes())
        return asked.conversation(), asked.stops, asked.limit, asked.temperature, asked.seed
    except Refused as refused:
        assert refused.status == 400 and json.dumps(refused.json())
        raise Refused(400, f"chat.json: {refused}") from None


def _asked(folder: Path) -> None:
    (folder / "body.json").write_text(json.dumps({"queries": ["Who?", "river"], "k": 2}))
    headers = {"host": "localhost:8000", "origin": "http://localhost:8000"}
    headers |= {"content-type": "application/json; charset=utf-8"}
    (folder / "headers.json").write_text(json.dumps(headers))


def _answer_asked(folder: Path) -> Any:
    """A request to the server of an index, without its socket."""
    import asyncio

    from r1s_jax.border.errors import BadInput
    from r1s_jax.border.json import parse_object

    given = parse_object((folder / "headers.json").read_bytes(), "headers.json")
    headers = [
        (name.encode("latin-1", "replace"), value.encode("latin-1", "replace"))
        for name, value in given.items()
        if isinstance(value, str)
    ]
    scope = {"type": "http", "method": "POST", "path": "/queries", "headers": headers}
    scope |= {"query_string": b"", "scheme": "http", "server": ("localhost", 8000)}
    body, sent = (folder / "body.json").read_bytes(), []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(_index_server()(scope, receive, send))
    reply = json.loads(b"".join(message.get("body", b"") for message in sent))
    status = sent[0]["status"]
    assert status == 200 or (400 <= status < 500 and set(reply) == {"error"}), (status, reply)
    if status != 200:
        raise BadInput(f"body.json: {reply['error']}")
    return reply


@cache
def _index_server() -> Any:
    from r1s_jax.retrieval.server import Limits, make_app
    from tests.fakes import WebRetriever

    return make_app(WebRetriever(), Limits())


def _sums(folder: Path) -> None:
    texts = ["stage2 + 0.2*retrieved_gold - 0.1*repeated_queries", "f1 - 2*searches_over(3)"]
    (folder / "sums.json").write_text(json.dumps(texts))


def _read_sums(folder: Path) -> Any:
    from r1s_jax.border.json import parse
    from r1s_jax.rewards.composed import parse as read_sum
    from r1s_jax.rewards.registry import RewardError

    texts = parse((folder / "sums.json").read_bytes(), "sums.json")
    try:
        return [read_sum(text, RewardError) for text in texts if isinstance(text, str)]
    except RewardError as error:
        raise RewardError(f"sums.json: {error}"[:MOST_CHARACTERS]) from error
    except TypeError:  # no list: not what is read here
        return None


def _deep(pattern: str) -> tuple[str, ...]:
    """A pattern of files in a folder, and in folders of it."""
    return tuple(pattern + "/*" * depth for depth in range(4))


READERS = {
    "questions": Reader(_questions, _read_questions("q.jsonl")),
    "questions published": Reader(
        lambda f: (f / "q.jsonl").write_text(_lines(*_published_questions())),
        _read_questions("q.jsonl"),
    ),
    "questions array": Reader(
        lambda f: (f / "q.json").write_text(json.dumps(_published_questions(), indent=1)),
        _read_questions("q.json"),
    ),
    "questions tables": Reader(_tables, _read_tables),
    "questions squad": Reader(_squad, _read_squad),
    "results": Reader(_results, _score),
    "verdicts": Reader(_verdicts, _read_verdicts),
    "rewards": Reader(_solutions, _rewards),
    "run": Reader(_rows_of_run, _report),
    "page": Reader(_rows_of_run, _page, weight=2),
    "checkpoint": Reader(_run, _load_run, sealed=_deep("checkpoints/*/*"), weight=2),
    "resume": Reader(_resumable, _resume, sealed=_deep("checkpoints/*/*"), weight=4),
    "journals": Reader(_journals, _go_on, weight=6),
    "lab": Reader(_lab, _go_on_with_lab, weight=6),
    "passages.tsv": Reader(_tsv, _passages("p.tsv")),
    "passages.jsonl": Reader(_jsonl, _passages("p.jsonl")),
    "index": Reader(_index("exact"), _search, sealed=("*/vectors.npy", "*/passages.tsv")),
    "index bm25": Reader(_index("bm25"), _search, sealed=("*/bm25/*",)),
    "index scann": Reader(_index("scann"), _search, sealed=("*/scann/*",), weight=2),
    "vectors": Reader(_vectors, _read_vectors, sealed=("*.npy",)),
    "stored vectors": Reader(_flat, _read_flat),
    "config": Reader(_model, _load_config),
    "weights": Reader(_model, _load_weights),
    "weights in shards": Reader(_shards, _load_weights),
    "tokenizer": Reader(_model, _load_tokenizer, weight=4),
    "tokenizers": Reader(_tokenizers, _read_tokenizers, weight=4),
    "gguf": Reader(_gguf, _load_gguf, weight=4),
    "encoder": Reader(_bert, _encode),
    "reply queries": _reply("queries", {"answers": [["1\tTown   text", "2\tB   c"]]}),
    "reply retrieve": _reply(
        "retrieve", {"result": [[{"document": {"contents": '"T"\nx', "id": 1}, "score": 0.5}]]}
    ),
    "replies": Reader(_replies, _read_replies, weight=2),
    "aliases": Reader(_aliases, _read_questions("dev.jsonl")),
    "dialect": Reader(_dialect, _read_dialect),
    "calls": Reader(_calls, _read_calls),
    "answers begun": Reader(_answers, _answer_on),
    "settings": Reader(_settings, _set, weight=20),
    "recipe": Reader(_recipe, _read_recipe, weight=20),
    "overrides": Reader(_overrides, _override, weight=4),
    "chat request": Reader(_chat, _read_chat),
    "index request": Reader(_asked, _answer_asked),
    "reward sums": Reader(_sums, _read_sums, weight=4),
}


def _import(module: str, name: str) -> Any:
    import importlib

    return getattr(importlib.import_module(f"r1s_jax.{module}"), name)


# Damage.

STRANGE = [None, True, -1, 0, 3.5, 10**30, float("nan"), float("inf"), "", "x" * 5000, "\ud83d"]
STRANGE += ["1e400", "\u0663", "9" * 5000, 10**400, 1e308, -1e308, 1e-320, "1_0", "True", 1, 2]
STRANGE += ["../../etc/passwd", [], {}, [[]], {"a": {"b": []}}, "<|im_end|>", "\x1b]52;c;x\x07"]


def damage(folder: Path, rng: random.Random) -> str:
    """Changes one file of an example; returns its name from the folder on."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = rng.choice(files)
    data = path.read_bytes()
    kinds = [_bytes_damage]
    if path.suffix in (".json", ".jsonl") or (data[:1] in b"{[" and data):
        kinds += [_value_damage] * 3
    if len(files) > 1:
        kinds.append(lambda d, r: r.choice(files).read_bytes())
    path.write_bytes(rng.choice(kinds)(data, rng))
    return path.relative_to(folder).as_posix()


def _bytes_damage(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((1, 4, 64, 1024)))
    choices = [
        lambda: data[:at],
        lambda: data[:at] + data[end:],
        lambda: data[:at] + bytes(end - at) + data[end:],
        lambda: data[:at] + rng.randbytes(max(1, end - at)) + data[end:],
        lambda: data[:end] + data[at:],
        lambda: b"",
        lambda: bytes(b ^ 1 if i == at else b for i, b in enumerate(data)),
        lambda: b"[" * 100_000,
        lambda: b"\xff\xfe" + data,
        lambda: data.replace(b"\n", b"\r"),
    ]
    return rng.choice(choices)()


def _value_damage(data: bytes, rng: random.Random) -> bytes:
    """A JSON text, or one of its lines, with one value or key changed."""
    lines = data.split(b"\n")
    whole = data.strip().startswith((b"{\n", b"[\n")) or len(lines) < 2
    i = 0 if whole else rng.randrange(len(lines))
    try:
        value = json.loads(data if whole else lines[i])
    except ValueError:
        return _bytes_damage(data, rng)
    changed = json.dumps(_changed(value, rng)).encode()
    if whole:
        return changed
    return b"\n".join([*lines[:i], changed, *lines[i + 1 :]])


def _changed(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        if rng.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]
    if rng.random() < 0.05:
        deep: Any = value
        for _ in range(500):
            deep = [deep]
        return deep
    return rng.choice(STRANGE)


# Judging.


def digest(value: Any) -> str:
    """Of a result: equal for what is equal."""
    import jax
    import numpy as np

    def flat(leaf: Any) -> bytes:
        return np.asarray(leaf).tobytes() if hasattr(leaf, "dtype") else repr(leaf).encode()

    leaves = jax.tree.leaves(value, is_leaf=lambda x: x is None)
    return hashlib.sha256(b"|".join(map(flat, leaves))).hexdigest()


def judge(reader: Reader, folder: Path, damaged: str, good: str) -> tuple[str, str]:
    """(outcome, what was said) of one damaged example."""
    from r1s_jax.border.errors import UserError

    try:
        found = digest(reader.call(folder))
    except (UserError, OSError) as error:
        said = str(error)
        if len(said) > MOST_CHARACTERS:
            return "long", said[:300]
        names = {path.name for path in folder.rglob("*")} | {str(folder)}
        return ("clear" if any(name in said for name in names) else "unnamed"), said
    except Exception:
        return "traceback", traceback.format_exc()[-1500:]
    if found == good:
        return "same", ""
    sealed = any(Path(damaged).match(pattern) for pattern in reader.sealed)
    return ("used" if sealed else "other"), ""


def _work(tasks: Any, answers: Any) -> None:
    """A process that judges inputs until it is told to stop."""
    import logging
    import os
    import warnings

    os.environ["JAX_PLATFORMS"] = "cpu"
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    goods: dict[str, tuple[Path, str]] = {}
    with tempfile.TemporaryDirectory() as base:
        while (task := tasks.get()) is not None:
            name, seed = task
            reader = READERS[name]
            if name not in goods:
                example = Path(base, name.replace(" ", "_"), "good")
                example.mkdir(parents=True)
                reader.make(example)
                goods[name] = example, digest(reader.call(example))
            example, good = goods[name]
            folder = example.parent / "bad"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(example, folder)
            damaged = damage(folder, random.Random(f"{name} {seed}"))
            answers.put((name, seed, damaged, *judge(reader, folder, damaged, good)))


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.tasks, self.answers = context.Queue(), context.Queue()
        self.process = context.Process(target=_work, args=(self.tasks, self.answers), daemon=True)
        self.process.start()
        self.fresh: set[str] = set()

    def ask(self, name: str, seed: int) -> tuple[str, int, str, str, str]:
        self.tasks.put((name, seed))
        patience = PATIENCE_S if name in self.fresh else 4 * PATIENCE_S
        self.fresh.add(name)
        waited = 0.0
        while waited < patience:
            try:
                return self.answers.get(timeout=0.5)
            except Exception:
                waited += 0.5
                if not self.process.is_alive():
                    return name, seed, "", "crash", f"exit code {self.process.exitcode}"
        self.process.kill()
        return name, seed, "", "hang", f"{patience:g} s"


def run(readers: list[str], seed: int, inputs: int, tell: bool = False) -> dict[str, Counter]:
    """Counts of outcomes by reader, over `inputs` inputs in all; bad ones are printed."""
    total = sum(READERS[name].weight for name in readers)
    counts: dict[str, Counter] = {name: Counter() for name in readers}
    worker, shown = _Worker(), Counter()
    for name in readers:
        for i in range(max(1, inputs * READERS[name].weight // total)):
            _, _, damaged, outcome, said = worker.ask(name, seed * 1_000_003 + i)
            counts[name][outcome] += 1
            if outcome in BAD and shown[name, outcome] < 3:
                shown[name, outcome] += 1
                print(
                    f"{name}: {outcome}: {damaged} (seed {seed}, input {i})\n{said}\n", flush=True
                )
            if outcome in ("hang", "crash"):
                worker = _Worker()
        if tell:
            print(f"{name:16}", dict(counts[name]), file=sys.stderr, flush=True)
    worker.tasks.put(None)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", choices=READERS, help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=2000)
    given = parser.parse_args()
    readers = [given.reader] if given.reader else list(READERS)
    counts = run(readers, given.seed, given.inputs, tell=True)
    print(f"{'reader':16}" + "".join(f"{name:>10}" for name in OUTCOMES))
    for name, found in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"{name:16}" + "".join(f"{found[outcome]:>10}" for outcome in OUTCOMES))
    sys.exit(any(found[outcome] for found in counts.values() for outcome in BAD))


if __name__ == "__main__":
    main()
