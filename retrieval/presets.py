"""Published corpora by name: sources, encoders, and the commands that make an index.

Sources of the counts: the size of wiki-18's published index; R1-Searcher's description of KILT in
passages of 100 words; BEIR and IRCoT, which index the same archive of abstracts.
"""

from typing import Any, NamedTuple

from r1s_jax.retrieval.known import known_encoder

_BGE, _E5 = "hf:BAAI/bge-large-en-v1.5", "hf:intfloat/e5-base-v2"
_KILT = "http://dl.fbaipublicfiles.com/KILT/kilt_knowledgesource.json"
_ABSTRACTS = "enwiki-20171001-pages-meta-current-withlinks-abstracts.tar.bz2"


class Preset(NamedTuple):
    """One corpus; `weights` counts the encoder's layer weights, which set the encoding time.

    `passages` is a reference that can be read as published; empty where `commands` make a file.
    """

    about: str
    source: str
    count: int
    exact: bool  # whether `count` is exact, not rounded
    encoder: str
    dims: int
    weights: float
    commands: tuple[str, ...]
    passages: str = ""
    kind: str = "scann"
    vectors: str = ""  # where its encoded vectors are published
    vectors_bytes: int = 0

    def json(self) -> dict[str, Any]:
        """All fields, and the prefixes that the encoder needs before texts."""
        model = known_encoder(self.encoder)
        prefixes = {"query_prefix": model.query, "passage_prefix": model.passage} if model else {}
        return self._asdict() | {"commands": list(self.commands)} | prefixes


PRESETS = {
    "wiki-18": Preset(
        about="Wikipedia of December 2018 in passages of 100 words: Search-R1's",
        source="https://huggingface.co/datasets/PeterJinGo/wiki-18-corpus",
        count=21_015_324,
        exact=True,
        encoder=_E5,
        dims=768,
        weights=85e6,
        passages="hf:datasets/PeterJinGo/wiki-18-corpus:wiki-18.jsonl.gz",
        vectors="https://huggingface.co/datasets/PeterJinGo/wiki-18-e5-index",
        vectors_bytes=45 + 4 * 768 * 21_015_324,  # e5_Flat.index: FAISS flat, inner product
        commands=(
            "hf download PeterJinGo/wiki-18-e5-index part_aa part_ab --repo-type dataset "
            "--local-dir .",
            "cat part_aa part_ab > e5_Flat.index",
            f"r1s index import e5_Flat.index --passages wiki-18 --encoder {_E5} "
            "--out indexes/wiki-18",
        ),
    ),
    "kilt": Preset(
        about="Wikipedia of August 2019 in passages of 100 words: R1-Searcher's",
        source=_KILT,
        count=36_000_000,
        exact=False,
        encoder=_BGE,
        dims=1024,
        weights=302e6,
        commands=(
            f"r1s corpus kilt {_KILT} kilt.tsv",
            f"r1s index build kilt.tsv --encoder {_BGE} --out indexes/kilt",
        ),
    ),
    "hotpotqa-abstracts": Preset(
        about="first paragraphs of Wikipedia of October 2017: R1-Searcher's for HotpotQA",
        source=f"https://nlp.stanford.edu/projects/hotpotqa/{_ABSTRACTS}",
        count=5_233_329,
        exact=False,
        encoder=_BGE,
        dims=1024,
        weights=302e6,
        commands=(
            f"curl -LO https://nlp.stanford.edu/projects/hotpotqa/{_ABSTRACTS}",
            f"r1s corpus abstracts {_ABSTRACTS} abstracts.tsv",
            f"r1s index build abstracts.tsv --encoder {_BGE} --out indexes/abstracts",
        ),
    ),
}
