"""Makes text from outside safe to encode and to print on a terminal."""

import re

# Control characters, except white space: they can change a terminal's colours, title or clipboard,
# or the direction of the text around them.
_CONTROLS: dict[int, int | str] = {
    **{i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n"},
    **{i: f"[U+{i:04X}]" for i in range(0x7F, 0xA0)},
    **{i: f"[U+{i:04X}]" for i in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))},
}
# Lone surrogates, such as half an emoji: JSON can escape them, UTF-8 cannot encode them.
_SURROGATES = re.compile("[\ud800-\udfff]")


def is_whole_number(text: str) -> bool:
    """Whether a text has only the digits 0 to 9; `isdecimal` also accepts other scripts."""
    return text.isascii() and text.isdecimal()


def printable(text: str) -> str:
    """The text with visible stand-ins for control characters, and without lone surrogates."""
    return whole(text).translate(_CONTROLS)


def whole(text: str) -> str:
    """The text with lone surrogates replaced: neither UTF-8 nor a tokenizer accepts them."""
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text) if has_surrogates(text) else text


def has_surrogates(text: str) -> bool:
    """Whether a lone surrogate occurs."""
    return not text.isascii() and _SURROGATES.search(text) is not None
