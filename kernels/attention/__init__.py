"""Attention: one entry point (`api`), one definition (`reference`), one file per backend."""
