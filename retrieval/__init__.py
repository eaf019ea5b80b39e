"""Corpora, encoders and indexes: from text to documents; imports nothing from the rest."""
