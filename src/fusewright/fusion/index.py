"""Index maps: how the dimensions of a value follow the axes of the space that a kernel runs over.

A space is a list of axes. The index of one dimension of a value is `start + step · (mixed-radix number of some axes)`;
views change the map and move no data. A view that cuts an axis in two asks for a space with that axis split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import sympy

from fusewright.ir.graph import Node
from fusewright.ir.size import Size, divides, matching_groups, product, same


class NeedsSplit(Exception):
    """The space must be built again with `axis` cut into `outer` × `inner`."""

    def __init__(self, axis: int, outer: Size, inner: Size) -> None:
        super().__init__(axis, outer, inner)
        self.axis, self.outer, self.inner = axis, outer, inner


class NotAffine(Exception):
    """A view has no index map of the form that kernels take; str(error) says why."""


@dataclass(frozen=True)
class Dim:
    """index = start + step · mixed-radix(axes), axes outermost first; no axes: the constant start."""

    axes: tuple[int, ...] = ()
    start: Size = 0
    step: Size = 1

    @property
    def plain(self) -> bool:
        return same(self.start, 0) and self.step == 1


Map = tuple[Dim, ...]


@dataclass(frozen=True)
class Space:
    """Axis sizes, and the axes that were split: axis → its (outer, inner) parts."""

    sizes: tuple[Size, ...] = ()
    splits: dict[int, tuple[int, int]] = field(default_factory=dict)
    roots: int = 0

    @classmethod
    def of(cls, shape: Sequence[Size]) -> Space:
        """One axis for each dimension of `shape`; a dimension of size 1 has an axis that no map uses."""
        return cls(tuple(shape), {}, len(shape))

    def split(self, axis: int, outer: Size, inner: Size) -> Space:
        n = len(self.sizes)
        return Space((*self.sizes, outer, inner), {**self.splits, axis: (n, n + 1)}, self.roots)

    def leaves(self, axis: int) -> tuple[int, ...]:
        if axis not in self.splits:
            return () if same(self.sizes[axis], 1) else (axis,)
        return tuple(leaf for part in self.splits[axis] for leaf in self.leaves(part))

    def identity(self) -> Map:
        """The map of a value that has the space's own shape."""
        return tuple(Dim(self.leaves(axis)) for axis in range(self.roots))

    def axes(self) -> tuple[int, ...]:
        return tuple(leaf for axis in range(self.roots) for leaf in self.leaves(axis))


T = TypeVar("T")


def with_splits(shape: Sequence[Size], build: Callable[[Space], T], fixed: frozenset[int] = frozenset()) -> T:
    """Calls `build` on the space of `shape`, again with finer axes for as long as it raises NeedsSplit.

    fixed: axes that may not be split; a view that needs it raises NotAffine.
    """
    space = Space.of(shape)
    while True:
        try:
            return build(space)
        except NeedsSplit as need:
            if need.axis in fixed:
                raise NotAffine("a view splits the column axis") from None
            space = space.split(need.axis, need.outer, need.inner)


def source_map(view: Node, dims: Map, space: Space) -> Map:
    """The map of a view's source, given the view's own. Raises NeedsSplit, NotAffine."""
    shape = view.inputs[0].tensor.shape
    if view.op == "permute":
        result = [Dim()] * len(shape)
        for out, source in enumerate(view.attribute("dims")):
            result[source] = dims[out]
        return tuple(result)
    if view.op == "expand":
        lead = len(dims) - len(shape)
        return tuple(Dim() if same(s, 1) else d for s, d in zip(shape, dims[lead:], strict=True))
    if view.op == "slice":
        at, start, step = (view.attribute(n) for n in ("dim", "start", "step"))
        d = dims[at]
        return (*dims[:at], Dim(d.axes, start + step * d.start, step * d.step), *dims[at + 1 :])
    return regroup(dims, view.tensor.shape, shape, space)


def result_map(view: Node, dims: Map, space: Space) -> Map:
    """The map of a view's result, given its source's, for views that keep every element exactly once."""
    if view.op == "permute":
        return tuple(dims[d] for d in view.attribute("dims"))
    if view.op == "reshape":
        return regroup(dims, view.inputs[0].tensor.shape, view.tensor.shape, space)
    if view.op == "expand" and same(product(view.tensor.shape), product(view.inputs[0].tensor.shape)):
        return (Dim(),) * (len(view.tensor.shape) - len(dims)) + dims
    raise NotAffine(f"the {view.op} of a matrix product does not keep each element once")


