"""The benchmarks known by name, and their files on the Hugging Face hub."""

import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from r1s_jax.system.assets import resolve

# As FlashRAG prepared them.
_HUB = "hf:datasets/RUC-NLPIR/FlashRAG_datasets"


class Benchmark(NamedTuple):
    """A published set of questions."""

    name: str
    title: str
    split: str
    questions: int  # in the whole split
    source: str  # a reference for assets.resolve


def _benchmark(name: str, title: str, folder: str, split: str, questions: int) -> Benchmark:
    return Benchmark(name, title, split, questions, f"{_HUB}:{folder}/{split}.jsonl")


# The seven benchmarks of Search-R1 (arXiv 2503.09516), in its order.
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
# The four benchmarks of R1-Searcher's paper, in its order. The paper measured samples of 500
# questions (Bamboogle: all), which its repository holds.
PAPER = ("hotpotqa", "2wiki", "bamboogle", "musique")
# Other names of the benchmarks.
_ALSO_CALLED = {"2wikimultihopqa": "2wiki", "2wikimqa": "2wiki"}


def questions_file(name: str) -> Path:
    """The file of the benchmark `name`, downloaded if needed; `assets.resolve` takes other names.

    Raises AssetError for a name that is neither a benchmark nor a file, or if a download fails.
    """
    return resolve(BENCHMARKS[name].source if name in BENCHMARKS else name)


def benchmark_of(name: str) -> str | None:
    """The benchmark whose name is one of the words of a file's name or of a reference.

    The words of the last path component count first, then the words of the folders. None if no
    benchmark is named, or more than one, as in `nq_hotpotqa_train`.
    """
    last = PurePosixPath(name).name
    benchmarks = _benchmarks_in(last) or _benchmarks_in(name)
    return benchmarks.pop() if len(benchmarks) == 1 else None


def _benchmarks_in(text: str) -> set[str]:
    words = re.split(r"[^a-z0-9]+", text.lower())
    return {_ALSO_CALLED.get(word, word) for word in words} & BENCHMARKS.keys()
