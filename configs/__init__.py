"""Recipes: one Python file each, `def config() -> Config`."""
