"""The four benchmarks of the paper: their names, their files on the hub."""

import re
from pathlib import Path

from r1s_jax.system.assets import resolve

TITLES = {
    "hotpotqa": "HotpotQA",
    "2wiki": "2Wiki",
    "bamboogle": "Bamboogle",
    "musique": "MuSiQue",
}
# The whole development sets (Bamboogle: its test set), as FlashRAG prepared them: 7,405, 12,576,
# 125 and 2,417 questions. The paper measured samples of 500, which its repository holds.
_HUB = "hf:datasets/RUC-NLPIR/FlashRAG_datasets"
_FILES = {
    "hotpotqa": f"{_HUB}:hotpotqa/dev.jsonl",
    "2wiki": f"{_HUB}:2wikimultihopqa/dev.jsonl",
    "bamboogle": f"{_HUB}:bamboogle/test.jsonl",
    "musique": f"{_HUB}:musique/dev.jsonl",
}
# What others call them.
_ALSO_CALLED = {"2wikimultihopqa": "2wiki", "2wikimqa": "2wiki"}


def questions_file(name: str) -> Path:
    """A benchmark's file by its name, fetched if need be; else what `assets.resolve` makes of it.

    Raises AssetError for what is neither a benchmark nor a file.
    """
    return resolve(_FILES.get(name, name))


def benchmark_of(name: str) -> str | None:
    """The benchmark that a file's name, or a reference, speaks of: one of its words is its name."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    named = [_ALSO_CALLED.get(word, word) for word in words]
    return next((word for word in named if word in TITLES), None)
