"""The benchmarks that are known by name: what they are, and their files on the hub."""

import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from r1s_jax.system.assets import resolve

# As FlashRAG prepared them.
_HUB = "hf:datasets/RUC-NLPIR/FlashRAG_datasets"


class Benchmark(NamedTuple):
    """A set of questions that others measure on."""

    name: str
    title: str
    split: str
    questions: int  # how many the whole split has
    source: str  # a reference that assets.resolve takes


def _benchmark(name: str, title: str, folder: str, split: str, questions: int) -> Benchmark:
    return Benchmark(name, title, split, questions, f"{_HUB}:{folder}/{split}.jsonl")


# The seven on which Search-R1 (arXiv 2503.09516) reports, in its order.
BENCHMARKS = {
    b.name: b
    for b in (
        _benchmark("nq", "NQ", "nq", "test", 3610),
        _benchmark("triviaqa", "TriviaQA", "triviaqa", "test", 11313),
        _benchmark("popqa", "PopQA", "popqa", "test", 14267),
        _benchmark("hotpotqa", "HotpotQA", "hotpotqa", "dev", 7405),
        _benchmark("2wiki", "2Wiki", "2wikimultihopqa", "dev", 12576),
        _benchmark("musique", "MuSiQue", "musique", "dev", 2417),
        _benchmark("bamboogle", "Bamboogle", "bamboogle", "test", 125),
    )
}
TITLES = {name: b.title for name, b in BENCHMARKS.items()}
# The four of R1-Searcher's paper, in its order. It measured samples of 500 (Bamboogle: all), which
# its repository holds.
PAPER = ("hotpotqa", "2wiki", "bamboogle", "musique")
# What others call them.
_ALSO_CALLED = {"2wikimultihopqa": "2wiki", "2wikimqa": "2wiki"}


def questions_file(name: str) -> Path:
    """A benchmark's file by its name, fetched if need be; else what `assets.resolve` makes of it.

    Raises AssetError for what is neither a benchmark nor a file, and where it is not fetched.
    """
    return resolve(BENCHMARKS[name].source if name in BENCHMARKS else name)


def benchmark_of(name: str) -> str | None:
    """The benchmark that a file's name, or a reference, speaks of: one of its words is its name.

    The words of the last part count first, then those of the folders. None where they name none,
    or more than one, as `nq_hotpotqa_train` does.
    """
    last = PurePosixPath(name).name
    named = _named(last) or _named(name)
    return named.pop() if len(named) == 1 else None


def _named(text: str) -> set[str]:
    words = re.split(r"[^a-z0-9]+", text.lower())
    return {_ALSO_CALLED.get(word, word) for word in words} & BENCHMARKS.keys()
