"""Sampling with search inside the program."""
