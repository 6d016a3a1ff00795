"""The roofline of a report (Williams, Waterman and Patterson, 2009): operations per second over operations per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fusewright.chip import Chip

# Pixels: the drawing, and what is left of the axes' labels.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480.0, 330.0, 66.0, 10.0, 10.0, 46.0
# A label in the largest type that a narrow screen gives it.
_LABEL_HEIGHT, _CHARACTER = 16.0, 8.5
_NEAR = 10.0  # points closer than this share a label
_NAMED = 4  # kernels that one label names


@dataclass(frozen=True)
class Point:
    """label: short, such as "F2". operations and bytes of one call; seconds: predicted or measured."""

    label: str
    title: str
    group: str
    operations: float
    bytes: float
    seconds: float
    measured: bool = False

    @property
    def intensity(self) -> float:
        return self.operations / max(1.0, self.bytes)

    @property
    def rate(self) -> float:
        return self.operations / self.seconds


@dataclass(frozen=True)
class Mark:
    """A point of the drawing, in pixels."""

    x: float
    y: float
    point: Point


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    title: str


@dataclass(frozen=True)
class Line:
    """A roof: its points as SVG has them, and its name, the baseline of which ends at (x, y)."""

    points: str
    text: str
    x: float
    y: float


@dataclass(frozen=True)
class Roofline:
    roofs: tuple[Line, ...]
    marks: tuple[Mark, ...]
    labels: tuple[Label, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def roofline(chip: Chip, roofs: dict[str, float], points: Sequence[Point]) -> Roofline | None:
    """Places the points under the chip's bandwidth and its rates; None where there are none.

    roofs: name → operations per second.
    """
    points = [p for p in points if p.seconds > 0 and p.bytes > 0 and p.operations > 0]  # the axes are logarithmic
    if not points:
        return None
    ridge = max(roofs.values()) / chip.bandwidth
    x_range = _exponents([*(p.intensity for p in points), ridge, ridge * 4])
    y_range = _exponents([*(p.rate for p in points), max(roofs.values()), min(roofs.values()) / 8])

    def x(value: float) -> float:
        return LEFT + (math.log10(value) - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (math.log10(value) - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)

    marks = tuple(Mark(x(p.intensity), y(p.rate), p) for p in points)
    start, end = 10.0 ** max(x_range[0], y_range[0] - math.log10(chip.bandwidth)), 10.0 ** x_range[1]
    top = max(roofs.values())
    x0, y0, x1, y1 = x(start), y(start * chip.bandwidth), x(ridge), y(top)
    memory = f"memory {chip.bandwidth / 1e12:.3g} TB/s"
    lines = [Line(f"{x0:.1f},{y0:.1f} {x1:.1f},{y1:.1f}", memory, (x0 + x1) / 2 - 10, (y0 + y1) / 2 - 6)]
    for name, rate in roofs.items():
        flat = f"{x(rate / chip.bandwidth):.1f},{y(rate):.1f} {x(end):.1f},{y(rate):.1f}"
        lines.append(Line(flat, f"{name} {rate / 1e12:.4g} TFLOP/s", WIDTH - RIGHT - 4, y(rate) - 10))
    x_ticks = tuple((x(10.0**e), f"{10.0**e:g}") for e in _between(x_range))
    y_ticks = tuple((y(10.0**e), _rate(e)) for e in _between(y_range))
    return Roofline(tuple(lines), marks, _labels(marks, lines), x_ticks, y_ticks)


def _exponents(values: Sequence[float]) -> tuple[float, float]:
    """Of ten, with a little room at both ends."""
    return math.log10(min(values)) - 0.25, math.log10(max(values)) + 0.3


def _between(exponents: tuple[float, float]) -> range:
    return range(math.ceil(exponents[0]), math.floor(exponents[1]) + 1)


def _rate(exponent: int) -> str:
    step = exponent // 3 * 3
    units = {3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}
    return f"{10 ** (exponent - step)} {units[step]}" if step in units else f"1e{exponent}"


def _labels(marks: Sequence[Mark], lines: Sequence[Line]) -> tuple[Label, ...]:
    """One label for points that lie on each other, each at the first free place around them."""
    groups: list[list[Mark]] = []
    for mark in marks:
        near = (g for g in groups if math.hypot(g[0].x - mark.x, g[0].y - mark.y) < _NEAR)
        found = next(near, None)
        if found is None:
            groups.append([mark])
        else:
            found.append(mark)
    taken = [(m.x - 6, m.y - 6, m.x + 6, m.y + 6) for m in marks]
    taken += [(line.x - len(line.text) * _CHARACTER, line.y - _LABEL_HEIGHT, line.x, line.y) for line in lines]
    labels = []
    for group in groups:
        names = [m.point.label for m in group]
        text = " ".join(names[:_NAMED]) + (f" +{len(names) - _NAMED}" if len(names) > _NAMED else "")
        x, y = _free(group[0], len(text) * _CHARACTER, taken)
        labels.append(Label(x, y, text, ", ".join(f"{m.point.label}: {m.point.title}" for m in group)))
    return tuple(labels)


def _free(mark: Mark, width: float, taken: list[tuple[float, float, float, float]]) -> tuple[float, float]:
    """The left end of a label's baseline. Takes its place."""
    sides = [(10.0, 16.0), (10.0, -6.0), (-10.0 - width, 16.0), (-10.0 - width, -6.0)]
    sides += [(dx, dy) for step in range(2, 9) for dx in (10.0, -10.0 - width) for dy in (16.0 * step, -14.0 * step)]
    for dx, dy in sides:
        box = (mark.x + dx, mark.y + dy - _LABEL_HEIGHT + 3, mark.x + dx + width, mark.y + dy + 3)
        inside = box[0] > LEFT and box[2] < WIDTH - 2 and box[1] > TOP and box[3] < HEIGHT - BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            break
    else:
        box = (mark.x + 10, mark.y + 1, mark.x + 10 + width, mark.y + 19)
    taken.append(box)
    return box[0], box[3] - 3


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
