"""The geometry of curves over steps for inline SVG; a panel has one curve a run.

A template draws the panels, and a script reads `Panel.data` to follow the pointer. Lengths are in
units of the SVG's view box, which a page shows at about one pixel each.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 360, 180
LEFT, RIGHT, TOP, BOTTOM = 48, 344, 20, 156  # edges of the plot itself
# More points than pixels only make the page larger: a longer curve is thinned to its extremes.
_MOST_POINTS = 600
_LETTER_HEIGHT = 11

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """One column of one run; `y` is None where the row has no finite number."""

    run: int
    x: list[int]
    y: list[float | None]
    not_finite: list[int]  # steps whose value was NaN or infinite

    @property
    def last(self) -> tuple[int, float] | None:
        """The last point that has a value."""
        points = [(x, y) for x, y in zip(self.x, self.y, strict=True) if y is not None]
        return points[-1] if points else None

    def stretches(self) -> Iterator[list[tuple[int, float]]]:
        """Stretches of neighbouring points that have values."""
        stretch: list[tuple[int, float]] = []
        for x, y in zip(self.x, self.y, strict=True):
            if y is not None:
                stretch.append((x, y))
            elif stretch:
                yield stretch
                stretch = []
        if stretch:
            yield stretch


@dataclass(frozen=True)
class Scale:
    """A linear map from values to an axis, and the axis's ticks."""

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)


@dataclass(frozen=True)
class Panel:
    """One column of every run that has it."""

    key: str
    title: str
    curves: tuple[Curve, ...]
    x: Scale
    y: Scale

    def path(self, curve: Curve) -> str:
        """The line of a curve, broken where values are missing; lone points are in `dots`."""
        lines = [s for s in curve.stretches() if len(s) > 1]
        return "".join(
            "M" + "L".join(f"{self.x(x)} {self.y(y)}" for x, y in stretch) for stretch in lines
        )

    def dots(self, curve: Curve) -> list[tuple[float, float]]:
        """Points without neighbours, which no line would show."""
        lone = [stretch[0] for stretch in curve.stretches() if len(stretch) == 1]
        return [(self.x(x), self.y(y)) for x, y in lone]

    def place(self, run: int, step: int) -> tuple[float, float] | None:
        """The point of a run's curve at a step, or at the nearest one drawn; None without any."""
        points = [
            (abs(x - step), x, y)
            for curve in self.curves
            for x, y in zip(curve.x, curve.y, strict=True)
            if curve.run == run and y is not None
        ]
        if not points:
            return None
        _, x, y = min(points)
        return self.x(x), self.y(y)

    def letters(self) -> list[tuple[int, float, float]]:
        """(run, x, y) of the letter at each curve's end, moved apart where they would overlap."""
        ends = [(c.run, *c.last) for c in self.curves if c.last]
        placed: list[tuple[int, float, float]] = []
        for run, x, y in sorted(ends, key=lambda end: self.y(end[2])):
            at = self.y(y)
            near = [py for _, px, py in placed if abs(px - self.x(x)) < _LETTER_HEIGHT]
            placed.append((run, self.x(x), max([at, *(py + _LETTER_HEIGHT for py in near)])))
        return placed

    def data(self) -> dict[str, Any]:
        """The data with which the page's script follows the pointer and smooths curves."""
        return {
            "x": [self.x.low, self.x.high],
            "y": [self.y.low, self.y.high],
            "curves": [
                {"run": c.run, "x": c.x, "y": [_rounded(y) for y in c.y]} for c in self.curves
            ],
        }


def x_scale(runs: Sequence[Sequence[Row]]) -> Scale:
    """The axis of steps, the same for all panels over these rows; there must be a row."""
    steps = [row["step"] for rows in runs for row in rows]
    low, high = min(steps), max(steps)
    if low == high:
        return Scale(low - 1, high + 1, LEFT, RIGHT, (low,))
    ticks = MaxNLocator(5, integer=True).tick_values(low, high)
    return Scale(low, high, LEFT, RIGHT, tuple(float(t) for t in ticks if low <= t <= high))


def panel(key: str, title: str, runs: Sequence[Sequence[Row]], x: Scale) -> Panel | None:
    """The panel of one column; None when no run has a number there, finite or not."""
    curves = [_curve(run, key, rows) for run, rows in enumerate(runs)]
    curves = [c for c in curves if c.last or c.not_finite]
    if not curves:
        return None
    return Panel(key, title, tuple(curves), x, _y_scale(curves))


def numeric_columns(runs: Sequence[Sequence[Row]]) -> list[str]:
    """Columns that hold a number somewhere, in the order of the rows."""
    names = (k for rows in runs for row in rows for k, v in row.items() if _is_number(v))
    return [name for name in dict.fromkeys(names) if name != "step"]


def _curve(run: int, key: str, rows: Sequence[Row]) -> Curve:
    values = [float(v) if _is_number(v) else None for v in (row.get(key) for row in rows)]
    steps = [row["step"] for row in rows]
    numbers = [v if _is_number(v) and math.isfinite(v) else None for v in values]
    broken = [
        step
        for step, v in zip(steps, values, strict=True)
        if _is_number(v) and not math.isfinite(v)
    ]
    drawn = _extremes(numbers)
    return Curve(run, [steps[i] for i in drawn], [numbers[i] for i in drawn], broken)


def _extremes(values: Sequence[float | None]) -> list[int]:
    """Positions of all values; in a long list, of the minimum and maximum of each part."""
    if len(values) <= _MOST_POINTS:
        return list(range(len(values)))
    positions = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), _MOST_POINTS // 2):
        drawn = {i: v for i in part.tolist() if (v := values[i]) is not None}
        if drawn:
            positions |= {min(drawn, key=drawn.__getitem__), max(drawn, key=drawn.__getitem__)}
        else:  # a part without any value still breaks the line
            positions.add(int(part[0]))
    return sorted(positions)


def _y_scale(curves: Sequence[Curve]) -> Scale:
    values = [y for curve in curves for y in curve.y if y is not None] or [0.0]
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # constant except for rounding
        low, high = (low - 0.1 * abs(low), high + 0.1 * abs(high)) if high else (0.0, 1.0)
    ticks = [float(t) for t in MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    return Scale(ticks[0], ticks[-1], BOTTOM, TOP, tuple(ticks))


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a value can be drawn; an int of more than 300 digits cannot."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < 10**300


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
