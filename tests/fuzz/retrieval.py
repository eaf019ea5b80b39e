"""Passages, indexes, vectors, encoders, and messages of servers and clients."""

import contextlib
import json
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.fuzz.reader import MOST_CHARACTERS, Reader, lines


def _tsv(folder: Path) -> None:
    (folder / "p.tsv").write_text("".join(f"{i}\tTown {i}   lies by river {i}.\n" for i in "0123"))


def _jsonl(folder: Path) -> None:
    rows = [{"id": i, "title": f"Town {i}", "text": "lies by a river"} for i in range(3)]
    (folder / "p.jsonl").write_text(lines(*rows, {"id": 9, "contents": '"T"\nx'}))


def _passages(name: str) -> Callable[[Path], Any]:
    def call(folder: Path) -> Any:
        from r1s_jax.retrieval.corpus import read_passages

        return list(read_passages(folder / name))

    return call


def _index(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from r1s_jax.retrieval.corpus import read_passages
        from r1s_jax.retrieval.encoder import HashEncoder
        from r1s_jax.retrieval.index import build_index, save_index

        _tsv(folder)
        passages = read_passages(folder / "p.tsv")
        save_index(build_index(passages, HashEncoder(64), kind=kind), folder / "i")
        (folder / "p.tsv").unlink()

    return make


def _search(folder: Path) -> Any:
    from r1s_jax.retrieval.encoder import HashEncoder
    from r1s_jax.retrieval.index import open_index

    return open_index(folder / "i", HashEncoder(64)).search(["river 3"], 2)


def _vectors(folder: Path) -> None:
    from r1s_jax.retrieval.api import Passage
    from r1s_jax.retrieval.encoder import HashEncoder
    from r1s_jax.retrieval.vectors import Corpus, encode_shard

    corpus = Corpus(lambda: [Passage(str(i), f"Town {i}   lies") for i in range(8)])
    for shard in range(2):
        encode_shard(corpus, HashEncoder(16), folder / "v", shard=shard, shards=2)


def _read_vectors(folder: Path) -> Any:
    from r1s_jax.retrieval.vectors import VectorShards

    return VectorShards(folder / "v")[:]


def _flat(folder: Path) -> None:
    import struct

    import numpy as np

    rows = np.eye(6, 8, dtype=np.float32)
    head = struct.pack("<4siqqqBiQ", b"IxFI", 8, 6, 1 << 20, 1 << 20, 1, 0, rows.size)
    (folder / "f.index").write_bytes(head + rows.tobytes())
    np.save(folder / "v.npy", rows.astype(np.float16))


def _read_flat(folder: Path) -> Any:
    from r1s_jax.retrieval.flat import FlatVectors

    opened = [FlatVectors(folder / name) for name in ("f.index", "v.npy")]
    for vectors in opened:
        vectors.check(8)
    return [vectors[:] for vectors in opened]


def _bert(folder: Path) -> None:
    from tests.retrieval.test_encoder import write_bert

    write_bert(folder)


def _encode(folder: Path) -> Any:
    from r1s_jax.retrieval.encoder import BertEncoder

    return BertEncoder(folder, reference="r").encode(["a b c"], kind="query")


def _reply(contract: str, body: Any) -> Reader:
    def make(folder: Path) -> None:
        (folder / "reply.json").write_text(json.dumps(body))

    def call(folder: Path) -> Any:
        from r1s_jax.retrieval.http import HttpRetriever

        # The message names the server's address, so the address contains the file name.
        retriever = HttpRetriever(f"http://reply.json/{contract}")
        retriever._client.post = lambda *_: (folder / "reply.json").read_bytes()
        return retriever.search(["a"], 2)

    return Reader(make, call)


# Heads of replies: success, busy, and a redirect.
_HEADS = {
    "ok": "HTTP/1.1 200 OK\r\nContent-Type: application/json",
    "busy": "HTTP/1.1 503 Busy\r\nRetry-After: 7200",
    "elsewhere": "HTTP/1.1 308 Moved\r\nLocation: ./queries/",
}


def _replies(folder: Path) -> None:
    body = json.dumps({"answers": [["1\tTown   text", " "]]})
    for name, head in _HEADS.items():
        head = f"{head}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        (folder / f"{name}.http").write_bytes(f"{head}{body}".encode())


def _read_replies(folder: Path) -> Any:
    """The retriever's result for each reply, which is sent unchanged over a socket."""
    from r1s_jax.retrieval.http import HttpRetriever, RemoteError
    from tests.http_server import breaking

    results = []
    for name in _HEADS:
        data = (folder / f"{name}.http").read_bytes()
        listener, url = breaking(data, data)
        with listener:
            retriever = HttpRetriever(f"{url}/{name}.http/queries", timeout_s=2, retries=0)
            try:
                results.append(repr(retriever.search(["a"], 2)))
            except RemoteError as error:
                assert f"{name}.http" in str(error) and len(str(error)) <= MOST_CHARACTERS
                results.append(type(error).__name__)
            with contextlib.suppress(OSError):  # so that the server's thread ends
                socket.create_connection(listener.getsockname(), timeout=1).close()
    return results


def _index_request(folder: Path) -> None:
    (folder / "body.json").write_text(json.dumps({"queries": ["Who?", "river"], "k": 2}))
    headers = {"host": "localhost:8000", "origin": "http://localhost:8000"}
    headers |= {"content-type": "application/json; charset=utf-8"}
    (folder / "headers.json").write_text(json.dumps(headers))


def _answer_request(folder: Path) -> Any:
    """Calls the index server with a request, without a socket."""
    import asyncio

    from r1s_jax.io.errors import BadInput
    from r1s_jax.io.json import parse_object

    fields = parse_object((folder / "headers.json").read_bytes(), "headers.json")
    headers = [
        (name.encode("latin-1", "replace"), value.encode("latin-1", "replace"))
        for name, value in fields.items()
        if isinstance(value, str)
    ]
    scope = {"type": "http", "method": "POST", "path": "/queries", "headers": headers}
    scope |= {"query_string": b"", "scheme": "http", "server": ("localhost", 8000)}
    body, sent = (folder / "body.json").read_bytes(), []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(_index_server()(scope, receive, send))
    reply = json.loads(b"".join(message.get("body", b"") for message in sent))
    status = sent[0]["status"]
    assert status == 200 or (400 <= status < 500 and set(reply) == {"error"}), (status, reply)
    if status != 200:
        raise BadInput(f"body.json: {reply['error']}")
    return reply


@cache
def _index_server() -> Any:
    from r1s_jax.retrieval.server import Limits, make_app
    from tests.fakes import WebRetriever

    return make_app(WebRetriever(), Limits())


READERS = {
    "passages.tsv": Reader(_tsv, _passages("p.tsv")),
    "passages.jsonl": Reader(_jsonl, _passages("p.jsonl")),
    "index": Reader(_index("exact"), _search, sealed=("*/vectors.npy", "*/passages.tsv")),
    "index bm25": Reader(_index("bm25"), _search, sealed=("*/bm25/*",)),
    "index scann": Reader(_index("scann"), _search, sealed=("*/scann/*",), weight=2),
    "vectors": Reader(_vectors, _read_vectors, sealed=("*.npy",)),
    "stored vectors": Reader(_flat, _read_flat),
    "encoder": Reader(_bert, _encode),
    "reply queries": _reply("queries", {"answers": [["1\tTown   text", "2\tB   c"]]}),
    "reply retrieve": _reply(
        "retrieve", {"result": [[{"document": {"contents": '"T"\nx', "id": 1}, "score": 0.5}]]}
    ),
    "replies": Reader(_replies, _read_replies, weight=2),
    "index request": Reader(_index_request, _answer_request),
}
