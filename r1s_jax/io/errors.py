"""The errors that are the user's to mend; anything else that is raised is a bug of ours."""

from collections.abc import Generator
from contextlib import contextmanager
from os import PathLike

from r1s_jax.io.text import printable

# Of a message: enough to say what, where and what to do; never the file itself.
MOST_CHARACTERS = 390
_MOST_REASON = 200
Where = str | PathLike[str]  # what a message names: a file or an address


class UserError(Exception):
    """Something outside of the program is not as it must be; the message says what to do.

    A command shows the message and nothing else. Every error of this kind derives from here, and
    nothing does that the user cannot mend. Whatever a message quotes, it stays short.
    """

    def __str__(self) -> str:
        said = super().__str__()
        return said if len(said) <= MOST_CHARACTERS and said.isprintable() else shorten(said)


class ConfigError(UserError, ValueError):
    """A field or option that does not exist or a value that it cannot take."""


class BadInput(UserError, ValueError):
    """A file or a reply that cannot be used; the message names it, the place and what was wrong."""


def shorten(text: str, most: int = MOST_CHARACTERS) -> str:
    """On one line, with control characters shown, and cut in the middle where it is longer."""
    text = printable(" ".join(text.split()))
    if len(text) <= most:
        return text
    head = (most - 5) * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (most - 5 - head) :]}"


def reason(error: BaseException) -> str:
    """What an exception of somebody else's says, for a message of ours."""
    said = shorten(str(error), _MOST_REASON)
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@contextmanager
def reading(where: Where, error: type[UserError] = BadInput) -> Generator[None]:
    """Around a reader that is not ours, which may raise anything: within, that becomes `error`.

    Errors of ours pass, as do those of the operating system that name their file, and interrupts.
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
        # A reader in Rust that panics raises what is no Exception (pyo3's PanicException).
        if not isinstance(caught, Exception) and type(caught).__name__ != "PanicException":
            raise
        raise error(f"{where} cannot be read: {reason(caught)}") from caught
