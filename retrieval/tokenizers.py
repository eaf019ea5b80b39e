"""Texts to token ids for BERT-family encoders: by Rust's `tokenizers`, or by tensorflow-text.

Both give the same ids. tensorflow-text is the faster one in bulk (13,400 passages a second against
5,000 on 2 busy cores) and takes ten seconds to import, so it serves where it is installed and many
passages are encoded on an accelerator; a CPU encodes a few dozen passages a second by either.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from r1s_jax.io.errors import reading
from r1s_jax.io.json import decode, read_object

# Texts -> token ids, with [CLS] and [SEP], cut to a length where there is one.
Tokenize = Callable[[Sequence[str]], list[list[int]]]

# What BERT drops: control and format characters, private ones and what stands for a bad byte.
_DROPPED = re.compile("[\x00\ufffd]")
_PLAIN = re.compile(r"[ -~]*")


def rust_tokenize(directory: Path, max_length: int | None) -> Tokenize:
    """By the library that wrote `tokenizer.json`; without a `max_length`, whole."""
    path = directory / "tokenizer.json"
    with reading(path):
        tokenizer = Tokenizer.from_str(decode(path.read_bytes(), path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if max_length:
            tokenizer.enable_truncation(max_length)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        with reading(path):  # a vocabulary without its unknown token is found out by a word
            return [e.ids for e in tokenizer.encode_batch_fast(list(texts))]

    return encode


def tensorflow_tokenize(directory: Path, max_length: int) -> Tokenize | None:
    """By tensorflow-text; None where it is not installed, or for anything but lower-case BERT."""
    described = read_object(directory / "tokenizer.json")
    if not _is_uncased_bert(described):
        return None
    try:
        import tensorflow as tf
        import tensorflow_text as tf_text
    except ImportError:
        return None
    ids = described["model"]["vocab"]
    vocabulary = sorted(ids, key=ids.__getitem__)
    with tf.device("CPU"):
        fast = tf_text.FastBertTokenizer(vocabulary, token_out_type=tf.int32)
    begin, end = ids["[CLS]"], ids["[SEP]"]

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        with tf.device("CPU"):
            rows = fast.tokenize([_normalized(text) for text in texts])
        flat, splits = rows.values.numpy().tolist(), rows.row_splits.numpy().tolist()
        return [
            [begin, *flat[first : min(last, first + max_length - 2)], end]
            for first, last in itertools.pairwise(splits)
        ]

    return tokenize


def _is_uncased_bert(described: dict[str, Any]) -> bool:
    normalizer, model = described.get("normalizer") or {}, described["model"]
    return (
        normalizer.get("type") == "BertNormalizer"
        and normalizer.get("lowercase") is True
        and normalizer.get("strip_accents") in (None, True)
        and model.get("type") == "WordPiece"
        and {"[CLS]", "[SEP]", "[UNK]"} <= model["vocab"].keys()
    )


def _normalized(text: str) -> str:
    """What BERT's normaliser makes of a text, all but the spaces around Chinese characters."""
    if _PLAIN.fullmatch(text):
        return text.lower()
    # Letter by letter: `str.lower` looks at a whole word for the Greek sigma, BERT does not.
    text = _DROPPED.sub("", text)
    text = "".join(" " if c in "\t\n\r" else c for c in text if c in "\t\n\r" or not _control(c))
    text = unicodedata.normalize("NFD", text)
    return "".join(c.lower() for c in text if unicodedata.category(c) != "Mn")


def _control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs")
