"""Fitting the reply to a turn into its token limit."""

import itertools
from collections.abc import Callable, Sequence

from r1s_jax.io.errors import ConfigError
from r1s_jax.protocol.dialect import Found


def fitted(
    texts: Sequence[Found],
    width: int,
    encode: Callable[[Sequence[Found]], list[int]],
    *,
    may_drop: bool,
) -> list[int]:
    """The tokens of a reply, at most `width`; `encode` tokenises the reply to `texts`.

    If the reply is too long, its longest documents are cut to one common length. `may_drop`: if
    the tags alone take too much, the last documents are left out. Raises ConfigError if not even
    the tags fit.
    """
    lines = [line for text in texts if not isinstance(text, str) for line in text]
    cut, room = lines, sum(map(len, lines))
    while len(tokens := encode(_refilled(texts, cut))) > width:
        if all(len(line) <= 1 for line in cut):
            if may_drop and len(lines) > 1:
                lines = lines[:-1]
                cut, room = lines, sum(map(len, lines))
                continue
            raise ConfigError(
                f"rollout.max_documents_length={width} is too short for {len(lines)} "
                "documents: their tags alone take more"
            )
        room = min(room - 1, int(0.95 * room * width / len(tokens)))
        level = _level([len(line) for line in lines], room)
        cut = [line[: max(1, level)] for line in lines]
    return tokens


def _refilled(texts: Sequence[Found], lines: Sequence[str]) -> list[Found]:
    """`texts` with their lines replaced by `lines`, which may be fewer."""
    rest = iter(lines)
    return [t if isinstance(t, str) else list(itertools.islice(rest, len(t))) for t in texts]


def _level(lengths: Sequence[int], room: int) -> int:
    """The length to cut the longest to, so that the sum is at most `room`."""
    longest = sorted(lengths)
    while longest and longest[0] * len(longest) <= room:
        room -= longest.pop(0)
    return room // len(longest) if longest else max(lengths, default=0)
