"""A layered drawing of a directed acyclic graph (Sugiyama, Tagawa and Toda, 1981): boxes in rows, edges downwards."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

# Pixels between neighbours of a row, between rows, and around the drawing.
GAP, ROW_GAP, MARGIN = 12.0, 34.0, 4.0
_SWEEPS, _SETTLING = 12, 24


@dataclass(frozen=True)
class Place:
    """A box: its left upper corner and its size, in pixels."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Route:
    """An edge as the points that it passes, from the bottom of its source to the top of its target."""

    source: Hashable
    target: Hashable
    points: tuple[tuple[float, float], ...]

    @property
    def path(self) -> str:
        """An SVG path: one cubic from point to point, vertical at each."""
        x, y = self.points[0]
        parts = [f"M{x:.1f} {y:.1f}"]
        for nx, ny in self.points[1:]:
            middle = (y + ny) / 2
            parts.append(f"C{x:.1f} {middle:.1f} {nx:.1f} {middle:.1f} {nx:.1f} {ny:.1f}")
            x, y = nx, ny
        return "".join(parts)


@dataclass(frozen=True)
class Layout:
    width: float
    height: float
    places: Mapping[Hashable, Place]
    routes: tuple[Route, ...]


def layered(sizes: Mapping[Key, tuple[float, float]], edges: Sequence[tuple[Key, Key]]) -> Layout:
    """Places boxes of these sizes (width, height), in pixels. edges: source and target; no cycles."""
    rows = _rows(sizes, edges)
    extents: dict[Hashable, tuple[float, float]] = dict(sizes.items())
    segments: list[tuple[Hashable, Hashable]] = []
    chains: list[list[Hashable]] = []
    for source, target in edges:  # an edge over several rows bends at a point in each
        bends: list[Hashable] = [(source, target, row) for row in range(rows[source] + 1, rows[target])]
        extents.update(dict.fromkeys(bends, (0.0, 0.0)))
        chain = [source, *bends, target]
        chains.append(chain)
        segments += itertools.pairwise(chain)
    level = {**rows, **{bend: bend[2] for chain in chains for bend in chain[1:-1]}}  # type: ignore[index]
    table: list[list[Hashable]] = [[] for _ in range(max(level.values(), default=-1) + 1)]
    for key in extents:
        table[level[key]].append(key)
    above, below = _neighbours(extents, segments)
    centres = _centres(table, above, below, extents)
    return _finished(table, centres, extents, sizes, chains)


def _rows(sizes: Mapping[Key, object], edges: Sequence[tuple[Key, Key]]) -> dict[Hashable, int]:
    """The longest path to each box; a box without sources moves down to just above its first user."""
    above, below = _neighbours(sizes, edges)
    rows: dict[Hashable, int] = {}
    for start in sizes:
        stack: list[Hashable] = [start]
        while stack:
            waiting = [s for s in above[stack[-1]] if s not in rows]
            if waiting:
                stack += waiting
            else:
                key = stack.pop()
                rows[key] = max((rows[s] + 1 for s in above[key]), default=0)
    for key in sizes:
        if not above[key] and below[key]:
            rows[key] = min(rows[t] for t in below[key]) - 1
    return rows


def _neighbours(
    keys: Mapping[Key, object], edges: Sequence[tuple[Key, Key]]
) -> tuple[dict[Hashable, list[Hashable]], dict[Hashable, list[Hashable]]]:
    above: dict[Hashable, list[Hashable]] = {key: [] for key in keys}
    below: dict[Hashable, list[Hashable]] = {key: [] for key in keys}
    for source, target in edges:
        above[target].append(source)
        below[source].append(target)
    return above, below


def _centres(
    table: list[list[Hashable]],
    above: Mapping[Hashable, Sequence[Hashable]],
    below: Mapping[Hashable, Sequence[Hashable]],
    extents: Mapping[Hashable, tuple[float, float]],
) -> dict[Hashable, float]:
    """Sweeps down and up: each row in the order of its neighbours' mean, then as close to it as the widths allow."""
    centres = {key: float(place) for row in table for place, key in enumerate(row)}
    for sweep in range(_SWEEPS + _SETTLING):
        neighbours = above if sweep % 2 == 0 else below
        for row in table if sweep % 2 == 0 else reversed(table):
            wanted = {k: _mean([centres[n] for n in neighbours[k]], centres[k]) for k in row}
            if sweep < _SWEEPS:  # afterwards the order stays, so that the positions settle
                row.sort(key=lambda k: wanted[k])
            both = {k: _mean([centres[n] for n in (*above[k], *below[k])], centres[k]) for k in row}
            goal = wanted if sweep < _SWEEPS else both
            widths = [extents[k][0] for k in row]
            centres.update(zip(row, _spread([goal[k] for k in row], widths), strict=True))
    return centres


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _spread(wanted: Sequence[float], widths: Sequence[float]) -> list[float]:
    """The centres nearest to `wanted`, in least squares, that keep order and gaps: pool adjacent violators."""
    offsets, offset = [], 0.0
    for i, width in enumerate(widths):
        offset += (widths[i - 1] + width) / 2 + GAP if i else 0.0
        offsets.append(offset)
    blocks: list[tuple[float, int]] = []  # mean, members
    for goal, shift in zip(wanted, offsets, strict=True):
        mean, count = goal - shift, 1
        while blocks and blocks[-1][0] > mean:
            other, members = blocks.pop()
            mean, count = (mean * count + other * members) / (count + members), count + members
        blocks.append((mean, count))
    means = [mean for mean, count in blocks for _ in range(count)]
    return [mean + shift for mean, shift in zip(means, offsets, strict=True)]


def _finished(
    table: Sequence[Sequence[Hashable]],
    centres: Mapping[Hashable, float],
    extents: Mapping[Hashable, tuple[float, float]],
    boxes: Mapping[Key, object],
    chains: Sequence[Sequence[Hashable]],
) -> Layout:
    left = min((centres[k] - extents[k][0] / 2 for k in centres), default=0.0) - MARGIN
    right = max((centres[k] + extents[k][0] / 2 for k in centres), default=0.0) + MARGIN
    places: dict[Hashable, Place] = {}
    y = MARGIN
    for row in table:
        height = max(extents[k][1] for k in row)
        for key in row:
            width, own = extents[key]
            places[key] = Place(centres[key] - width / 2 - left, y + (height - own) / 2, width, own)
        y += height + ROW_GAP

    def points(chain: Sequence[Hashable]) -> tuple[tuple[float, float], ...]:
        first, *bends, last = (places[k] for k in chain)
        middle = [(p.x, p.y) for p in bends]
        top = (first.x + first.width / 2, first.y + first.height)
        return (top, *middle, (last.x + last.width / 2, last.y))

    routes = tuple(Route(chain[0], chain[-1], points(chain)) for chain in chains)
    return Layout(right - left, max(y - ROW_GAP, 0.0) + MARGIN, {k: places[k] for k in boxes}, routes)
