"""Attention: one door (`api`), one meaning (`reference`), one file a backend."""
