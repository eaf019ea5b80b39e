"""The directory of a run, and the signals that stop the run."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import jax
import msgspec

from r1s_jax.config import Config, CorpusConfig, TinyWorldConfig
from r1s_jax.data.digests import data_digests
from r1s_jax.data.questions import Question
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.fields import declared
from r1s_jax.io.http import without_credentials
from r1s_jax.io.json import differences, read_object
from r1s_jax.io.schema import check
from r1s_jax.models.checkpoint_owner import RUN_FORMAT, read_versions
from r1s_jax.system.distributed import gather, on_main
from r1s_jax.system.dtype import choose_dtype
from r1s_jax.system.files import write_json, write_rows


class _WrittenPolicy(msgspec.Struct):
    compute_dtype: Literal["float32", "bfloat16"]


class _Written(msgspec.Struct):
    """The part of a run's `config.json` that a resumed run takes over."""

    policy: _WrittenPolicy


# Files that a run's first steps write; without them a new run may replace it.
_BEGUN = ("cold_start.jsonl", "metrics.jsonl", "checkpoints/[0-9]*")
# Files in the directory of a run that was killed while it wrote its first two files.
_STARTING = {"versions.json", "versions.json.partial", "config.json.partial"}
_PACKAGES = ("r1s-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "scann", "numpy")


# Fields that runs of 0.2.0 lack, with the values that mean what those runs did.
ADDED = {
    "algorithm.credit": "outcome",
    "algorithm.sequence_mask": 0.0,
    "algorithm.llds_gate": "response",
    "algorithm.echo_coefficient": 0.0,
    "algorithm.teacher": "",
    "algorithm.search_price": 0.0,
    "algorithm.forks_teach": False,
    "environment.sampler": "shuffled",
    "environment.hops": 2,
    "environment.distractors": 0,
    "environment.same_names": 0.0,
    "environment.coverage": 1.0,
    "environment.stale": 0.0,
    "environment.recall": 1.0,
    "environment.padding": 0,
    "optimizer.warmup_steps": 0,
    "rollout.forks": 0.0,
    "rollout.fork": "nothing",
    "rollout.forks_per_trajectory": 1,
    "rollout.fork_depth": 1,
    "rollout.fork_draws": 1,
    "run.keep_for_audit": 0,
}


def _as_before(place: str, described: dict[str, Any]) -> bool:
    """Whether a field that an older run lacks has the value that changes nothing."""
    if place == "algorithm.llds_gate" and not described["algorithm"]["llds_coefficient"]:
        return True  # there is nothing to gate
    section, _, name = place.partition(".")
    return place in ADDED and described[section][name] == ADDED[place]


def open_run_dir(path: Path, config: Config, resume: bool) -> Path:
    """Makes the directory and writes `config.json` and `versions.json`, or checks them on resume.

    A run that ended before its first step may be replaced, as nothing is lost. Raises
    ConfigError for a directory that is in use when not resuming, or one that holds a run of another
    config (naming the fields that differ).
    """
    described = as_written(config)
    # A model's directory has a config.json too.
    written, versions = path / "config.json", path / "versions.json"
    ours = written.exists() and versions.exists()
    if ours and any(any(path.glob(name)) for name in _BEGUN):
        if not resume:
            raise ConfigError(f"{path} already holds a run: add --resume, or choose another")
        base = Path(read_versions(path).folder)
        differ = [
            f"{place} was {old!r}, now {new!r}"
            for place, old, new in differences(read_object(written, ConfigError), described)
            if not _same_place(old, new, base)
            and not (old is None and _as_before(place, described))
        ]
        if differ:
            raise ConfigError(f"{path} is a run of another config: {'; '.join(differ)}")
        return path
    if not ours and path.exists() and not (path.is_dir() and _names(path) <= _STARTING):
        raise ConfigError(f"{path} is not empty and holds no run: choose another directory")
    path.mkdir(parents=True, exist_ok=True)
    # A run without steps does not bind the next one to its model and data.
    shutil.rmtree(path / "policy", ignore_errors=True)
    (path / "data.json").unlink(missing_ok=True)
    # Keeps the id of a run that ended before its first step: its place for checkpoints may have it.
    identity = read_versions(path).id if versions.exists() else uuid.uuid4().hex
    write_json(versions, {"format": RUN_FORMAT, "id": identity, **_versions()})
    write_json(written, described)
    return path


def with_dtype(config: Config, path: Path, resume: bool) -> Config:
    """`config` with a compute dtype in place of `auto`: a resumed run's own, or this machine's.

    Prints the choice. Raises ConfigError for a `config.json` that cannot be read.
    """

    def choose() -> str:
        before, written = "", path / "config.json"
        if resume and written.exists():
            policy = check(read_object(written, ConfigError), _Written, written, ConfigError).policy
            before = policy.compute_dtype
        return choose_dtype(config.policy.compute_dtype, before)

    dtype: Any = on_main(choose)  # one of process 0's, so that all compute alike
    policy = dataclasses.replace(config.policy, compute_dtype=dtype)
    return dataclasses.replace(config, policy=policy)


def write_held_out(path: Path, questions: Sequence[Question]) -> None:
    """Writes the questions of the evaluation, for `r1s eval run` with any model."""
    write_rows(
        path / "held_out.jsonl",
        ({"id": q.id, "question": q.question, "answer": q.answers} for q in questions),
    )


def _names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def as_written(config: Config) -> dict[str, Any]:
    """A config without credentials, for a run's folder, its report and other services."""

    def hidden(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: hidden(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [hidden(item) for item in value]
        url = isinstance(value, str) and value.startswith(("http://", "https://"))
        return without_credentials(value) if url else value

    return json.loads(json.dumps(hidden(dataclasses.asdict(config))))


def check_data(path: Path, config: Config, accept_changed: bool) -> None:
    """Writes the digests of the run's data files to `data.json`, and compares older ones with them.

    Raises ConfigError, naming the files that changed, unless `accept_changed`: with other questions
    a restored stream would continue elsewhere, and other questions would be held out.
    """
    if not isinstance(config.environment, CorpusConfig):
        return
    data, file = data_digests(config.environment), path / "data.json"
    if before := read_data(path):
        changed = [
            reference for place, (reference, digest) in data.items() if before.get(place) != digest
        ]
        if changed and not accept_changed:
            raise ConfigError(
                f"{path}: {', '.join(changed)} changed since the run began: restore it, begin a "
                "new run, or go on with --accept-changed-data"
            )
    write_json(file, {place: digest for place, (_, digest) in data.items()})


def read_data(path: Path) -> dict[str, str]:
    """The digests in a run's `data.json`; {} where there is none yet."""
    file = path / "data.json"
    if not file.exists():
        return {}
    return check(read_object(file, ConfigError), dict[str, str], file, ConfigError)


def read_config(path: Path) -> Config:
    """The config of a run, from its `config.json`. Raises ConfigError.

    Fields that it lacks, because a version before them wrote it, get the values that change
    nothing.
    """
    file = path / "config.json"
    values = read_object(file, ConfigError)
    for place, value in ADDED.items():
        section, _, name = place.partition(".")
        if isinstance(values.get(section), dict):
            values[section].setdefault(name, value)
    environment = values.get("environment")
    corpus = isinstance(environment, dict) and "questions" in environment
    kinds = {name: kind for name, (kind, _) in declared(Config).items()}
    kinds["environment"] = CorpusConfig if corpus else TinyWorldConfig
    if lacking := kinds.keys() - values.keys():
        raise ConfigError(f"{file} lacks {', '.join(sorted(lacking))}")
    return Config(
        **{
            name: check(values[name], kind, f"{file}: {name}", ConfigError)
            for name, kind in kinds.items()
        }
    )


# Ctrl-C and `kill`; then the signals that schedulers send before they kill (Slurm's --signal, Grid
# Engine's -notify) and a terminal when it closes. If the process ignores one of the latter (nohup),
# it continues to.
_STOPPING = (signal.SIGINT, signal.SIGTERM)
_WARNING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class StopRequest:
    """Turns SIGINT, SIGTERM, SIGUSR1, SIGUSR2 and SIGHUP into a request to stop after the step.

    A second SIGINT stops at once.
    """

    def __init__(self) -> None:
        self.requested = ""  # why all processes stop; a signal alone does not set it
        self._received = ""
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def agree(self) -> str:
        """The signal that any process received, so that all of them stop after the same step."""
        self.requested = next(filter(None, gather(self.requested or self._received)), "")
        return self.requested

    def __enter__(self) -> "StopRequest":
        warnings = [s for s in _WARNING if signal.getsignal(s) is not signal.SIG_IGN]
        self._previous = {s: signal.signal(s, self._note) for s in (*_STOPPING, *warnings)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name
        for stream in (s for s in self._terminals if not os.isatty(s)):
            # The terminal has closed: writing to it would end the run before its checkpoint.
            with open(os.devnull, "w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), stream)


def _versions() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "folder": str(Path.cwd()),
        "devices": [str(d) for d in jax.devices()],
        **{name: importlib.metadata.version(name) for name in _PACKAGES if _installed(name)},
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _same_place(old: Any, new: Any, base: Path) -> bool:
    """Whether both name one file or folder, if `old` is relative to the folder `base`."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = zip(old, new, strict=True)
        return all(a == b or _same_place(a, b, base) for a, b in pairs)
    if not (isinstance(old, str) and isinstance(new, str) and old and new):
        return False
    if "://" in old + new or "\0" in old + new + str(base):
        return False
    return (base / old).resolve() == Path(new).resolve()
