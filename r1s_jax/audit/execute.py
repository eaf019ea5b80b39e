"""Executes steps of a run again, in a folder of its own, and compares them with the run's rows."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from r1s_jax.config import Config, CorpusConfig, override
from r1s_jax.io.errors import UserError
from r1s_jax.io.journal import rows_so_far
from r1s_jax.learning.learner import LearnerState, make_optimizer
from r1s_jax.learning.losses import policy_loss
from r1s_jax.learning.policy_gradient import PolicyGradient
from r1s_jax.models.checkpoint import checkpoint_directory, read_state, saved_progress
from r1s_jax.models.checkpoint_owner import read_versions, saved_in
from r1s_jax.models.params import Params
from r1s_jax.tracking.digests import DIGESTS, first_difference
from r1s_jax.tracking.metrics import without_times
from r1s_jax.tracking.progress import Progress
from r1s_jax.train import Run, train

# Facts without which bits may differ, in words.
_FACTS = {
    "version": "version of r1s_jax",
    "code": "code of r1s_jax",
    "processor": "processor or its features",
    "cores": "number of cores",
    "flags": "flags of XLA",
    "devices": "devices",
    "processes": "number of processes",
    "mesh": "mesh",
    "dtype": "compute dtype",
}


class AuditError(UserError, RuntimeError):
    """A run, or a step of it, that cannot be executed again."""


class Asked(NamedTuple):
    """What an audit is to execute again, and how."""

    count: int = 2  # steps of a run, or questions of a file of answers
    everything: bool = False
    index: str = ""  # where the index is now
    distance: bool = False  # also what another machine or program made
    seed: int = 0  # draws what is executed


class Piece(NamedTuple):
    """Steps to execute, from a checkpoint on."""

    checkpoint: epath.Path
    first: int
    last: int


class Executed(NamedTuple):
    """One step, executed again."""

    step: int
    differs: str  # the first of DIGESTS that differs; "": none
    columns: dict[str, tuple[Any, Any]]  # that differ: (then, now)
    seconds: float
    seconds_then: float
    compiled: bool = False  # a part of `seconds` went into compiling
    distance: float | None = None  # see apart

    @property
    def equal(self) -> bool:
        return not (self.differs or self.columns)

    @property
    def meaning(self) -> str:
        """What the first difference means."""
        if self.differs:
            return DIGESTS.get(self.differs, "the row has no such digest")
        return "numbers of the row differ, and no digest does"


def executable(run: Path, config: Config, rows: Sequence[Mapping[str, Any]]) -> list[Piece]:
    """For every checkpoint the steps after it, up to the next one, that the run's rows describe."""
    last = max((row["step"] for row in rows if "digests" in row), default=0)
    first = min((row["step"] for row in rows if "digests" in row), default=1)
    offset = config.cold_start.steps + 1
    where = checkpoint_directory(run, config.run.checkpoint_dir)
    kept = sorted(
        (step, folder)
        for folder in saved_in(where)
        if first - 1 <= (step := int(folder.name) - offset) < last
    )
    ends = [*(step for step, _ in kept[1:]), last]
    return [Piece(folder, step + 1, end) for (step, folder), end in zip(kept, ends, strict=True)]


def chosen(pieces: Sequence[Piece], steps: int, seed: int) -> list[Piece]:
    """At least parts of pieces with `steps` steps together, or all there are; drawn by `seed`.

    First the step after each checkpoint, then the one after that: every step that is executed is
    one that counts.
    """
    order = np.random.default_rng(seed).permutation(len(pieces)).tolist()
    counts = dict.fromkeys(order, 0)
    while steps and (room := [i for i in order if _length(pieces[i]) > counts[i]]):
        for i in room[:steps]:
            counts[i] += 1
        steps -= min(steps, len(room))
    return [
        piece._replace(last=piece.first + counts[i] - 1)
        for i, piece in enumerate(pieces)
        if counts[i]
    ]


def usable(pieces: Sequence[Piece], differs: Callable[[int], Sequence[str]]) -> list[Piece]:
    """The beginnings of pieces up to the first step that another machine or program made."""
    out = []
    for piece in pieces:
        last = piece.first - 1
        while last < piece.last and not differs(last + 1):
            last += 1
        if last >= piece.first:
            out.append(piece._replace(last=last))
    return out


def _length(piece: Piece) -> int:
    return piece.last - piece.first + 1


def other_facts(
    events: Iterable[Mapping[str, Any]], step: int, now: Mapping[str, Any]
) -> list[str]:
    """How this machine and program differ from those that made `step`, in words.

    `events` are the starts of the run.
    """
    then: Mapping[str, Any] = {}
    for start in events:
        if start["phase"] == "cold_start" or start["step"] < step:
            then = start["facts"]
    return facts_apart(then, now)