def result_maps(views: Sequence[Node], dims: Map, space: Space) -> Map:
    """The map of the last of a chain of views, given that of what the first one reads."""
    for view in views:
        dims = result_map(view, dims, space)
    return dims


def regroup(dims: Sequence[Dim], old: Sequence[Size], new: Sequence[Size], space: Space) -> Map:
    """The map of a reshaped value: the same axes, in the same order, dealt out to dimensions of other sizes."""
    if not all(_whole(d, size, space) for d, size in zip(dims, old, strict=True)):
        return _regroup_sliced(dims, old, new, space)
    flat = [axis for dim in dims for axis in dim.axes]
    result = []
    for size in new:
        taken: list[int] = []
        covered: Size = 1
        while not same(covered, size):
            if not flat:
                raise NotAffine("a reshape mixes dimensions")
            axis = flat.pop(0)
            rest = divides(covered, size)
            if rest is None:
                raise NotAffine("a reshape mixes dimensions")
            if not same(space.sizes[axis], rest) and divides(space.sizes[axis], rest) is None:
                inner = divides(rest, space.sizes[axis])
                if inner is None:
                    raise NotAffine("a reshape mixes dimensions")
                raise NeedsSplit(axis, rest, inner)
            covered = covered * space.sizes[axis]
            taken.append(axis)
        result.append(Dim(tuple(taken)))
    return tuple(result)


def _whole(dim: Dim, size: Size, space: Space) -> bool:
    """Whether the axes of a dimension run over all of it: it is no part of a slice."""
    return dim.plain and same(product(space.sizes[a] for a in dim.axes), size)


def _regroup_sliced(dims: Sequence[Dim], old: Sequence[Size], new: Sequence[Size], space: Space) -> Map:
    """A sliced dimension may stay what it is, or become part of a larger one; whole ones beside it are dealt out."""
    if any(same(size, 1) and (d.axes or not same(d.start, 0)) for d, size in zip(dims, old, strict=True)):
        raise NotAffine("a slice is reshaped")
    wide = [(d, size) for d, size in zip(dims, old, strict=True) if not same(size, 1)]
    kept = [s for s in new if not same(s, 1)]
    groups = matching_groups([size for _, size in wide], kept)
    if groups is None:
        raise NotAffine("a slice is reshaped")
    result: list[Dim] = []
    for left, right in groups:
        run = [wide[i] for i in left]
        if len(right) == 1:
            result.append(_joined(run, space))
        elif all(_whole(d, size, space) for d, size in run):
            result += regroup([d for d, _ in run], [size for _, size in run], [kept[i] for i in right], space)
        else:
            raise NotAffine("a slice is reshaped")
    return tuple(Dim() if same(s, 1) else result.pop(0) for s in new)


def _joined(run: Sequence[tuple[Dim, Size]], space: Space) -> Dim:
    """Neighbouring dimensions, outermost first, as one. Raises NotAffine if its axes are no mixed-radix number."""
    joined, _ = run[0]
    for dim, size in run[1:]:
        start = size * joined.start + dim.start
        if not dim.axes:
            joined = Dim(joined.axes, start, size * joined.step)
        elif not joined.axes or same(size * joined.step, dim.step * product(space.sizes[a] for a in dim.axes)):
            joined = Dim((*joined.axes, *dim.axes), start, dim.step)
        else:
            raise NotAffine("a slice is reshaped")
    return joined


def axis_strides(dims: Map, stride: Sequence[Size], space: Space) -> tuple[dict[int, Size], Size]:
    """(stride of each axis, offset) in elements of a buffer with strides `stride` that is read through `dims`."""
    strides: dict[int, Size] = {}
    offset: Size = 0
    for dim, step in zip(dims, stride, strict=True):
        offset = offset + step * dim.start
        scale = step * dim.step
        for axis in reversed(dim.axes):
            strides[axis] = strides.get(axis, 0) + scale
            scale = scale * space.sizes[axis]
    return strides, int(offset) if isinstance(offset, sympy.Integer) else offset
