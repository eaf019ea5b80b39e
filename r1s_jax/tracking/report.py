"""A page that compares runs: configs, results, health, curves and sample trajectories."""

import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from r1s_jax.data.traces import Trace, sample_traces
from r1s_jax.io.fields import fits
from r1s_jax.io.journal import DataError
from r1s_jax.models.checkpoint import run_of
from r1s_jax.tracking import charts
from r1s_jax.tracking.journal import PlannedConfig, read_json, step_rows
from r1s_jax.tracking.pages import breakable, write_page
from r1s_jax.tracking.trace_view import LABELS

_TRACES = 60  # on a page, shared by its runs: enough to read, few enough to send around

# The main curves by heading; every other column of numbers comes under _OTHER.
_GROUPS = {
    "Outcome": {
        "reward": "Reward",
        "answer_f1": "Answer F1",
        "exact_match": "Exact match",
        "cover_exact_match": "Cover exact match",
        "format_valid": "Format valid, share",
    },
    "Searching": {
        "searches_per_question": "Searches a question",
        "response_length": "Response length, tokens",
    },
    "Learning": {
        "entropy": "Entropy",
        "kl": "KL to the reference",
        "clip_fraction": "Clip fraction",
        "logprob_diff_mean": "Log-prob gap, mean",
        "logprob_diff_max": "Log-prob gap, largest",
        "grad_norm": "Gradient norm",
    },
    "Speed": {
        "sampled_tokens_per_s": "Sampled tokens/s",
        "slots_busy": "Slots that sample, share",
        "trained_tokens_per_s": "Trained tokens/s",
        "seconds_rollout": "Seconds: rollout",
        "seconds_reward": "Seconds: reward",
        "seconds_update": "Seconds: update",
        "seconds_checkpoint": "Seconds: checkpoint",
    },
}
_OTHER, _COLD_START = "Other columns", "Cold start"


@dataclass(frozen=True)
class RunData:
    """The content of a run's directory; only `config.json` is required."""

    letter: str
    name: str
    config: dict[str, Any]  # by dotted name
    versions: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    cold_start: list[dict[str, Any]]
    traces: list[Trace]
    traces_found: int

    @property
    def planned(self) -> int:
        """Steps of reinforcement learning that the config asks for."""
        return sum(self.config.get(f"{stage}.steps", 0) for stage in ("stage1", "stage2"))

    @property
    def state(self) -> str:
        """How far the run came, in words."""
        if self.rows:
            steps = f"step {self.rows[-1]['step']} of {self.planned}"
        elif self.cold_start:
            planned = self.config.get("cold_start.steps", 0)
            steps = f"cold start, step {self.cold_start[-1]['step']} of at most {planned}"
        else:
            steps = "not a step yet"
        return f"finished, {steps}" if self.summary else f"{steps}; no summary: running or stopped"


@dataclass(frozen=True)
class Alarm:
    """A health signal of one run and all the steps at which it fired."""

    run: int
    signal: str
    level: str
    steps: tuple[int, ...]
    value: float  # the last one
    advice: str  # the last one

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """First and last step of each stretch of steps at which it fired."""
        return _stretches(self.steps)


def write_report(run_dirs: Sequence[Path], out: Path) -> None:
    """Writes the page. Raises DataError for a directory that holds no run, or a broken file."""
    runs = _read_runs(run_dirs)
    alarms = [alarm for i, run in enumerate(runs) for alarm in _alarms(i, run.rows)]
    groups = _panel_groups(runs)
    marks = {name: [] if name == _COLD_START else _stage_marks(runs) for name in groups}
    write_page(
        out,
        "report.html",
        runs=runs,
        facts=_facts(runs),
        differing=_table([run.config for run in runs], differing=True),
        config=_table([run.config for run in runs]),
        versions=_table([run.versions for run in runs]),
        alarms=alarms,
        groups=groups,
        absent=_absent(runs),
        collapsed=(_OTHER,),
        marks=marks,
        onsets=_onsets(alarms),
        cold_start=_COLD_START,
        plot=charts,
        traces=[(i, trace) for i, run in enumerate(runs) for trace in run.traces],
        labels=LABELS,
        data={
            "letters": [run.letter for run in runs],
            "plot": [charts.LEFT, charts.RIGHT, charts.TOP, charts.BOTTOM],
            "alarms": [[a.run, f"{a.signal} ({a.level})", a.stretches] for a in alarms],
        },
        number=_number,
        tick_text=_tick,
        breakable=breakable,
        advantage_range=_advantage_range,
    )


