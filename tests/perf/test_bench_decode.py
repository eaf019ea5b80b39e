"""What drafts save and what int8 costs, on a random model of bytes."""

import pytest

from r1s_jax.perf.bench_drafts import bench_drafts
from r1s_jax.perf.bench_int8 import bench_int8
from tests.makers import save_letters_model


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return str(save_letters_model(tmp_path_factory.mktemp("letters")))


@pytest.mark.slow  # tests/rollout/test_loop.py holds the same of the loop
def test_drafts_say_the_same_in_fewer_passes(letters):
    """A random model soon repeats itself."""
    found = bench_drafts(letters, drafts=3, batch=2, new_tokens=40, repeats=1)
    assert found["same_tokens"] and found["decode_steps"] < 40
    assert 1 < found["tokens_per_step"] <= 4


def test_int8_changes_logits_a_little(letters):
    found = bench_int8(letters, new_tokens=8)
    assert 0 < found["mean_logit_difference"] < found["largest_logit_difference"]
    assert found["largest_logit_difference"] < 0.05 * found["logit_range"]
    assert found["bytes_a_token_share"] == (8 + 4) / (2 * 8)
