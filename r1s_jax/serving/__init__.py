"""A policy that answers while it searches."""
