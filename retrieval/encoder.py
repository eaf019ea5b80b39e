"""Encoders turn texts into unit vectors.

Queries are encoded in NumPy on the host's cores, never by JAX: they arrive from worker threads
while the training program holds the devices. XLA's CPU client runs every execution on a thread
pool as large as the machine's cores: a program on as many host devices that waits for documents in
a loop would leave no thread for a jitted encoder, which must produce them.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import scipy.sparse
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from r1s_jax.io.errors import ConfigError, shorten
from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check
from r1s_jax.retrieval.bert import NUMPY, Array, Bert, BertConfig, bert, load_weights
from r1s_jax.retrieval.cores import on_all_cores
from r1s_jax.retrieval.known import Known, Pooling, known_encoder
from r1s_jax.retrieval.tokenizers import Tokenize, rust_tokenize, tensorflow_tokenize

T = TypeVar("T")
_SPARE = 8  # tokens that a tokenizer may put around a text
Kind = Literal["query", "passage"]
Progress = Callable[[int, int], None]  # (done, total)

# The padded lengths of passage batches. Each has two row counts, so jit compiles at most twenty
# variants, each in a second or so; fewer lengths would waste more than that on padding.
_LENGTHS = (32, 64, 96, 128, 160, 192, 224, 256, 384, 512)
# Tokens per batch; a CPU is a fifth faster with batches that fit its caches.
_BATCH_TOKENS, _BATCH_TOKENS_CPU = 8192, 1024
_FEW_ROWS = 8


class Encoder(Protocol):
    """Turns texts into vectors whose dot product says how well a passage answers a query."""

    dims: int
    fingerprint: str  # changes whenever the vectors would
    reference: str  # for people: where the encoder came from

    def encode(
        self, texts: Sequence[str], *, kind: Kind, progress: Progress | None = None
    ) -> Float[np.ndarray, "texts dims"]:
        """Unit float32 vectors of texts; `kind="query"` may be called from any thread."""
        ...


def _unit(x: Float[Any, "*n dims"], xp: Any = np) -> Float[Any, "*n dims"]:
    return x / xp.maximum(xp.sqrt((x * x).sum(-1, keepdims=True)), 1e-12)


class BertEncoder:
    """A sentence encoder of the BERT family (MiniLM, E5, BGE) from a sentence-transformers folder.

    Reads `config.json`, `model.safetensors`, `tokenizer.json`, `1_Pooling/config.json` and, if
    present, `sentence_bert_config.json` (the maximum length) and
    `config_sentence_transformers.json` (the prefixes of queries and passages). Settings that the
    files lack are taken from `known`, if it has the reference's name.

    Passages are encoded in float32 on every device, as queries are: bfloat16 would shift their
    vectors against those of the queries.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        query_instruction: str | None = None,
        passage_instruction: str | None = None,
        reference: str | None = None,
        devices: Sequence[Any] | None = None,
    ):
        """Loads the model.

        Args:
            directory: the folder.
            query_instruction: put before each query; by default the prompt `query` of the model's
                files, or the prefix that `known` has for the model's name, or nothing.
            passage_instruction: put before each passage; by default the prompt `passage` or
                `document`, or the prefix in `known` (E5: "passage: "), or nothing.
            reference: where the folder came from; the folder itself by default.
            devices: share the rows of each batch of passages; by default all accelerators of this
                host, or its first CPU device.

        Raises:
            ValueError: a model or a pooling that is not supported.
            OSError: a file is missing.
        """
        directory = Path(directory)
        self.reference = reference or str(directory)
        defaults = known_encoder(self.reference)
        self.instructions = _read_instructions(directory, defaults)
        overrides = {"query": query_instruction, "passage": passage_instruction}
        self.instructions |= {kind: text for kind, text in overrides.items() if text is not None}
        self._devices = devices
        self._config = BertConfig.load(directory)
        self._pooling: Pooling = _read_pooling(directory, defaults)
        self.max_length = _read_max_length(directory, self._config, defaults)
        self._weights = load_weights(directory, self._config)
        self._directory = directory
        self._tokenize = rust_tokenize(directory, self.max_length)
        self.dims = self._config.dims
        self.fingerprint = self._fingerprint(directory)

    def _fingerprint(self, directory: Path) -> str:
        settings = [self._pooling, self.max_length, self.instructions]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            with (directory / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return f"bert-{digest.hexdigest()[:16]}"

    def encode(
        self, texts: Sequence[str], *, kind: Kind, progress: Progress | None = None
    ) -> Float[np.ndarray, "texts dims"]:
        """Unit float32 vectors of texts, cut to the model's maximum length.

        Queries are encoded by NumPy one by one, a core each, so that no vector depends on others.
        Passages are encoded by JAX in batches of similar length.
        """
        instruction = self.instructions[kind]
        tokenize = self._tokenize if kind == "query" else self._tokenize_in_bulk
        tokens = tokenize([instruction + text for text in texts])
        vectors = np.zeros((len(tokens), self.dims), np.float32)
        done = 0
        batches = self._encode_queries(tokens) if kind == "query" else self._encode_passages(tokens)
        for rows, values in batches:
            vectors[rows] = values
            done += len(rows)
            if progress:
                progress(done, len(tokens))
        return vectors

    def too_long(self, texts: Sequence[str]) -> list[tuple[int, int]]:
        """(row, tokens) of the passages that are cut to their first `max_length` tokens."""
        inputs = [self.instructions["passage"] + text for text in texts]
        # A token has at least one character; only non-ASCII text may grow when normalised.
        rows = [
            row
            for row, text in enumerate(inputs)
            if len(text) + _SPARE > self.max_length or not text.isascii()
        ]
        lengths = map(len, self._tokenize_whole([inputs[row] for row in rows]))
        return [(row, n) for row, n in zip(rows, lengths, strict=True) if n > self.max_length]

    def _encode_queries(self, tokens: list[list[int]]) -> Iterator[tuple[list[int], np.ndarray]]:
        for row, vector in enumerate(on_all_cores(self._encode_query, tokens)):
            yield [row], vector

    def _encode_query(self, tokens: list[int]) -> Float[np.ndarray, "1 dims"]:
        ids = np.asarray([tokens], np.int32)
        mask = np.ones_like(ids, bool)
        states = bert(self._weights, ids, mask, self._config, NUMPY)
        return _unit(_pool(states, mask, self._pooling))

    def _encode_passages(self, tokens: list[list[int]]) -> Iterator[tuple[list[int], np.ndarray]]:
        graph, state = self._model
        pending = None
        devices = self._mesh.devices
        on_cpu = devices.flat[0].platform == "cpu"
        batch_tokens = devices.size * (_BATCH_TOKENS_CPU if on_cpu else _BATCH_TOKENS)
        rows_of = NamedSharding(self._mesh, P("x"))
        for rows, ids, mask in _batches(tokens, self.max_length, batch_tokens, devices.size):
            ids, mask = jax.device_put((ids, mask), rows_of)
            values = _encode_batch(graph, state, ids, mask, self._pooling)
            if pending:  # fetch one batch late, so that the device computes while the host pads
                yield pending[0], np.asarray(pending[1])[: len(pending[0])]
            pending = rows, values
        if pending:
            yield pending[0], np.asarray(pending[1])[: len(pending[0])]

    @cached_property
    def _tokenize_whole(self) -> Tokenize:
        return rust_tokenize(self._directory, None)

    @cached_property
    def _tokenize_in_bulk(self) -> Tokenize:
        if self._mesh.devices.flat[0].platform == "cpu":
            return self._tokenize
        return tensorflow_tokenize(self._directory, self.max_length) or self._tokenize

    @cached_property
    def _model(self) -> tuple[nnx.GraphDef, nnx.State]:
        # Made when first needed: a run that only searches keeps no second copy of the weights.
        return nnx.split(Bert(self._config, self._weights, NamedSharding(self._mesh, P())))

    @cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        # Host devices share the machine's cores: the first one alone is as fast as all.
        local = jax.local_devices()
        devices = self._devices or (local[:1] if local[0].platform == "cpu" else local)
        return jax.make_mesh((len(devices),), ("x",), (AxisType.Auto,), devices=devices)


@jax.jit(static_argnames=("graph", "pooling"))
def _encode_batch(
    graph: nnx.GraphDef,
    state: nnx.State,
    ids: Int[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    pooling: Pooling,
) -> Float[jax.Array, "batch dims"]:
    # Accelerators multiply float32 at lower precision by default, NumPy (queries) does not.
    with jax.default_matmul_precision("float32"):
        return _unit(_pool(nnx.merge(graph, state)(ids, mask), mask, pooling, jnp), jnp)


def _pool(
    states: Float[Any, "batch time dims"],
    mask: Bool[Array, "batch time"],
    pooling: Pooling,
    xp: Any = np,
) -> Float[Any, "batch dims"]:
    if pooling == "cls":
        return states[:, 0]
    weights = mask.astype(states.dtype)[..., None]
    return (states * weights).sum(1) / xp.maximum(weights.sum(1), 1)


def _batches(
    tokens: list[list[int]], max_length: int, batch_tokens: int, devices: int
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yields rows of similar length, padded ids int32[B, T] and mask bool[B, T], in few shapes.

    B is a multiple of `devices`.
    """
    few = -(-_FEW_ROWS // devices) * devices
    lengths = [length for length in _LENGTHS if length < max_length] + [max_length]
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))

    def padded_length(row: int) -> int:
        return next(length for length in lengths if len(tokens[row]) <= length)

    for length, group in itertools.groupby(order, key=padded_length):
        rows, many = list(group), max(batch_tokens // length // few * few, few)
        while rows:
            size = many if len(rows) >= many else few
            batch, rows = rows[:size], rows[size:]
            ids, mask = np.zeros((size, length), np.int32), np.zeros((size, length), bool)
            for i, row in enumerate(batch):
                ids[i, : len(tokens[row])] = tokens[row]
                mask[i, : len(tokens[row])] = True
            yield batch, ids, mask


class _Pooling(msgspec.Struct):
    """`1_Pooling/config.json`: one name since sentence-transformers 5.4, a flag each before."""

    pooling_mode: str | None = None
    pooling_mode_mean_tokens: bool = False
    pooling_mode_cls_token: bool = False


class _Prompts(msgspec.Struct):
    prompts: dict[str, str] | None = None


class _MaxLength(msgspec.Struct):
    max_seq_length: Annotated[int, msgspec.Meta(ge=1)] | None = None


class _Tokenizer(msgspec.Struct):
    model_max_length: float | None = None


def _read_settings(path: Path, kind: type[T]) -> T:
    """The settings of a file; the defaults of `kind` if there is no such file."""
    return check(read_object(path) if path.exists() else {}, kind, path)


def _read_pooling(directory: Path, defaults: Known | None = None) -> Pooling:
    path = directory / "1_Pooling" / "config.json"
    if defaults and not path.exists():
        return defaults.pooling
    raw = read_object(path)
    mode = check(raw, _Pooling, path).pooling_mode
    flags = [k for k, on in raw.items() if k.startswith("pooling_mode_") and on is True]
    chosen = [mode] if mode else flags
    match chosen:
        case ["pooling_mode_mean_tokens"] | ["mean"]:
            return "mean"
        case ["pooling_mode_cls_token"] | ["cls"]:
            return "cls"
    raise ConfigError(
        f"{path}: pooling is {shorten(str(chosen), 80)}; only mean or cls is supported"
    )


def _read_instructions(directory: Path, defaults: Known | None = None) -> dict[Kind, str]:
    path = directory / "config_sentence_transformers.json"
    prompts = _read_settings(path, _Prompts).prompts or {}
    query, passage = prompts.get("query"), prompts.get("passage") or prompts.get("document")
    # Current versions of sentence-transformers write empty prompts where none are set.
    if defaults and not (query or passage):
        query, passage = defaults.query, defaults.passage
    return {"query": query or "", "passage": passage or ""}


def _read_max_length(directory: Path, config: BertConfig, defaults: Known | None = None) -> int:
    tokens = _read_settings(directory / "sentence_bert_config.json", _MaxLength).max_seq_length
    if tokens is None:  # current versions write it here
        path = directory / "tokenizer_config.json"
        tokens = _read_settings(path, _Tokenizer).model_max_length
    if tokens is None and defaults:
        tokens = defaults.tokens
    return int(min(tokens or config.positions, config.positions))


class HashEncoder:
    """Hashed character n-grams of words: an encoder without weights.

    Each n-gram of `<word>` adds +1 or -1 to one of `dims` buckets; a word that occurs `t` times
    counts `1 + log t`. Finds passages that share rare spellings with the query, such as names.
    """

    def __init__(self, dims: int = 512, ngrams: tuple[int, int] = (3, 5)):
        """`ngrams` are the lengths of the shortest and the longest n-gram."""
        self.dims = dims
        self._ngrams = ngrams
        self.reference = self.fingerprint = f"hash-v1-{dims}-{ngrams[0]}-{ngrams[1]}"

    def encode(
        self, texts: Sequence[str], *, kind: Kind, progress: Progress | None = None
    ) -> Float[np.ndarray, "texts dims"]:
        """Unit float32 vectors of texts (zero for a text without a word); `kind` is not used."""
        counts = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
        words = {word: i for i, word in enumerate(dict.fromkeys(itertools.chain(*counts)))}
        vectors = np.zeros((len(texts), self.dims), np.float32)
        if words:  # the text-by-word table times the word-by-bucket table, both sparse
            columns = np.asarray([words[word] for row in counts for word in row])
            times = np.asarray([n for row in counts for n in row.values()], np.float32)
            by_word = _sparse([len(row) for row in counts], columns, 1 + np.log(times), len(words))
            hashed = [_hash_word(word, self.dims, *self._ngrams) for word in words]
            buckets, signs = (np.concatenate(part) for part in zip(*hashed, strict=True))
            by_bucket = _sparse([len(row) for row, _ in hashed], buckets, signs, self.dims)
            summed: Any = by_word @ by_bucket
            vectors = _unit(summed.toarray())
        if progress:
            progress(len(texts), len(texts))
        return vectors


def _sparse(
    row_lengths: list[int], columns: np.ndarray, values: np.ndarray, width: int
) -> scipy.sparse.csr_array:
    ends = np.cumsum([0, *row_lengths])
    return scipy.sparse.csr_array((values, columns, ends), shape=(len(row_lengths), width))


@lru_cache(maxsize=1 << 17)
def _hash_word(
    word: str, dims: int, shortest: int, longest: int
) -> tuple[Int[np.ndarray, " grams"], Float[np.ndarray, " grams"]]:
    """The bucket and the sign of each n-gram of a word."""
    padded = f"<{word}>"
    grams = [
        padded[i : i + n].encode()
        for n in range(shortest, longest + 1)
        for i in range(len(padded) - n + 1)
    ]
    digests = b"".join(hashlib.blake2b(gram, digest_size=8).digest() for gram in grams)
    hashes = np.frombuffer(digests, "<u8")
    signs = np.where(hashes >> 63, 1, -1).astype(np.float32)
    return (hashes % dims).astype(np.int32), signs
