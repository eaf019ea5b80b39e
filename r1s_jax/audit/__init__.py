"""Checks runs and results that somebody else made, and asks what would have happened otherwise."""
