"""`r1s compile --fit`: the memory settings with the lowest roofline of a step on a topology."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from r1s_jax.aot.compile_report import compile_recipe, phases_named
from r1s_jax.aot.programs import Workload, trajectories
from r1s_jax.aot.targets import target_devices
from r1s_jax.config import Config
from r1s_jax.io.overrides import override
from r1s_jax.learning.packing import row_length
from r1s_jax.models.sharding import batch_shards, make_mesh

_MARGIN = 0.9  # share of a chip's memory for the program; the rest is for its surroundings
_LEAST_SLOTS = 16


def fit_recipe(
    config: Config,
    topology: str,
    phase: str = "all",
    workload: Workload | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Compiles the phases of a recipe with growing sizes.

    The rollout tries `rollout.slots`, the update `optimizer.micro_batch_rows` with each
    `policy.remat`: powers of two, up to the first that does not fit. Returns `tried` (a row for
    each: `phase`, `settings`, `peak_gib`, `resident_gib`, `hbm_gib`, `roofline_s`, `fits` with a
    tenth to spare), and `best`, the fitting settings with the lowest roofline.
    """
    workload, names = workload or Workload(), phases_named(phase)
    shards = batch_shards(make_mesh(config.mesh, target_devices(topology)))
    series = {"rollout": _slots(config, shards), "update": _rows(config, shards, workload)}
    tried: list[dict[str, Any]] = []
    best: list[str] = []
    fits = True
    for name in names:
        rows: list[dict[str, Any]] = []
        for settings in series[name]:
            rows += _try(config, topology, name, settings, workload, progress)
        fitting = [row for row in rows if row["fits"]]
        best += min(fitting, key=lambda row: row["roofline_s"])["settings"] if fitting else []
        fits, tried = fits and bool(fitting), tried + rows
    return {
        "recipe": config.name,
        "topology": topology,
        "fits": fits,
        "best": best,
        "tried": tried,
    }


def _slots(config: Config, shards: int) -> list[list[Sequence[str]]]:
    most = trajectories(config) // shards
    return [[[f"rollout.slots={n}"] for n in _powers(_LEAST_SLOTS, most)]]


def _rows(config: Config, shards: int, workload: Workload) -> list[list[Sequence[str]]]:
    length = row_length(config)
    sequences = trajectories(config) // config.algorithm.updates_per_rollout
    tokens = sequences * (workload.prompt + workload.sampled + workload.documents)
    most = max(1, tokens // length // shards)
    return [
        [[f"optimizer.micro_batch_rows={n}", f"policy.remat={remat}"] for n in _powers(1, most)]
        for remat in ("none", "attention", "full")
    ]


def _powers(least: int, most: int) -> Iterable[int]:
    n = least
    while n <= max(least, most):
        yield n
        n *= 2


def _try(
    config: Config,
    topology: str,
    phase: str,
    growing: list[Sequence[str]],
    workload: Workload,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for each of the `growing` settings, up to the first that does not fit."""
    rows = []
    for settings in growing:
        progress(f"compiling the {phase} with {' '.join(settings)}")
        changed = override(config, list(settings))
        report = compile_recipe(changed, topology, phase, workload)["phases"][phase]
        resident = report.get("resident_gib", 0.0)
        rows.append(
            {
                "phase": phase,
                "settings": list(settings),
                "peak_gib": report["peak_gib"],
                "resident_gib": resident,
                "hbm_gib": report["hbm_gib"],
                "roofline_s": report.get("roofline_s", {}).get("total"),
                "fits": "error" not in report
                and report["peak_gib"] + resident <= _MARGIN * report["hbm_gib"],
            }
        )
        if not rows[-1]["fits"]:
            break
    return rows


def as_text(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{report['recipe']} on {report['topology']}, a chip:"]
    for row in report["tried"]:
        needs = f"{row['peak_gib'] + row['resident_gib']:6.1f} of {row['hbm_gib']:.0f} GiB"
        cost = f"roofline {row['roofline_s']:5.1f} s" if row["fits"] else "does not fit"
        chosen = "  <- best" if set(row["settings"]) <= set(report["best"]) else ""
        lines.append(f"{row['phase']:8} {' '.join(row['settings']):48} {needs}  {cost}{chosen}")
    return "\n".join(
        [*lines, "best: " + " ".join(report["best"]) if report["fits"] else "none fits"]
    )
