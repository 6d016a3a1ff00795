"""Index maps: views of memory found by them are what torch's own views are."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewright.fusion.index import Dim, NeedsSplit, NotAffine, Space, axis_strides, regroup, source_map, with_splits
from fusewright.ir.graph import Builder, Node, contiguous
from fusewright.ir.size import divides, matching_groups, product, same

CPU = torch.device("cpu")


def factors(n: int) -> list[int]:
    return [f for f in range(1, n + 1) if n % f == 0]


@st.composite
def views(draw: st.DrawFn) -> tuple[Node, Node, torch.Tensor]:
    """(base, a chain of views of it, the same views by torch of memory that holds its own addresses)."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4)))
    builder = Builder()
    node = base = builder.node("input", (), contiguous(shape, torch.int64, CPU), index=0)
    value = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    for _ in range(draw(st.integers(1, 4))):
        old = node.tensor.shape
        kind = draw(st.sampled_from(["permute", "reshape", "expand", "slice"]))
        if kind == "permute":
            dims = tuple(draw(st.permutations(range(len(old)))))
            node, value = builder.permute(node, dims), value.permute(dims)
        elif kind == "reshape":
            new, rest = [], value.numel()
            while rest > 1 and len(new) < 4:
                new.append(draw(st.sampled_from(factors(rest))))
                rest //= new[-1]
            new.append(rest)
            node, value = builder.reshape(node, new), value.reshape(new)
        elif kind == "expand":
            wide = (*draw(st.sampled_from([(), (2,)])), *(draw(st.sampled_from([1, 3])) if n == 1 else n for n in old))
            node, value = builder.expand(node, wide), value.expand(wide)
        else:
            dim = draw(st.integers(0, len(old) - 1))
            start, step = draw(st.integers(0, old[dim] - 1)), draw(st.integers(1, 2))
            value = value[(slice(None),) * dim + (slice(start, None, step),)]
            sliced = contiguous(value.shape, torch.int64, CPU)
            node = builder.view("slice", node, sliced, dim=dim, start=start, step=step)
    return base, node, value


@settings(max_examples=300, deadline=None, derandomize=True)
@given(views())
def test_addresses_through_views(case: tuple[Node, Node, torch.Tensor]) -> None:
    base, node, value = case

    def addresses(space: Space) -> torch.Tensor:
        dims, at = space.identity(), node
        while at is not base:
            dims, at = source_map(at, dims, space), at.inputs[0]
        strides, offset = axis_strides(dims, base.tensor.stride, space)
        result = torch.full([space.sizes[a] for a in space.axes()], offset)
        for position, axis in enumerate(space.axes()):
            steps = torch.arange(space.sizes[axis]) * strides.get(axis, 0)
            result += steps.reshape(-1, *[1] * (len(space.axes()) - 1 - position))
        return result.reshape(node.tensor.shape)

    try:
        found = with_splits(node.tensor.shape, addresses)
    except NotAffine:
        return  # checked below: simple chains are never refused
    assert torch.equal(found, value)


@pytest.mark.parametrize(
    ("old", "new"),
    [((6, 4), (24,)), ((24,), (2, 3, 4)), ((2, 12), (6, 4)), ((2, 3, 4), (6, 2, 2)), ((4, 1), (1, 4)), ((1,), ())],
)
def test_reshapes_of_whole_values_always_have_a_map(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    builder = Builder()
    x = builder.node("input", (), contiguous(old, torch.int64, CPU), index=0)
    view = builder.reshape(x, new)
    with_splits(new, lambda space: source_map(view, space.identity(), space))


def test_an_axis_is_split_only_where_it_may_be() -> None:
    builder = Builder()
    view = builder.reshape(builder.node("input", (), contiguous((3, 4), torch.int64, CPU), index=0), (12,))
    with pytest.raises(NotAffine, match="column"):
        with_splits((12,), lambda space: source_map(view, space.identity(), space), frozenset({0}))
    with pytest.raises(NeedsSplit):
        regroup((Dim((0,)),), (12,), (3, 4), Space.of((12,)))


@pytest.mark.parametrize(
    ("dims", "old", "new", "message"),
    [
        ((Dim((0,)),), (6,), (4,), "mixes"),
        ((Dim((0,), 1, 2),), (6,), (2, 3), "slice"),
        ((Dim((0,)), Dim((), 2)), (6, 4), (3, 8), "slice"),
        ((Dim((0,)), Dim((), 1), Dim((0,))), (6, 4, 6), (144,), "slice"),
    ],
)
def test_refusals_say_why(dims: Any, old: Any, new: Any, message: str) -> None:
    with pytest.raises(NotAffine, match=message):
        regroup(dims, old, new, Space.of((6,)))


@pytest.mark.parametrize(
    ("dims", "old", "new", "expected"),
    [
        ((Dim(), Dim((0,))), (4, 6), (24,), (Dim((0,)),)),
        ((Dim((), 3), Dim((0,))), (4, 6), (24,), (Dim((0,), 18),)),
        ((Dim((0,)), Dim((), 3)), (6, 4), (1, 24), (Dim(), Dim((0,), 3, 4))),
        ((Dim((), 1), Dim((0,))), (4, 6), (4, 1, 6), (Dim((), 1), Dim(), Dim((0,)))),
    ],
)
def test_one_of_a_larger_dimension_is_reshaped(dims: Any, old: Any, new: Any, expected: Any) -> None:
    assert regroup(dims, old, new, Space.of((6,))) == expected


def test_symbolic_sizes() -> None:
    b, t = sympy.symbols("b t", integer=True, positive=True)
    assert same(b * t, t * b)
    assert not same(b, t)
    assert divides(t, b * t) == b
    assert divides(2, 4 * b) == 2 * b
    assert divides(4, 2 * b) is None
    assert divides(1, b) == b
    builder = Builder()
    x = builder.node("input", (), contiguous((b, t, 8), torch.int64, CPU), index=0)
    view = builder.reshape(x, (b * t, 8))
    strides = with_splits(
        (b * t, 8),
        lambda space: axis_strides(source_map(view, space.identity(), space), x.tensor.stride, space),
    )
    assert set(strides[0].values()) == {1, 8, 8 * t}


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_matching_groups(a: list[int], b: list[int]) -> None:
    groups = matching_groups(a, b)
    if product(a) != product(b):
        return
    assert groups is not None
    assert [i for left, _ in groups for i in left] == list(range(len(a)))
    assert [j for _, right in groups for j in right] == list(range(len(b)))
    assert all(product(a[i] for i in left) == product(b[j] for j in right) for left, right in groups)
