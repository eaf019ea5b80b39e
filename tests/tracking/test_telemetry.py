import json

import pytest

from r1s_jax.data.rows import DataError, rows_so_far
from r1s_jax.tracking.telemetry import Telemetry


def test_rows_come_back_whatever_a_policy_wrote(tmp_path):
    """Some characters end a line for Python, and none for JSON lines."""
    texts = ["\u2028 \u2029 \x85 \x0b \x0c \x1c \r\n \x00", "🙂"]
    telemetry = Telemetry(tmp_path)
    for step, text in enumerate(texts, start=1):
        telemetry.trace({"step": step, "text": text})
    with (tmp_path / "traces.jsonl").open("a") as file:
        file.write('{"step": 3')  # cut short by a crash
    assert [row["text"] for row in rows_so_far(tmp_path / "traces.jsonl")] == texts
    telemetry.rewind(cold_start=0, learning=1)
    assert [row["step"] for row in rows_so_far(tmp_path / "traces.jsonl")] == [1]
    telemetry.close()


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n{\n")
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2: "):
        rows_so_far(path)
