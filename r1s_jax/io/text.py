"""Text of others: made to be what it says it is, and harmless to a terminal."""

import re

# What turns a terminal's colours, title or clipboard, or the order of the text around it; white
# space apart. Lone surrogates (half an emoji, as JSON may spell it) are text for nobody.
_CONTROLS: dict[int, int | str] = {
    **{i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n"},
    **{i: f"[U+{i:04X}]" for i in range(0x7F, 0xA0)},
    **{i: f"[U+{i:04X}]" for i in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))},
}
_SURROGATES = re.compile("[\ud800-\udfff]")


def is_whole_number(text: str) -> bool:
    """Whether a text is the digits 0 to 9 alone: `isdecimal` takes those of other scripts too."""
    return text.isascii() and text.isdecimal()


def printable(text: str) -> str:
    """The text with every control character shown instead of obeyed; see also `whole`."""
    return whole(text).translate(_CONTROLS)


def whole(text: str) -> str:
    """The text with a replacement character for each half of a surrogate pair.

    Neither UTF-8 nor a tokenizer takes one, and JSON may spell one.
    """
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text) if has_surrogates(text) else text


def has_surrogates(text: str) -> bool:
    """Whether half of a surrogate pair occurs."""
    return not text.isascii() and _SURROGATES.search(text) is not None
