"""Fitting the reply to a turn into the tokens that it may take."""

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
    """The tokens of a reply, at most `width`; `encode` gives those of the whole.

    Where it is too long, the longest documents share what the short ones leave; `may_drop`: where
    their tags alone take more, the last ones are left out. Raises ConfigError where not even the
    tags fit.
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
    """`texts` with these lines in the places of its own, as many as there are."""
    left = iter(lines)
    return [t if isinstance(t, str) else list(itertools.islice(left, len(t))) for t in texts]


def _level(lengths: Sequence[int], room: int) -> int:
    """The length that the longest are cut to, so that all together take at most `room`."""
    left = sorted(lengths)
    while left and left[0] * len(left) <= room:
        room -= left.pop(0)
    return room // len(left) if left else max(lengths, default=0)