def _read_runs(run_dirs: Sequence[Path]) -> list[RunData]:
    seen: set[Path] = set()
    for path in run_dirs:
        if path.resolve() in seen:
            raise DataError(f"{path} was given twice: name each run once")
        seen.add(path.resolve())
        if run_of(path) != path:
            raise DataError(f"{path} is no run: it holds no config.json and versions.json")
    names = [path.resolve().name for path in run_dirs]
    if len(set(names)) < len(names):
        names = [str(path) for path in run_dirs]
    each = max(1, _TRACES // len(run_dirs))
    return [_read_run(path, names[i], _letter(i), each) for i, path in enumerate(run_dirs)]


def _read_run(path: Path, name: str, letter: str, traces: int) -> RunData:
    sampled = path / "traces.jsonl"
    shown, total = sample_traces(sampled, traces) if sampled.exists() else ([], 0)
    return RunData(
        letter,
        name,
        _flat(read_json(path / "config.json", PlannedConfig)),
        read_json(path / "versions.json"),
        read_json(path / "summary.json"),
        step_rows(path / "metrics.jsonl"),
        step_rows(path / "cold_start.jsonl"),
        shown,
        total,
    )


def _letter(index: int) -> str:
    """A run's short label: A, B, ..., Z, then numbers."""
    return string.ascii_uppercase[index] if index < 26 else str(index + 1)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested objects by dotted names: {"stage1.steps": 4}."""
    if not isinstance(value, dict):
        return {name: value}
    parts = [_flat(v, f"{name}.{k}" if name else k) for k, v in value.items()]
    return {k: v for part in parts for k, v in part.items()}


def _table(
    columns: Sequence[dict[str, Any]], differing: bool = False
) -> list[tuple[str, list[str]]]:
    """(name, value of every run) of all fields, or of those that differ; "–" where one has none."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [_text(c[name]) if name in c else "–" for c in columns]) for name in names]
    return [row for row in rows if not differing or len(set(row[1])) > 1]


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _facts(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """(name, value of every run) of the results; a run without a summary has few."""

    def row(name: str, *keys: str) -> tuple[str, list[str]]:
        values = [[_number(run.summary.get(key)) for key in keys] for run in runs]
        return name, [" → ".join(v) if set(v) != {"–"} else "–" for v in values]

    def last(name: str, key: str) -> tuple[str, list[str]]:
        return name, [_number(run.rows[-1].get(key)) if run.rows else "–" for run in runs]

    rows = [
        row("Held-out F1, before → after", "f1_before", "f1_after"),
        row("Held-out cover-EM, before → after", "cover_em_before", "cover_em_after"),
        row("Held-out F1 of one-hop, after", "f1_one_hop_after"),
        row("Held-out F1 of two-hop, after", "f1_two_hop_after"),
        row("Searches a question, before → after", "searches_before", "searches_after"),
        row("Searched where it must", "searched_needed_before", "searched_needed_after"),
        row("Searched where it need not", "searched_memorised_before", "searched_memorised_after"),
        row("Mean reward of all steps", "mean_reward"),
        last("Reward, last step", "reward"),
        last("Answer F1, last step", "answer_f1"),
        last("Searches a question, last step", "searches_per_question"),
        row("Sampled tokens/s", "sampled_tokens_per_s"),
        ("Time", [_duration(run.summary.get("seconds")) for run in runs]),
    ]
    filled = [r for r in rows if set(r[1]) != {"–"}]
    return [("State", [run.state for run in runs]), *filled]


def _alarms(run: int, rows: Sequence[dict[str, Any]]) -> Iterator[Alarm]:
    """The health signals of a run, the fatal first, then in the order of their first step."""
    fired: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
    for row in rows:
        for alarm in row.get("health", ()):
            key = (str(alarm["signal"]), str(alarm["level"]))
            fired.setdefault(key, []).append((row["step"], alarm))
    for (signal, level), times in sorted(fired.items(), key=lambda item: item[0][1] != "fatal"):
        _, last = times[-1]
        steps = tuple(step for step, _ in times)
        yield Alarm(run, signal, level, steps, last["value"], str(last["advice"]))


def _onsets(alarms: Sequence[Alarm]) -> list[tuple[int, int, str, str]]:
    """(run, step, level, signals) of each step at which signals began; the worst level counts."""
    onsets: dict[tuple[int, int], list[Alarm]] = {}
    for alarm in alarms:
        for first, _ in alarm.stretches:
            onsets.setdefault((alarm.run, first), []).append(alarm)
    return [
        (
            run,
            step,
            "fatal" if any(a.level == "fatal" for a in group) else "warning",
            ", ".join(f"{a.signal} ({a.level})" for a in group),
        )
        for (run, step), group in onsets.items()
    ]


def _stretches(steps: Sequence[int]) -> list[tuple[int, int]]:
    by_offset = groupby(enumerate(steps), key=lambda pair: pair[1] - pair[0])
    parts = [[step for _, step in part] for _, part in by_offset]
    return [(part[0], part[-1]) for part in parts]


def _panel_groups(runs: Sequence[RunData]) -> dict[str, list[charts.Panel]]:
    """The panels by heading; headings without panels are left out."""
    rows, cold = [run.rows for run in runs], [run.cold_start for run in runs]
    groups = {}
    if any(rows):
        named = {key for columns in _GROUPS.values() for key in columns}
        rest = [key for key in charts.numeric_columns(rows) if key not in named]
        columns = {**_GROUPS, _OTHER: {key: _title(key) for key in rest}}
        x = charts.x_scale(rows)
        for heading, titles in columns.items():
            panels = [charts.panel(key, title, rows, x) for key, title in titles.items()]
            groups[heading] = [panel for panel in panels if panel]
    if any(cold):
        x = charts.x_scale(cold)
        panels = [charts.panel(key, _title(key), cold, x) for key in charts.numeric_columns(cold)]
        groups[_COLD_START] = [panel for panel in panels if panel]
    return {heading: panels for heading, panels in groups.items() if panels}


def _absent(runs: Sequence[RunData]) -> list[str]:
    """Titles of the main curves that no run has."""
    columns = set(charts.numeric_columns([run.rows for run in runs]))
    titles = {key: title for group in _GROUPS.values() for key, title in group.items()}
    return [title for key, title in titles.items() if key not in columns]


def _stage_marks(runs: Sequence[RunData]) -> list[tuple[float, str, int | None]]:
    """(where, stage, run) of each change of stage; run None where all runs change alike."""
    marks: dict[tuple[float, str], list[int]] = {}
    for i, run in enumerate(runs):
        for before, after in pairwise(run.rows):
            stage = str(after.get("stage", ""))
            if stage != before.get("stage", ""):
                at = (before["step"] + after["step"]) / 2
                marks.setdefault((at, stage), []).append(i)
    learning = sum(bool(run.rows) for run in runs)
    return [
        (at, stage, None if len(changed) == learning else i)
        for (at, stage), changed in sorted(marks.items())
        for i in changed[: 1 if len(changed) == learning else None]
    ]


def _title(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _number(value: Any) -> str:
    if not (fits(value, float) or isinstance(value, float)):  # NaN and infinity are shown
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _advantage_range(trace: Trace) -> str:
    values = [advantage for _, advantage in trace.token_advantages]
    ends = dict.fromkeys(f"{end:+.3g}" for end in (min(values), max(values)))
    return " to ".join(ends)


def _tick(value: float) -> str:
    number, exponent, power = f"{value:g}".partition("e")
    return f"{number}{exponent}{int(power)}" if exponent else number


def _duration(seconds: Any) -> str:
    if not fits(seconds, float):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
