"""Writes the metrics and traces of a run to files, TensorBoard and W&B."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1s_jax.config import Config
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.journal import rows_so_far
from r1s_jax.io.seals import digest, last_seal, sealed_line
from r1s_jax.models.checkpoint_owner import read_versions
from r1s_jax.system.console import console
from r1s_jax.system.distributed import is_main
from r1s_jax.system.files import write_rows
from r1s_jax.tracking.board import Board
from r1s_jax.tracking.journal import StepRow, learning_rows
from r1s_jax.tracking.run_dir import as_written

_PREFIXES = ("cold_start", "rl")  # of the scalars' names


class Telemetry:
    """Appends to `metrics.jsonl`, `cold_start.jsonl` and `traces.jsonl` of a run directory.

    One JSON object a line, flushed at once. `rewind` drops rows that a resumed run writes again.
    The lines of the first two are sealed (io/seals.py), and a row of `metrics.jsonl` with
    `digests` also gets one of the lines of `traces.jsonl` that belong to its step.
    Only the main process writes; in others every call does nothing.
    """

    def __init__(self, run_dir: Path, config: Config | None = None):
        self.run_dir, self._writes = run_dir, is_main()
        console.quiet = not self._writes
        self._seals: dict[str, str] = {}  # the last of each file
        self._traces: list[str] = []  # the lines since the last step
        self._boards: dict[str, Board] = {}
        self._first: dict[str, int] = dict.fromkeys(_PREFIXES, 1)  # the next step of each
        self._cold_steps = config.cold_start.steps if config else 0
        self._wandb = None
        if config and config.run.wandb_project and self._writes:
            self._wandb = _start_wandb(run_dir, config)

    def step(self, row: Mapping[str, Any]) -> None:
        """Writes a row of `metrics.jsonl`, and its numbers as scalars."""
        if "digests" in row:
            row = {**row, "digests": {**row["digests"], "traces": digest(*self._traces)}}
        self._traces = []
        self._append_sealed("metrics.jsonl", row)
        self._scalars("rl", row)

    def steps(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl` so far."""
        return learning_rows(self.run_dir)

    def cold_start(self, row: Mapping[str, Any]) -> None:
        """Writes a row of `cold_start.jsonl`, and its numbers as scalars."""
        self._append_sealed("cold_start.jsonl", row)
        self._scalars("cold_start", row)

    def trace(self, row: Mapping[str, Any]) -> None:
        """Writes a trajectory to `traces.jsonl`."""
        line = json.dumps(row, ensure_ascii=False) + "\n"
        self._traces.append(line)
        self._append("traces.jsonl", line)

    def rewind(self, *, cold_start: int, learning: int) -> None:
        """Drops rows after these steps, which an interrupted run wrote but did not save."""
        self._drop_after("cold_start.jsonl", cold_start)
        self._drop_after("metrics.jsonl", learning)
        self._drop_after("traces.jsonl", learning)
        self._first = dict(zip(_PREFIXES, (cold_start + 1, learning + 1), strict=True))

    def close(self) -> None:
        for board in self._boards.values():
            board.close()
        if self._wandb:
            self._wandb.finish()

    def _append_sealed(self, name: str, row: Mapping[str, Any]) -> None:
        line, self._seals[name] = sealed_line(row, self._seals.get(name, ""))
        self._append(name, line)

    def _append(self, name: str, line: str) -> None:
        if not self._writes:
            return
        with (self.run_dir / name).open("a", encoding="utf-8") as file:
            file.write(line)

    def _scalars(self, prefix: str, row: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        numbers = {f"{prefix}/{k}": v for k, v in row.items() if isinstance(v, (int, float))}
        if prefix not in self._boards:
            folder = self.run_dir / "tensorboard" / prefix
            self._boards[prefix] = Board(folder, self._first[prefix])
        self._boards[prefix].scalars(numbers, row["step"])
        if self._wandb:
            # One axis for both phases; a cold start that ends early leaves a gap.
            before = 0 if prefix == "cold_start" else self._cold_steps
            self._wandb.log(numbers, step=before + row["step"])

    def _drop_after(self, name: str, step: int) -> None:
        path = self.run_dir / name
        if self._writes and path.exists():
            rows = [row for row in rows_so_far(path, StepRow) if row["step"] <= step]
            write_rows(path, rows)
            self._seals[name] = last_seal(rows)


def _start_wandb(run_dir: Path, config: Config) -> Any:
    """The W&B run, which a resumed run continues; W&B ignores steps that it already has."""
    try:
        import wandb
    except ImportError:
        raise ConfigError("run.wandb_project is set, but wandb is not installed") from None
    return wandb.init(
        project=config.run.wandb_project,
        dir=str(run_dir),
        config=as_written(config),
        id=read_versions(run_dir).id,
        resume="allow",
    )
