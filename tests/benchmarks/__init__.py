from typer.testing import CliRunner

from benchmarks.__main__ import app


def run(*args: object):
    """Runs a command of the benchmarks in this process."""
    return CliRunner().invoke(app, [*map(str, args)])
