"""Finding the end of a tag in a stream of token ids, for any tokenizer.

A tag is ordinary text: it may be split into tokens in many ways, start inside one token and end
inside another. A byte automaton over the tag texts is composed with the text of every token, which
gives one table: (state, token) -> next state, or "tag i just ended".
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class TagTable(NamedTuple):
    """`table[state, token]` is the next state, or `num_states + i` when tag i ended in the token.

    The stream starts in state 0.
    """

    table: np.ndarray  # int16[num_states, V]
    num_states: int


def build_tag_table(token_strings: Sequence[str], tags: Sequence[str], vocab_size: int) -> TagTable:
    """Composes the automaton of `tags` with every token's text.

    Args:
      token_strings: text that each id adds to a stream; ids beyond its end add nothing.
      tags: texts to find; none may contain another.
      vocab_size: columns of the table.
    """
    delta, num_states = _automaton([tag.encode() for tag in tags])
    table = np.tile(np.arange(num_states, dtype=np.int16)[:, None], (1, vocab_size))
    texts = [text.encode() for text in token_strings]
    lengths = np.array([len(t) for t in texts])
    order = np.argsort(-lengths, kind="stable")
    joined = np.frombuffer(b"".join(texts), np.uint8)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    # All tokens advance together, one byte at a time; sorted by length, the live ones are a prefix.
    for offset in range(int(lengths.max(initial=0))):
        live = order[: np.searchsorted(-lengths[order], -offset, side="left")]
        byte = joined[starts[live] + offset]
        table[:, live] = delta[table[:, live], byte[None, :]]
    return TagTable(table, num_states)


def _automaton(tags: Sequence[bytes]) -> tuple[np.ndarray, int]:
    """Aho-Corasick over `tags`: int16[num_states + len(tags), 256], accepting states absorbing."""
    prefixes = sorted({tag[:i] for tag in tags for i in range(len(tag))}, key=lambda p: (len(p), p))
    index = {prefix: i for i, prefix in enumerate(prefixes)}
    index |= {tag: len(prefixes) + i for i, tag in enumerate(tags)}
    delta = np.zeros((len(index), 256), np.int16)
    for prefix in prefixes:
        for byte in range(256):
            text = prefix + bytes([byte])
            while text not in index:
                text = text[1:]
            delta[index[prefix], byte] = index[text]
    for i in range(len(tags)):
        delta[len(prefixes) + i] = len(prefixes) + i
    return delta, len(prefixes)
