"""Vectors stored in Milvus: a cluster at a URL, or a Milvus Lite file inside the index."""

import uuid
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from r1s_jax.io.errors import ConfigError
from r1s_jax.retrieval.encoder import Progress
from r1s_jax.retrieval.searchers import Found, IndexKind, NotInstalled, Searcher, Vectors

_FILE = "milvus.db"
_INSERT = 1000  # rows per call: a cluster refuses messages of more than 64 MB


class MilvusSearcher:
    """Searches a collection by inner product; the passages stay in the index's folder.

    Only one process at a time can open a Lite file.

    A cluster's collection is written once and named in `index.json`: removing the index's folder
    does not drop it. Credentials are part of the URL (`https://user:password@host`), which
    `index.json` holds: where others can read the folder, use a user who may only read.
    """

    kind: IndexKind = "milvus"

    def __init__(self, client: Any, parameters: dict[str, Any], directory: Path):
        self._client, self.parameters, self._directory = client, parameters, directory

    @classmethod
    def write(
        cls, directory: Path, vectors: Vectors, url: str = "", progress: Progress | None = None
    ) -> dict[str, Any]:
        """Fills a new collection at `url`, or in a Lite file; returns the searcher's parameters."""
        parameters = {"url": url, "collection": f"r1s_{uuid.uuid4().hex}", "rows": len(vectors)}
        client, name = _connect(directory, url), parameters["collection"]
        client.create_collection(name, dimension=vectors.shape[1], metric_type="IP")
        for start in range(0, len(vectors), _INSERT):
            rows = np.asarray(vectors[start : start + _INSERT], np.float32)
            data = [{"id": start + i, "vector": row} for i, row in enumerate(rows)]
            client.insert(name, data)
            if progress:
                progress(start + len(rows), len(vectors))
        if url:
            client.flush(name)  # Milvus Lite has no such call, and needs none
        cls(client, parameters, directory).close()
        return parameters

    def __len__(self) -> int:
        return self.parameters["rows"]

    def search(self, queries: Float[np.ndarray, "queries dims"], k: int) -> Found:
        rows = self._client.search(
            self.parameters["collection"],
            list(queries),
            limit=k,
            search_params={"metric_type": "IP"},
        )
        ids = np.zeros((len(queries), k), np.int64)
        scores = np.full((len(queries), k), np.nan, np.float32)
        for i, row in enumerate(rows):
            for j, hit in enumerate(row):
                ids[i, j], scores[i, j] = hit["id"], hit["distance"]
        return ids, scores

    def save(self, directory: Path) -> None:
        raise ConfigError("Milvus holds this index's vectors: build it again instead of copying it")

    @classmethod
    def open(cls, directory: Path, parameters: dict[str, Any]) -> "MilvusSearcher":
        client = _connect(directory, parameters["url"])
        if not client.has_collection(parameters["collection"]):
            where = parameters["url"] or directory / _FILE
            raise ConfigError(f"{where} has no collection {parameters['collection']}")
        client.load_collection(parameters["collection"])
        return cls(client, parameters, directory)

    def close(self) -> None:
        """Closes the connection, and the server that a Lite file has inside this process."""
        self._client.close()
        if not self.parameters["url"]:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(str(self._directory / _FILE))


def close_searcher(searcher: Searcher) -> None:
    """Closes a searcher of Milvus, as its folder is about to be renamed; no other kind needs it."""
    if isinstance(searcher, MilvusSearcher):
        searcher.close()


def milvus_client() -> Any:
    """The class MilvusClient; raises NotInstalled where pymilvus is missing."""
    try:
        from pymilvus import MilvusClient
    except ImportError as error:
        raise NotInstalled("pymilvus is not installed: pip install 'r1s-jax[milvus]'") from error
    return MilvusClient


def _connect(directory: Path, url: str) -> Any:
    return milvus_client()(url or str(directory / _FILE))
