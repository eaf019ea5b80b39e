import itertools

import numpy as np
import pytest

from benchmarks import attention


@pytest.mark.slow
def test_every_case_is_correct_and_compared():
    lines = []
    result = attention.bench_attention(attention.QUICK, lines.append)
    assert result["copy_gb_per_s"] > 0 and result["callback_us"] > 0
    cases = result["cases"]
    assert len(cases) == len(lines) == 7
    assert {(c.get("mode"), c.get("pass")) for c in cases} == {
        *itertools.product(attention.MODES, ("forward", "forward+backward")),
        (None, None),
    }
    for case in cases:
        peers = {"reference", "jax.nn xla"}
        assert peers <= set(case["ratio"]), case
        for name, measured in case["implementations"].items():
            assert measured["max_error"] < 1e-5, (case, name)
            assert measured["tflops" if case["kind"] == "rows" else "gb_per_s"] > 0
    table = attention.as_markdown(result)
    assert len(table.splitlines()) == 2 + 2 + len(cases)


def test_six_parts_cover_whole_rows():
    packed, shared = (attention.last_queries(mode, 3, 500) for mode in ("packed", "shared"))
    for row, other in zip(packed, shared, strict=True):
        ends = list(dict.fromkeys(row.tolist()))
        assert len(ends) == 6 and ends[-1] == 499 and row[ends].tolist() == ends
        np.testing.assert_array_equal(other, np.where(row == ends[0], 499, row))


def test_an_error_is_recorded_and_does_not_end_the_run():
    def refuse(x):
        raise NotImplementedError("not this shape")

    x = attention.normal("float32", (4,))[0]
    runs = {attention.OURS: lambda x: x + 1, "other": refuse}
    measured = attention._measure(runs, lambda x: x + 1, (x,), attention.QUICK)
    assert measured["other"] == {"error": "NotImplementedError: not this shape"}
    assert measured[attention.OURS]["max_error"] == 0
    assert attention._ratios(measured) == {}
