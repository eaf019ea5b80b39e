"""Serving a policy that searches while it answers."""
