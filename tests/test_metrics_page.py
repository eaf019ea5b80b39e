"""docs/metrics.md names every column of a run and every health signal, and nothing else."""

import re
from pathlib import Path

from r1s_jax.tracking.health import SIGNALS
from tests.makers import METRICS_PAGE, documented_columns, undocumented

SOURCE = Path(__file__).parents[1] / "r1s_jax"


def test_every_signal_is_documented():
    table = METRICS_PAGE.read_text("utf-8").partition("## Health signals")[2]
    named = re.findall(r"^\| `(\w+)` \|", table.partition("## The summary")[0], re.M)
    assert named == sorted(named, key=[signal.name for signal in SIGNALS].index)
    assert set(named) == {signal.name for signal in SIGNALS}


def test_every_documented_column_is_in_the_source():
    """A column that is renamed or removed must also disappear from the page."""
    source = "\n".join(path.read_text("utf-8") for path in SOURCE.rglob("*.py"))
    # The source builds these names from a prefix and a name.
    stems = {
        re.sub(r"^(finish|token_age|search_worth)_|_per_s$", "", c).lower()
        for c in documented_columns()
    }
    words = set(re.findall(r"\w+", source.lower()))
    assert not {stem for stem in stems if stem not in words and not stem.isdigit()}


def test_a_column_without_a_row_is_detected():
    assert undocumented({"reward": 1.0, "finish_length": 0.0, "token_age_7": 0.1}) == set()
    assert undocumented({"rewards": 1.0}) == {"rewards"}
