"""Digests of the data files of a run; a resume compares them."""

import hashlib

from r1s_jax.config import CorpusConfig
from r1s_jax.data.aliases import ALIASES
from r1s_jax.data.benchmarks import questions_file
from r1s_jax.data.links import LINKS
from r1s_jax.retrieval.references import files_of, load_encoder
from r1s_jax.retrieval.tables import HUB
from r1s_jax.system.assets import resolve


def data_digests(config: CorpusConfig) -> dict[str, tuple[str, str]]:
    """(reference, digest) of every data file that a run reads, by its place in the config.

    Tables of the hub have no digest. The digest of an index is that of its `index.json`, which
    holds the digests of its other files; the digest of a passage encoder is its fingerprint. Raises
    AssetError for a missing file.
    """
    digests = {}
    for field in ("questions", "exclude", "demonstrations", "passages"):
        for place, reference in enumerate(getattr(config, field)):
            if not reference.startswith(HUB):
                digest = hashlib.sha256()
                files = files_of([questions_file(reference.removeprefix(LINKS))])
                files += [path for f in files[:1] if (path := f.parent / ALIASES).is_file()]
                for path in files:
                    with path.open("rb") as file:
                        digest.update(hashlib.file_digest(file, "sha256").digest())
                digests[f"{field}[{place}]"] = reference, digest.hexdigest()
    if config.passages:
        digests["encoder"] = config.encoder, load_encoder(config.encoder).fingerprint
    if config.index:
        description = (resolve(config.index) / "index.json").read_bytes()
        digests["index"] = config.index, hashlib.sha256(description).hexdigest()
    return digests
