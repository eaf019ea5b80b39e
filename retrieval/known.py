"""Settings of common encoders by name, for folders whose own files lack them.

Sources: the model cards on the Hugging Face hub (intfloat/e5-*, BAAI/bge-*-en*, thenlper/gte-*,
sentence-transformers/all-MiniLM-*).
"""

import re
from typing import Literal, NamedTuple

Pooling = Literal["mean", "cls"]

_MOST_TOKENS = 512
_BGE = "Represent this sentence for searching relevant passages: "


class Known(NamedTuple):
    """How a model reads texts: prefixes of queries and passages, pooling, maximum tokens."""

    query: str
    passage: str
    pooling: Pooling
    tokens: int = _MOST_TOKENS


# Each pattern matches the whole last part of a reference, in lower case.
_BY_NAME = (
    (
        r"(multilingual-)?e5-(small|base|large)(-v2|-unsupervised)?",
        Known("query: ", "passage: ", "mean"),
    ),
    (r"bge-(small|base|large)-en(-v1\.5)?", Known(_BGE, "", "cls")),
    (r"gte-(small|base|large)", Known("", "", "mean")),
    (r"all-minilm-l(6|12)-v[12]", Known("", "", "mean", 256)),
)


def known_encoder(reference: str) -> Known | None:
    """The settings for `hf:org/name[@revision]`, `org/name` or a folder of that name, or None."""
    if reference.startswith("hf:"):
        reference = reference.partition("@")[0]
    name = reference.rstrip("/").rpartition("/")[2].lower()
    return next((settings for form, settings in _BY_NAME if re.fullmatch(form, name)), None)
