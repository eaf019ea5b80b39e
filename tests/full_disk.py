"""The `r1s` command on a full disk, simulated by a limit on file sizes."""

import subprocess
import sys

_LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.executable, [sys.executable, "-m", "r1s_jax.cli", *sys.argv[2:]])
"""


def r1s_on_a_full_disk(limit: int, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs the command with a limit of `limit` bytes per file."""
    command = [sys.executable, "-c", _LIMITED, str(limit), *args]
    return subprocess.run(command, capture_output=True, text=True)
