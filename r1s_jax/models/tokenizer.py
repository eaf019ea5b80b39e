"""Tokenizers: loading from a Hugging Face directory or GGUF metadata, encoding and decoding.

Nothing here depends on a tokenizer's class: any that `transformers` loads works.
"""

import json
import re
from collections.abc import Callable, Sequence, Set
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from r1s_jax.config import ModelConfig
from r1s_jax.io.errors import reading
from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check
from r1s_jax.io.text import whole
from r1s_jax.models.gguf import GGUFFile, WeightsError, gguf_in, open_gguf

# Special tokens that end a turn or a text in one of the supported families.
END_MARKERS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>")

# How the families split text before BPE. They differ in the number of digits in a word.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GGUF_CONTROL, _GGUF_USER_DEFINED = 3, 4
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_DECODED_AT_ONCE = 32  # tokens
_DROP_SPACES = ("WhitespaceSplit", "Whitespace", "BertPreTokenizer")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory, or one built from a GGUF file's metadata.

    Never touches the network. Raises WeightsError when there is none or its kind is not supported.
    """
    if file := gguf_in(path):
        with reading(f"{file}: the tokenizer", WeightsError):
            return _from_gguf(open_gguf(file))
    with reading(f"{path}: the tokenizer", WeightsError):
        tokenizer = AutoTokenizer.from_pretrained(
            Path(path), local_files_only=True, trust_remote_code=False
        )
        for how_loaded in ("local_files_only", "is_local"):
            tokenizer.init_kwargs.pop(how_loaded, None)  # else saved as a setting of the tokenizer
        tokenizer.encode("Some settings are wrong, and only found out when they are used.")
        _check_pieces(tokenizer, path)
        return tokenizer


def _from_gguf(file: GGUFFile) -> PreTrainedTokenizerFast:
    kind = file.metadata("tokenizer.ggml.model", None)
    if kind != "gpt2":
        raise WeightsError(
            f"{file.path}: tokenizer model {kind!r} is not supported, only byte-level BPE ('gpt2')"
        )
    pre = file.metadata("tokenizer.ggml.pre", "default")
    tokens = file.metadata("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in file.metadata("tokenizer.ggml.merges")]
    special = {
        f"{name}_token": tokens[i]
        for name, key in (
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            ("pad", "padding"),
        )
        if (i := file.metadata(f"tokenizer.ggml.{key}_token_id", None)) is not None
    }

    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = _pre_tokenizer(pre, file)
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    for token, token_type in zip(tokens, file.metadata("tokenizer.ggml.token_type"), strict=True):
        if token_type in (_GGUF_CONTROL, _GGUF_USER_DEFINED):
            control = token_type == _GGUF_CONTROL
            backend.add_tokens([AddedToken(token, special=control, normalized=False)])
    # The family's default, where the file does not say: only Llama 3 begins with a bos token.
    if file.metadata("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.metadata("tokenizer.chat_template", None),
        model_max_length=file.metadata(f"{file.architecture}.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _pre_tokenizer(pre: str, file: GGUFFile) -> pre_tokenizers.PreTokenizer:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in ("default", "gpt-2"):
        return gpt2
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    digits = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}.get(pre)
    if digits is None:
        raise WeightsError(
            f"{file.path}: pre-tokenizer {pre!r} is not supported; supported are smollm, "
            "llama-bpe, qwen2, gpt-2 and default"
        )
    split = pre_tokenizers.Split(Regex(_WORDS.replace("DIGITS", digits)), behavior="isolated")
    return pre_tokenizers.Sequence([split, whole])


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text inside a sequence, without special tokens around it."""
    if inside := _inside(tokenizer):
        return inside.encode(whole(text), add_special_tokens=False).ids
    return tokenizer.encode(whole(text), add_special_tokens=False)


