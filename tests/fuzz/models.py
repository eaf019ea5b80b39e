"""Models and tokenizers as other libraries save them."""

import json
from pathlib import Path
from typing import Any

from tests.fuzz.reader import Reader


def _model(folder: Path) -> None:
    from tests.makers import save_small_model

    save_small_model(folder / "m")


def _load_config(folder: Path) -> Any:
    from r1s_jax.models.weights import load_config

    return load_config(folder / "m")


def _load_weights(folder: Path) -> Any:
    from r1s_jax.models.weights import load_params

    return load_params(folder / "m")


def _load_tokenizer(folder: Path) -> Any:
    from r1s_jax.models.tokenizer import check_tokenizer, encode, eos_ids, load_tokenizer
    from r1s_jax.models.weights import load_config

    tokenizer = load_tokenizer(folder / "m")
    check_tokenizer(tokenizer, load_config(folder / "m"))
    return encode(tokenizer, "What is the trade?"), eos_ids(tokenizer, folder / "m")


def _tokenizers(folder: Path) -> None:
    """Tokenizers of SentencePiece's kinds, and one that normalises text before control tokens."""
    from tokenizers import normalizers

    from tests.models.test_tokenizer import SPACED, normalising, sentencepiece

    steps = normalizers.NFKC(), normalizers.Lowercase()
    tokenizers = [sentencepiece(**parts) for parts in SPACED.values()]
    for i, tokenizer in enumerate([*tokenizers, normalising(*steps, special=True)]):
        tokenizer.save_pretrained(folder / f"t{i}")


def _read_tokenizers(folder: Path) -> Any:
    from r1s_jax.models import tokenizer as ours

    rows = []
    for path in sorted(folder.glob("t*")):
        tokenizer = ours.load_tokenizer(path)
        text = ours.foreign(tokenizer)("a <|IM_END|> ＜ｓ＞ <s>\n b")
        ids = ours.encode(tokenizer, text)
        first = ours.encode_start(tokenizer, "a b")
        rows.append((text, ids, ours.decode(tokenizer, ids), first, ours.token_strings(tokenizer)))
    return rows


def _shards(folder: Path) -> None:
    """Weights of a wrapped model in two shards with an index."""
    from safetensors.numpy import load_file, save_file

    _model(folder)
    whole, weight_map = folder / "m" / "model.safetensors", {}
    tensors = load_file(whole)
    names = sorted(tensors)
    whole.unlink()
    for i in (0, 1):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        part = {f"_orig_mod.{name}": tensors[name] for name in names[i::2]}
        save_file(part, folder / "m" / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "m" / "model.safetensors.index.json").write_text(json.dumps(index))


def _gguf(folder: Path) -> None:
    import jax
    import numpy as np

    from r1s_jax.config import ModelConfig
    from r1s_jax.models.params import init_params
    from tests.models.test_weights import write_gguf

    config = ModelConfig(32, 16, 32, 1, 2, 1, 8)
    write_gguf(folder / "m.gguf", jax.tree.map(np.asarray, init_params(config, 0)), config)


def _load_gguf(folder: Path) -> Any:
    from r1s_jax.models.weights import load_config, load_params

    return load_params(folder / "m.gguf", load_config(folder / "m.gguf"))


READERS = {
    "config": Reader(_model, _load_config),
    "weights": Reader(_model, _load_weights),
    "weights in shards": Reader(_shards, _load_weights),
    "tokenizer": Reader(_model, _load_tokenizer, weight=4),
    "tokenizers": Reader(_tokenizers, _read_tokenizers, weight=4),
    "gguf": Reader(_gguf, _load_gguf, weight=4),
}
