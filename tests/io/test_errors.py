"""Whatever a reader of somebody else's raises becomes one message."""

import pytest

from r1s_jax.io.errors import BadInput, reading


class PanicException(BaseException):
    """As a library in Rust raises it: no Exception."""


@pytest.mark.parametrize("raised", [PanicException("index 9 out of range"), KeyError("model")])
def test_what_a_reader_raises_names_the_file(raised):
    with (
        pytest.raises(BadInput, match=r"tokenizer\.json cannot be read: "),
        reading("tokenizer.json"),
    ):
        raise raised


@pytest.mark.parametrize(
    "raised", [KeyboardInterrupt(), SystemExit(3), FileNotFoundError(2, "", "x")]
)
def test_interrupts_and_errors_that_name_their_file_pass(raised):
    with pytest.raises(type(raised)) as seen, reading("tokenizer.json"):
        raise raised
    assert seen.value is raised
