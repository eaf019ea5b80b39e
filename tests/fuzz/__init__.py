"""Damages valid examples of all input formats, room by room: `python -m tests.fuzz`."""
