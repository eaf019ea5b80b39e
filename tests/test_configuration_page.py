"""docs/configuration.md agrees with r1s_jax/config.py, docs/recipes.md with the recipes."""

import importlib.util
from pathlib import Path

FILE = Path(__file__).parents[1] / "docs" / "make_configuration.py"
spec = importlib.util.spec_from_file_location("make_configuration", FILE)
assert spec is not None and spec.loader is not None
make_configuration = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_configuration)


def test_the_page_is_current():
    written = make_configuration.PAGE.read_text("utf-8")
    assert written == make_configuration.page(), "run: python docs/make_configuration.py"


def test_the_page_of_recipes_is_current():
    assert make_configuration.RECIPES.read_text("utf-8") == make_configuration.recipes_page()


def test_every_field_has_a_sentence():
    assert not make_configuration.undocumented()


def test_a_row_tells_type_default_bounds_and_meaning():
    rows = make_configuration.page().splitlines()
    assert any(
        row.startswith("| `lora_rank` | whole number | `0` | at least 0, at most 65536 | Only")
        for row in rows
    )
    assert "## `environment` (CorpusConfig)" in rows and "## `stage1` and `stage2`" in rows
    assert any(row.startswith("| `remat` | `none`, `attention`, `full` | `none` |") for row in rows)
