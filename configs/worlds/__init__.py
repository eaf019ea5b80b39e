"""Variants of the tiny world in which search is hard in one respect each."""