def encode_start(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that begins a sequence, after the tokenizer's leading special tokens.

    These appear once: a chat template writes them itself. Special tokens that the tokenizer appends
    are left out, because the sequence goes on.
    """
    text = whole(text)
    ids, plain = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)
    at = next((n for n in range(3) if ids[n : n + len(plain)] == plain), 0)
    first = ids[:at]
    return plain if plain[: len(first)] == first else first + plain


@lru_cache(maxsize=8)
def _inside(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer for texts inside a sequence; None where `tokenizer` itself serves.

    SentencePiece tokenizers put a space before every text that they encode, and remove one from
    every text that they decode. That is right at the start of a sequence and wrong elsewhere.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        name: json.loads(part.__getstate__())
        for name in ("normalizer", "pre_tokenizer", "decoder")
        if (part := getattr(backend, name, None)) is not None
    }
    changed = {name: _without_first_space(part) for name, part in parts.items()}
    if changed == parts:
        return None
    described = json.loads(backend.to_str()) | changed | {"truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(described))


def _without_first_space(part: dict[str, Any]) -> dict[str, Any] | None:
    """A part of a tokenizer that leaves first spaces alone; None if it did nothing else."""
    for name in ("normalizers", "pretokenizers", "decoders"):
        if any(inner["type"] in _DROP_SPACES for inner in part.get(name, ())):
            return part  # it drops spaces, so a space that a later part adds only marks a word
        if name in part:
            inners = [_without_first_space(inner) for inner in part[name]]
            return part | {name: [inner for inner in inners if inner is not None]}
    if part["type"] == "Prepend" or (part["type"] == "Strip" and part.get("content") == " "):
        return None
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if part["type"] == "ByteLevel" and part.get("add_prefix_space"):
        return part | {"add_prefix_space": False}
    return part


def _check_pieces(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Raises WeightsError for a tokenizer that adds or drops spaces where two texts meet."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None and not _inside(tokenizer):
        return
    for first, second in (("a", "b"), (" a", " b"), ("a b", "a")):
        ids = encode(tokenizer, first) + encode(tokenizer, second)
        text = decode(tokenizer, ids)
        if tokenizer.unk_token_id not in ids and text != first + second:
            raise WeightsError(
                f"{path}: this tokenizer ({type(tokenizer).__name__}) turns {first!r} followed by "
                f"{second!r} into {text!r}: a rollout could not join turns and documents. Use a "
                "tokenizer that keeps spaces as they are"
            )


def foreign(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """A function that breaks control tokens in text of other authors: each gets a space inside.

    Otherwise a document that spells `<|im_end|>` would end the turn. A tokenizer that normalises
    text may recognise a control token in other spellings (full width, upper case): these get a
    space as well.
    """
    control = {i: t for i, t in tokenizer.added_tokens_decoder.items() if _controls(t)}
    if not control:
        return whole
    names = sorted((token.content for token in control.values()), key=len, reverse=True)
    spelled = re.compile("|".join(map(re.escape, names)))
    backend: Any = _inside(tokenizer) or getattr(tokenizer, "backend_tokenizer", None)
    # Otherwise a token has one exact spelling, and the text need not be encoded to check it.
    normalises = getattr(backend, "normalizer", None) is not None and any(
        t.normalized or backend.model.token_to_id(t.content) is not None for t in control.values()
    )
    unknown: Any = tokenizer.unk_token_id
    ids = control.keys() - {unknown}  # `unknown` encodes any unknown word

    def clean(text: str) -> str:
        text = spelled.sub(lambda name: f"{name[0][0]} {name[0][1:]}", whole(text))
        return _respelled(text, backend, ids) if normalises else text

    return clean


def _controls(token: Any) -> bool:
    """Whether an added token may steer a model: it is special, or begins with punctuation."""
    name = token.content.strip()
    sign = name[:1] not in ("", "▁") and not name[0].isalnum()
    return len(name) > 1 and (token.special or (sign and any(map(str.isalpha, name))))


def _respelled(text: str, backend: Tokenizer, control: Set[int]) -> str:
    """The text with a space inside each span that is encoded as one of the `control` ids."""
    for keep_name in (True, True, False):
        encoding = backend.encode(text, add_special_tokens=False)
        places = zip(encoding.ids, encoding.offsets, strict=True)
        for begin, end in reversed([place for i, place in places if i in control]):
            place = text[begin:end].strip()
            # The last pass removes a name that is recognised even with a space inside.
            text = text[:begin] + (f"{place[:1]} {place[1:]}" if keep_name else " ") + text[end:]
    return text


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The exact text of token ids inside a sequence, special tokens included."""
    if inside := _inside(tokenizer):
        return inside.decode([int(i) for i in ids], skip_special_tokens=False)
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return cast(str, text)  # of one sequence


def token_strings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each id in 0..len-1 adds when it follows other text.

    Each id is decoded after a plain word, which works for any tokenizer: a word-initial piece keeps
    its space, a special token its name. A part of a character is U+FFFD, an unused id "".
    """
    special = set(tokenizer.all_special_ids)

    def plain(i: int) -> bool:
        text = decode(tokenizer, [i]).strip()
        return i not in special and text.isascii() and text.isalnum()

    anchor = next((i for i in range(len(tokenizer)) if plain(i)), None)
    if anchor is None:
        raise WeightsError("the tokenizer has no token that is a plain word or letter")
    before = decode(tokenizer, [anchor])
    pairs = (decode(tokenizer, [anchor, i]) for i in range(len(tokenizer)))
    return [text.removeprefix(before) for text in pairs]


def token_texts(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each id adds; joined, the texts are exactly `decode(ids)`.

    A character split over several tokens belongs to the last of them; the others add "".
    """
    whole, texts, end = decode(ids), [], 0
    start, base = 0, 0  # decoding begins at this token, which begins at this character
    for i in range(1, len(ids) + 1):
        seen = decode(ids[start:i])
        if not whole.startswith(seen, base):
            seen = seen.rstrip("\N{REPLACEMENT CHARACTER}")  # from an incomplete character
        reached = base + len(seen) if whole.startswith(seen, base) else end
        reached = len(whole) if i == len(ids) else max(end, reached)
        texts.append(whole[end:reached])
        end = reached
        # Restarts where that changes nothing; otherwise a long text would take quadratic time.
        if i - start >= _DECODED_AT_ONCE and decode(ids[i:]) == whole[end:]:
            start, base = i, end
    return texts


class _Generation(msgspec.Struct):
    """The field of a generation_config.json that is read."""

    eos_token_id: TokenId | list[TokenId] | None = None


def eos_ids(tokenizer: PreTrainedTokenizerBase, path: str | Path | None = None) -> tuple[int, ...]:
    """Every id that ends a generation, the first being the one to write.

    From the model's generation config (where `path` has one), the tokenizer's eos, and the end
    markers among its special tokens: a chat model may write an end of turn or an end of text.
    """
    ids: list[int | None] = []
    if path is not None and (gguf := gguf_in(path)):
        ids += [
            open_gguf(gguf).metadata(f"tokenizer.ggml.{k}_token_id", None) for k in ("eos", "eot")
        ]
    elif path is not None and (file := Path(path) / "generation_config.json").exists():
        eos = check(read_object(file, WeightsError), _Generation, file, WeightsError).eos_token_id
        ids += eos if isinstance(eos, list) else [eos]
    eos: Any = tokenizer.eos_token_id
    ids.append(eos)
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    ids += [added.get(marker) for marker in END_MARKERS]
    unique = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not unique:
        raise WeightsError(
            f"{path or 'the tokenizer'}: nothing says which token ends a text: set eos_token_id in "
            "generation_config.json"
        )
    return unique


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Raises ValueError when the tokenizer has ids that the model has no embedding for."""
    if len(tokenizer) > config.vocab_size:
        raise WeightsError(
            f"the tokenizer has {len(tokenizer)} ids and the model only {config.vocab_size} "
            "embeddings: they do not belong together"
        )
