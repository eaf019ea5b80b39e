"""Damages valid examples of everything that is read, room by room: `python -m tests.fuzz`."""
