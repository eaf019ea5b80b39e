"""The cold start from trajectories: which ones are imitated, and which tokens carry loss."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from r1s_jax.data.demonstrations import Demonstration, demonstrations_at, read_demonstrations
from r1s_jax.data.tiny_world import TinyWorld, build_tokenizer
from r1s_jax.io.journal import DataError
from r1s_jax.learning.cold_start import demonstration_batch
from r1s_jax.models.tokenizer import encode
from r1s_jax.protocol.dialects import make_dialect
from r1s_jax.protocol.prompts import bound
from r1s_jax.protocol.r1_searcher import document_block
from r1s_jax.rewards.answer_scores import normalize_answer

GOOD = (
    "I must look. <|begin_of_query|> Dune <|end_of_query|>\n\n<|begin_of_documents|>\n(1)Dune   A "
    "novel by Herbert.\n<|end_of_documents|>\n\nFound.</think>\n<answer> Herbert </answer>"
)


def answers(path: Path, *texts: str) -> Path:
    rows = [
        {
            "question": f"Who wrote Dune {i}?",
            "answer": "Herbert",
            "pred_ans": "Herbert",
            "stop_reason_final": "finished",
            "gen_text_store": text,
        }
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_only_right_and_well_formed_trajectories_are_imitated(tmp_path, capsys):
    wrong = GOOD.replace("<answer> Herbert", "<answer> Asimov")
    path = answers(tmp_path / "a.jsonl", GOOD, "no tags at all", wrong, GOOD)
    unwanted = {normalize_answer("who wrote dune 3")}
    demonstrations = read_demonstrations([path], unwanted)
    assert [d.question for d in demonstrations] == ["Who wrote Dune 0?"]
    said = " ".join(capsys.readouterr().err.split())
    assert "1 kept; left out: 2 for their format or answer, 1 for a question" in said
    with pytest.raises(DataError, match="worth imitating"):
        read_demonstrations([answers(tmp_path / "b.jsonl", wrong)])


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_a_chat_is_no_demonstration(tmp_path, key):
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({key: chat}) + "\n")
    with pytest.raises(DataError, match=rf"line 1: .*a chat under `{key}` .*give a run"):
        read_demonstrations([path])


@pytest.mark.parametrize("reason", ["shot_down", "many_retrieve", "length"])
def test_truncated_trajectories_are_not_imitated(tmp_path, capsys, reason):
    path = answers(tmp_path / "a.jsonl", GOOD, GOOD)
    path.write_text(path.read_text("utf-8").replace("finished", reason, 1), "utf-8")
    assert len(read_demonstrations([path])) == 1
    assert "1 that did not finish" in " ".join(capsys.readouterr().err.split())


def tokens_and_weights(demonstration, dialect, tokenizer):
    batch, _ = demonstration_batch(
        [demonstration],
        lambda text: encode(tokenizer, text),
        lambda question: encode(tokenizer, question),
        lambda lines: encode(tokenizer, dialect.reply([lines])),
        capacity=400,
        micro_batch_rows=1,
        dialect=dialect,
    )
    return batch.tokens.ravel().tolist(), (batch.weights.ravel() > 0).tolist()


@pytest.mark.parametrize("thinking", ["template", "off"])
@pytest.mark.parametrize("with_end", [False, True])
def test_an_end_of_turn_token_is_imitated(tmp_path, thinking, with_end):
    """The tokens equal those of a generated demonstration; files may omit the last token."""
    tokenizer = build_tokenizer("tool_call")
    dialect = bound(make_dialect("tool_call", thinking), tokenizer)
    world = TinyWorld((1,), 30)
    (question,) = world.questions(1, [2])
    full = world.demonstration(question, "search", dialect)
    assert full[-1][0].endswith(dialect.turn_end)
    spans = [
        *full[:-1],
        (full[-1][0].removesuffix("" if with_end else dialect.turn_end), True),
    ]
    row = {"step": 0, "question": question.question, "answers": question.answers, "reward": 1.0}
    path = tmp_path / "traces.jsonl"
    row |= {"token_advantages": [(text, 0.0) for text, by_policy in spans if by_policy]}
    path.write_text(json.dumps(row | {"finish": "finished", "spans": spans, "searches": []}) + "\n")
    (demonstration,) = read_demonstrations([path], dialect=dialect)
    generated = Demonstration(question.question, tuple((t, float(own)) for t, own in full))
    tokens, trained = tokens_and_weights(demonstration, dialect, tokenizer)
    assert (tokens, trained) == tokens_and_weights(generated, dialect, tokenizer)
    last = [token for token, own in zip(tokens, trained, strict=True) if own][-1]
    assert last == tokenizer.eos_token_id


def document_tokens(lines):
    """One token per byte, without a cut."""
    return list(document_block(lines).encode())


def test_only_tokens_of_the_policy_carry_loss(tmp_path):
    """Documents and prompt carry no loss; all other tokens carry equal shares."""
    demonstrations = read_demonstrations([answers(tmp_path / "a.jsonl", GOOD)])
    batch, micro = demonstration_batch(
        demonstrations,
        lambda t: list(t.encode()),
        lambda q: list(f"Q: {q} <think>".encode()),
        document_tokens,
        capacity=400,
        micro_batch_rows=1,
    )
    assert micro == 1
    trained = bytes(batch.tokens[batch.weights > 0].tolist()).decode()
    untrained = bytes(batch.tokens[(batch.weights == 0) & (batch.segment_ids > 0)].tolist())
    begin, end = GOOD.index("\n\n<|begin_of_doc"), GOOD.index("Found")
    assert trained == GOOD[:begin] + GOOD[end:]
    assert untrained.decode() == "Q: Who wrote Dune 0? <think>" + GOOD[begin:end]
    assert len(np.unique(batch.weights[batch.weights > 0])) == 1
    np.testing.assert_allclose(batch.weights.sum(), 1, rtol=1e-5)


def test_documents_are_shown_as_in_a_rollout(tmp_path):
    """The same number, cut alike: `document_tokens` receives the lines without their numbers."""
    lines = ["1984 is a novel.", "A film   from 1984.", "(3) is no number here"]
    block = document_block([f"7\t{line}" for line in lines])
    seen = []

    def two(lines_of_block):
        seen.extend(lines_of_block)
        return list(document_block(lines_of_block[:2]).encode())

    text = GOOD[: GOOD.index("\n\n<")] + block + GOOD[GOOD.index("Found") :]
    (demonstration,) = read_demonstrations([answers(tmp_path / "a.jsonl", text)])
    batch, _ = demonstration_batch(
        [demonstration],
        lambda t: list(t.encode()),
        lambda q: list(q.encode()),
        two,
        capacity=400,
        micro_batch_rows=1,
    )
    assert seen == lines
    assert document_block(seen) == block
    shown = bytes(batch.tokens[batch.segment_ids > 0].tolist()).decode()
    assert "(1)1984 is a novel.\n(2)A film   from 1984.\n<|end" in shown


def test_a_long_demonstration_is_cut_at_its_end(tmp_path):
    demonstrations = read_demonstrations([answers(tmp_path / "a.jsonl", GOOD)])
    batch, _ = demonstration_batch(
        demonstrations,
        lambda t: list(t.encode()),
        lambda q: [],
        document_tokens,
        capacity=40,
        micro_batch_rows=1,
    )
    assert bytes(batch.tokens[batch.segment_ids > 0].tolist()).decode() == GOOD[:40]


def test_every_epoch_shows_each_demonstration_once():
    everything = list(range(7))
    drawn = [d for step in range(7) for d in demonstrations_at(everything, step, 3, seed=0)]
    assert [sorted(drawn[i : i + 7]) for i in (0, 7, 14)] == [everything] * 3
    assert drawn[:7] != drawn[7:14]
    again = [d for step in (2, 5) for d in demonstrations_at(everything, step, 3, seed=0)]
    assert again == drawn[6:9] + drawn[15:18]


def test_the_published_traces_can_be_imitated():
    if "R1S_DATA" not in os.environ:
        pytest.skip("R1S_DATA does not name the folder of published data")
    path = Path(os.environ["R1S_DATA"], "traces", "hotpotqa_qwen.jsonl.gz")
    demonstrations = read_demonstrations([path])
    assert 300 < len(demonstrations) < 500
    for demonstration in demonstrations:
        trained = "".join(text for text, weight in demonstration.spans if weight)
        assert "<|begin_of_documents|>" not in trained and trained.count("<answer>") == 1
