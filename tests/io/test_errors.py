"""Any error of a third-party reader becomes one message."""

import pytest

from r1s_jax.io.errors import BadInput, reading


class PanicException(BaseException):
    """Like the panic of a Rust library: not a subclass of Exception."""


@pytest.mark.parametrize("raised", [PanicException("index 9 out of range"), KeyError("model")])
def test_an_error_of_a_reader_names_the_file(raised):
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
