"""Compiling for chips that are not here: does a recipe fit, and what would a step cost?"""
