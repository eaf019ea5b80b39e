"""Headers identify model and questions by content, not by name."""

import json
import shutil
from pathlib import Path

import pytest

from r1s_jax.data.questions import Question
from r1s_jax.data.results import header_path, read_header
from r1s_jax.eval.header import begun, describe, load_described
from r1s_jax.io.journal import DataError
from r1s_jax.models.export import export
from r1s_jax.models.identity import policy_digest
from r1s_jax.models.pretrained import load_pretrained
from r1s_jax.presets import EVALUATION
from r1s_jax.system.files import write_json
from tests.makers import save_other_weights, save_small_model, save_small_run, with_rollout

QUESTIONS = [Question(0, "Who?", ("A",)), Question(1, "Where?", ("B", "C"))]
MODEL = {"sha256": "0" * 64}
HEAD = {"format": 2}


def header(rows=QUESTIONS, model="m", questions="q.jsonl", **fields) -> dict:
    settings, source = with_rollout(EVALUATION, **fields), {"corpus": "c", "folder": "i"}
    return describe(model, questions, rows, settings, source, mode="direct")


def write(out: Path, head: dict | str) -> Path:
    out.write_text('{"id": 0}\n')
    header_path(out).write_text(head if isinstance(head, str) else json.dumps(head))
    return out


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """A machine that computes in float32."""
    monkeypatch.setattr("r1s_jax.system.dtype.bfloat16_speedup", lambda: 1.0)


def test_names_may_change_and_contents_may_not(tmp_path):
    out = write(tmp_path / "o.jsonl", header() | {"model": MODEL})
    moved = header(model="elsewhere", questions="copy.jsonl")
    moved["source"]["folder"] = "j"
    rows, before = begun(out, moved)
    assert rows == [{"id": 0}] and before["model"] == MODEL
    for change, message in (
        ({"run": header(top_p=0.5)["run"]}, r"run\.rollout\.top_p was 0\.95, now 0\.5"),
        ({"source": {"corpus": "d"}}, "source.corpus was c, now d"),
        ({"dtype": "bfloat16"}, "dtype was float32, now bfloat16"),
        ({"questions": header(QUESTIONS[:1])["questions"]}, r"other questions \(.*count was 2, no"),
        ({"questions": header([*QUESTIONS[:1], QUESTIONS[0]])["questions"]}, "other questions"),
    ):
        with pytest.raises(DataError, match=rf"o\.jsonl was written by another run: .*{message}"):
            begun(out, header() | change)
    right = Question(1, "Where?", ("B",))
    with pytest.raises(DataError, match="other questions"):
        begun(out, header([QUESTIONS[0], right]))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({}, r"made by another version \(format None"),
        (HEAD, "does not say which model and questions"),
        (HEAD | {"run": {"model": "m"}, "source": {}}, "does not say which model and questions"),
        (HEAD | {"run": []}, "run: Expected `object`, got `array`"),
        (HEAD | {"model": {}}, "missing required field `sha256`"),
        (HEAD | {"searches": {"found": "x"}}, "Expected `int`, got `str`"),
        ({"format": 3}, r"made by another version \(format 3; this one reads 2\)"),
        ({"format": "new"}, r"format 'new'"),
        ("[1]", "expected a JSON object"),
        ('{"run": ', "no JSON"),
    ],
)
def test_a_damaged_header_is_named_with_its_fault(tmp_path, head, message):
    out = write(tmp_path / "o.jsonl", head)
    with pytest.raises(DataError, match=rf"o\.jsonl.*{message}"):
        begun(out, header())
    assert out.read_text() == '{"id": 0}\n'


def test_before_the_first_row_another_run_may_start(tmp_path):
    out = write(tmp_path / "o.jsonl", header() | {"model": MODEL})
    out.write_text('{"id": 0, "quest')  # the state after a kill
    assert begun(out, header(top_p=0.5)) == ([], None) and not out.read_text()
    out.write_text("somebody's notes")  # a foreign file is not changed
    header_path(out).unlink()
    with pytest.raises(DataError, match="does not say"):
        begun(out, header())
    assert out.read_text() == "somebody's notes"


def test_a_digest_depends_on_all_that_changes_answers(tmp_path):
    model = save_small_model(tmp_path / "m")
    policy = load_pretrained(str(model))
    digest = policy_digest(policy)
    assert digest == policy_digest(load_pretrained(str(model)))
    turned = policy._replace(model=policy.model.__class__(**vars(policy.model) | {"rope_theta": 9}))
    save_other_weights(model)
    others = [policy._replace(eos_ids=(3,)), turned, load_pretrained(str(model))]
    assert len({digest, *map(policy_digest, others)}) == 4


def test_a_resumed_evaluation_uses_its_first_checkpoint(tmp_path):
    run, out = save_small_run(tmp_path / "run"), tmp_path / "o.jsonl"
    first = header()
    policy = load_described(out, str(run), first, None)
    number = first["model"]["checkpoint"]
    export(str(run), tmp_path / "exported", "float32")
    assert policy_digest(load_pretrained(str(tmp_path / "exported"))) == first["model"]["sha256"]
    saved = run / "checkpoints" / str(number)
    shutil.copytree(saved, saved.with_name(str(number + 1)))
    again = header()
    load_described(out, str(run), again, first)
    assert again == first and policy_digest(policy) == first["model"]["sha256"]
    fresh = header()
    load_described(out, str(run), fresh, None)
    assert fresh["model"]["checkpoint"] == number + 1
    other = first | {"model": {"sha256": "1" * 64, "checkpoint": number}}
    with pytest.raises(DataError, match=r"other model \(model.sha256 was 1{12}, now"):
        load_described(out, str(run), header(), other)
    shutil.rmtree(saved)
    with pytest.raises(DataError, match=rf"begun with checkpoint {number} of .*any more"):
        load_described(out, str(run), header(), first)


def test_headers_are_read_unchanged(tmp_path):
    out = tmp_path / "o.jsonl"
    write_json(header_path(out), header() | {"model": MODEL, "more": 1})
    assert read_header(out) == header() | {"model": MODEL, "more": 1}