def facts_apart(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The facts that differ, in words."""
    return [
        f"{_FACTS.get(name, name)} was {_shown(then.get(name))}, is {_shown(now.get(name))}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name) and (name != "dtype" or now.get(name))
    ]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items()) or "none"
    return str(value)


class Again:
    """A run's machinery in a folder of its own, which can stand at any checkpoint of the run."""

    def __init__(self, config: Config, folder: Path):
        self.run = Run(config, folder, False, False)
        state = self.run.fresh_state()
        self._like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        learner = self.run.learner(make_optimizer(config.optimizer), policy_loss(config.algorithm))
        self.gradient = PolicyGradient(config, learner, self.run.engine, self.run.teacher)

    def stand_at(self, checkpoint: epath.Path) -> LearnerState:
        """The state of a checkpoint; the run goes on from there."""
        run = self.run
        run.take_over(Progress.of(saved_progress(checkpoint)))
        return read_state(checkpoint, self._like)

    def params_of(self, checkpoint: epath.Path) -> Params:
        """The parameters of a checkpoint of the run."""
        if not checkpoint.exists():
            raise AuditError(f"{checkpoint} does not exist")
        return read_state(checkpoint, self._like).params

    def step(self, state: LearnerState) -> tuple[LearnerState, dict[str, Any], float]:
        """One step: the new state, its row, and how long it took; donates `state`."""
        begin = time.perf_counter()
        state, row = self.run.step(self.gradient, state)
        self.run.progress.note_step(self.run.config, row)
        return state, row, time.perf_counter() - begin


@contextmanager
def again(run: Path, config: Config, index: str = "") -> Iterator[Again]:
    """The machinery of a run, in a temporary folder, called from where the run was begun."""
    config = _elsewhere(config, index)
    with tempfile.TemporaryDirectory(prefix="r1s-audit-") as folder, chdir(_begun_in(run)):
        machinery = Again(config, Path(folder, "run"))
        try:
            yield machinery
        finally:
            machinery.run.close()


def _begun_in(run: Path) -> Path:
    """The folder from which a run was begun, which its relative paths are from, if it is there."""
    folder = Path(read_versions(run).folder)
    return folder if folder.is_dir() else Path.cwd()


def _elsewhere(config: Config, index: str) -> Config:
    """The config without what would write outside the temporary folder, with another index."""
    run = dataclasses.replace(config.run, checkpoint_dir="", wandb_project="")
    config = dataclasses.replace(config, run=run)
    if index and not isinstance(config.environment, CorpusConfig):
        raise AuditError("--index: the run makes its world itself and has no index")
    return override(config, [f"environment.index={Path(index).resolve()}"]) if index else config


def execute(
    machinery: Again,
    pieces: Sequence[Piece],
    rows: Mapping[int, Mapping[str, Any]],
    progress: Callable[[int], None] = lambda step: None,
    *,
    measure: bool = False,
) -> Iterator[Executed]:
    """Executes pieces and compares each step with its row; calls `progress` before each.

    With `measure` it also tells how far the parameters are from those of the run's checkpoint after
    that step, where there is one.
    """
    for piece in pieces:
        state = machinery.stand_at(piece.checkpoint)
        before = jax.device_get(state.params) if measure else None
        for step in range(piece.first, piece.last + 1):
            progress(step)
            state, row, seconds = machinery.step(state)
            executed = compared(rows[step], row, seconds)
            after = piece.checkpoint.parent / str(
                int(piece.checkpoint.name) + step + 1 - piece.first
            )
            if measure and after.exists():
                theirs = jax.device_get(machinery.params_of(after))
                distance = apart(before, theirs, jax.device_get(state.params))
                executed = executed._replace(distance=distance)
            yield executed


def apart(before: Any, then: Any, now: Any) -> float:
    """|now - then| / |then - before|: how far parameters are apart, in lengths of the way that they
    went since `before`."""

    def squares(a: Any, b: Any) -> float:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return sum(float(np.square(x.astype(np.float64) - y).sum()) for x, y in pairs)

    return float(np.sqrt(squares(now, then) / max(squares(then, before), 1e-300)))


def compared(then: Mapping[str, Any], now: Mapping[str, Any], seconds: float) -> Executed:
    """A row of metrics of the run against that of the same step, executed again."""
    was, own = without_times(then), without_times(now)
    differs = first_difference(was.pop("digests", {}), own.pop("digests", {}))
    columns = {
        name: (was.get(name), own.get(name))
        for name in sorted(was.keys() | own.keys())
        if not _same(was.get(name), own.get(name))
    }
    names = ("seconds_rollout", "seconds_reward", "seconds_update", "seconds_digests")
    before = sum(float(then.get(name, 0.0)) for name in names)
    compiled = bool(now.get("compilations"))
    return Executed(then["step"], differs, columns, seconds, before, compiled)


def _same(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)  # NaN


def from_the_beginning(
    run: Path, config: Config, index: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the cold start and of reinforcement learning of the whole run, trained again."""
    config = _elsewhere(config, index)
    with tempfile.TemporaryDirectory(prefix="r1s-audit-") as folder, chdir(_begun_in(run)):
        out = Path(folder, "run")
        train(config, out)
        return rows_so_far(out / "cold_start.jsonl"), rows_so_far(out / "metrics.jsonl")
