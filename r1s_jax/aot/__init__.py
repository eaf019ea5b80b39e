"""Compiling for absent chips: does a recipe fit, and what would a step cost?"""
