"""Corpora, encoders, indexes and search engines: passages found for queries."""
