"""Recipes: one Python file each, with `def config() -> Config`."""
