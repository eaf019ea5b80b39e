"""Tokenizers: from a Hugging Face directory or GGUF metadata, and what the engine asks of them.

Nothing here names a tokenizer's class: whatever `transformers` loads will do.
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

# How the families split text before BPE. They differ in how many digits make one word.
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
            tokenizer.init_kwargs.pop(how_loaded, None)  # else saved as if it were the tokenizer's
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
    # A file that does not say means what its family does: only Llama 3 begins with a bos token.
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
    """Token ids of a text that stands inside a sequence."""
    if inside := _inside(tokenizer):
        return inside.encode(whole(text), add_special_tokens=False).ids
    return tokenizer.encode(whole(text), add_special_tokens=False)


def encode_start(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that begins a sequence: what the tokenizer puts first, once.

    A chat template writes it itself. What a tokenizer puts last is left away: the text goes on.
    """
    text = whole(text)
    ids, plain = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)
    at = next((n for n in range(3) if ids[n : n + len(plain)] == plain), 0)
    first = ids[:at]
    return plain if plain[: len(first)] == first else first + plain


@lru_cache(maxsize=8)
def _inside(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer for texts inside a sequence; None where it is the tokenizer itself.

    Those of SentencePiece put a space before every text that they encode, and take one from every
    text that they decode. That is right at the start of a sequence and wrong everywhere else.
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
    """A part of a tokenizer without what adds or takes the first space; None where that is all."""
    for name in ("normalizers", "pretokenizers", "decoders"):
        if any(inner["type"] in _DROP_SPACES for inner in part.get(name, ())):
            return part  # what comes after it marks words: their spaces are gone
        if name in part:
            kept = [_without_first_space(inner) for inner in part[name]]
            return part | {name: [inner for inner in kept if inner is not None]}
    if part["type"] == "Prepend" or (part["type"] == "Strip" and part.get("content") == " "):
        return None
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if part["type"] == "ByteLevel" and part.get("add_prefix_space"):
        return part | {"add_prefix_space": False}
    return part


def _check_pieces(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Raises WeightsError for a tokenizer that puts spaces between texts which have none there."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None and not _inside(tokenizer):
        return
    for first, second in (("a", "b"), (" a", " b"), ("a b", "a")):
        ids = encode(tokenizer, first) + encode(tokenizer, second)
        found = decode(tokenizer, ids)
        if tokenizer.unk_token_id not in ids and found != first + second:
            raise WeightsError(
                f"{path}: this tokenizer ({type(tokenizer).__name__}) makes {found!r} of {first!r} "
                f"with {second!r} behind it: a rollout could not put turns and documents together. "
                "Wanted is a tokenizer that keeps spaces as they are"
            )


def foreign(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """Makes text of others free of the tokenizer's control tokens: each gets a space inside.

    Encoded as it is, a document that spells `<|im_end|>` would end the turn. Where the tokenizer
    normalises text, it may know a control token in other spellings (full width, upper case): what
    it takes for one gets its space as well.
    """
    control = {i: t for i, t in tokenizer.added_tokens_decoder.items() if _controls(t)}
    if not control:
        return whole
    names = sorted((token.content for token in control.values()), key=len, reverse=True)
    spelled = re.compile("|".join(map(re.escape, names)))
    backend: Any = _inside(tokenizer) or getattr(tokenizer, "backend_tokenizer", None)
    # Else a token is known by its exact name alone, and nothing need be encoded to be sure.
    normalises = getattr(backend, "normalizer", None) is not None and any(
        t.normalized or backend.model.token_to_id(t.content) is not None for t in control.values()
    )
    unknown: Any = tokenizer.unk_token_id
    ids = control.keys() - {unknown}  # which stands for any unknown word

    def clean(text: str) -> str:
        text = spelled.sub(lambda name: f"{name[0][0]} {name[0][1:]}", whole(text))
        return _respelled(text, backend, ids) if normalises else text

    return clean


def _controls(token: Any) -> bool:
    """Whether an added token may steer a model: special, or it begins with a sign."""
    name = token.content.strip()
    sign = name[:1] not in ("", "▁") and not name[0].isalnum()
    return len(name) > 1 and (token.special or (sign and any(map(str.isalpha, name))))


def _respelled(text: str, backend: Tokenizer, control: Set[int]) -> str:
    """The text with a space in each place that is encoded as one of the ids."""
    for again in (True, True, False):
        encoding = backend.encode(text, add_special_tokens=False)
        places = zip(encoding.ids, encoding.offsets, strict=True)
        for begin, end in reversed([place for i, place in places if i in control]):
            place = text[begin:end].strip()
            # At last it is left out: a name that is known with a space inside.
            text = text[:begin] + (f"{place[:1]} {place[1:]}" if again else " ") + text[end:]
    return text


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The exact text of token ids inside a sequence, special tokens included."""
    if inside := _inside(tokenizer):
        return inside.decode([int(i) for i in ids], skip_special_tokens=False)
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return cast(str, text)  # of one sequence


def token_strings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each id in 0..len-1 adds when it follows other text.

    Found by decoding it behind a plain word, so it holds for any tokenizer: a word-initial piece
    keeps its space, a special token its name. A part of a character is U+FFFD, an unused id "".
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
    """What each id adds to the text of them all: joined, the texts are exactly `decode(ids)`.

    A character split over several tokens belongs to the last of them; the others add "".
    """
    whole, texts, end = decode(ids), [], 0
    start, base = 0, 0  # decoding begins at this token, which begins at this character
    for i in range(1, len(ids) + 1):
        seen = decode(ids[start:i])
        if not whole.startswith(seen, base):
            seen = seen.rstrip("\N{REPLACEMENT CHARACTER}")  # of a character not yet complete
        reached = base + len(seen) if whole.startswith(seen, base) else end
        reached = len(whole) if i == len(ids) else max(end, reached)
        texts.append(whole[end:reached])
        end = reached
        # Begun anew where that changes nothing, or a long text would take quadratic time.
        if i - start >= _DECODED_AT_ONCE and decode(ids[i:]) == whole[end:]:
            start, base = i, end
    return texts


class _Generation(msgspec.Struct):
    """Of a generation_config.json, what is read here."""

    eos_token_id: TokenId | list[TokenId] | None = None


def eos_ids(tokenizer: PreTrainedTokenizerBase, path: str | Path | None = None) -> tuple[int, ...]:
    """Every id that ends a generation, the first being the one to write.

    From the model's generation config (where `path` has one), the tokenizer's eos, and the end
    markers among its special tokens: a chat model may end with its turn's or with its text's.
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
    known = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not known:
        raise WeightsError(
            f"{path or 'the tokenizer'}: nothing says which token ends a text: set eos_token_id in "
            "generation_config.json"
        )
    return known


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Raises ValueError when the tokenizer has ids that the model has no embedding for."""
    if len(tokenizer) > config.vocab_size:
        raise WeightsError(
            f"the tokenizer has {len(tokenizer)} ids and the model only {config.vocab_size} "
            "embeddings: they do not belong together"
        )
