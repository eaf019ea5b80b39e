"""Errors that users can mend; any other exception is a bug."""

from collections.abc import Generator
from contextlib import contextmanager
from os import PathLike

from r1s_jax.io.text import printable

# Length of a message: enough for problem, place and advice, not for the content of a file.
MOST_CHARACTERS = 390
_MOST_REASON = 200
Where = str | PathLike[str]  # what a message names: a file or an address


class UserError(Exception):
    """A problem outside of the program; the message says what to do.

    A command shows only the message. Exactly the errors that users can mend derive from this class.
    A message is shortened, whatever it quotes.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= MOST_CHARACTERS and text.isprintable() else shorten(text)


class ConfigError(UserError, ValueError):
    """A field or option that does not exist or a value that it cannot take."""


class BadInput(UserError, ValueError):
    """A file or a reply that cannot be used; the message names it, the place and what was wrong."""


def shorten(text: str, most: int = MOST_CHARACTERS) -> str:
    """The text on one line, control characters shown, its middle cut beyond `most` characters."""
    text = printable(" ".join(text.split()))
    if len(text) <= most:
        return text
    head = (most - 5) * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (most - 5 - head) :]}"


def reason(error: BaseException) -> str:
    """Type and shortened text of an exception, to quote in a message."""
    text = shorten(str(error), _MOST_REASON)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def reading(where: Where, error: type[UserError] = BadInput) -> Generator[None]:
    """Turns whatever a third-party reader raises in this context into `error`.

    A UserError, an OSError that names its file, and interrupts pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as caught:
        if caught.filename is not None:
            raise
        raise error(f"{where}: {reason(caught)}") from caught
    except BaseException as caught:
        # A reader in Rust that panics raises pyo3's PanicException, which is no Exception.
        if not isinstance(caught, Exception) and type(caught).__name__ != "PanicException":
            raise
        raise error(f"{where} cannot be read: {reason(caught)}") from caught
