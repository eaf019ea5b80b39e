"""Texts to token ids for BERT-family encoders: by Rust's `tokenizers`, or by tensorflow-text.

Both give the same ids. tensorflow-text is faster in bulk (13,400 passages a second against 5,000 on
2 busy cores) but takes ten seconds to import. It is used, if installed, for passages encoded on an
accelerator; a CPU encodes only a few dozen passages a second, with either tokenizer.
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

# Texts -> token ids with [CLS] and [SEP], cut to the maximum length, if any.
Tokenize = Callable[[Sequence[str]], list[list[int]]]

# NUL and the replacement character, which BERT drops beside the characters of `_control`.
_DROPPED = re.compile("[\x00\ufffd]")
_PLAIN = re.compile(r"[ -~]*")


def rust_tokenize(directory: Path, max_length: int | None) -> Tokenize:
    """A tokenizer by Rust's `tokenizers`; cuts texts only where `max_length` is set."""
    path = directory / "tokenizer.json"
    with reading(path):
        tokenizer = Tokenizer.from_str(decode(path.read_bytes(), path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if max_length:
            tokenizer.enable_truncation(max_length)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        with reading(path):  # a vocabulary without its unknown token fails only here
            return [e.ids for e in tokenizer.encode_batch_fast(list(texts))]

    return encode


def tensorflow_tokenize(directory: Path, max_length: int) -> Tokenize | None:
    """A tokenizer by tensorflow-text; None if not installed, or the model is not uncased BERT."""
    settings = read_object(directory / "tokenizer.json")
    if not _is_uncased_bert(settings):
        return None
    try:
        import tensorflow as tf
        import tensorflow_text as tf_text
    except ImportError:
        return None
    ids = settings["model"]["vocab"]
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


def _is_uncased_bert(settings: dict[str, Any]) -> bool:
    normalizer, model = settings.get("normalizer") or {}, settings["model"]
    return (
        normalizer.get("type") == "BertNormalizer"
        and normalizer.get("lowercase") is True
        and normalizer.get("strip_accents") in (None, True)
        and model.get("type") == "WordPiece"
        and {"[CLS]", "[SEP]", "[UNK]"} <= model["vocab"].keys()
    )


def _normalized(text: str) -> str:
    """The output of BERT's normaliser, but without spaces around Chinese characters."""
    if _PLAIN.fullmatch(text):
        return text.lower()
    # Letter by letter, as BERT does: `str.lower` of a word treats a final Greek sigma otherwise.
    text = _DROPPED.sub("", text)
    text = "".join(" " if c in "\t\n\r" else c for c in text if c in "\t\n\r" or not _control(c))
    text = unicodedata.normalize("NFD", text)
    return "".join(c.lower() for c in text if unicodedata.category(c) != "Mn")


def _control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs")
