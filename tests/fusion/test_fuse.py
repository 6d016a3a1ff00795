"""What becomes one kernel, what does not and why; every plan is evaluated against its graph and against eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusewright.fusion.levels import LONGEST_CHAIN
from fusewright.fusion.plan import Region
from graphs import Planned, check

Function = Callable[..., Any]
SETTINGS = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def kernels(record: Planned) -> list[list[str]]:
    """For each graph, what each step is: gemm, pointwise, sum (with or without stores) or the name of a fallback."""

    def kind(step: Any) -> str:
        if not isinstance(step, Region):
            return str(step.name)
        if step.gemm:
            return "gemm"
        return "pointwise" if len(step.stores) == len(step.sinks) else "sum"

    return [[kind(s) for s in p.steps] for p in record.plans]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# ---- random DAGs

UNARY: list[Function] = [
    torch.sigmoid,
    torch.tanh,
    torch.relu,
    torch.abs,
    torch.neg,
    F.gelu,
    F.silu,
    F.mish,
    F.hardswish,
    F.softplus,
    F.elu,
    lambda x: F.leaky_relu(x, -0.3),
    lambda x: torch.clamp(x, -0.7, 0.9),
    lambda x: torch.exp(-x * x),
    lambda x: x * 2.0 + 1,
    lambda x: 1 - x / 3,
]
BINARY: list[Function] = [
    torch.add,
    torch.sub,
    torch.mul,
    torch.maximum,
    torch.minimum,
    lambda a, b: torch.where(a > b, a * 0.5, b),
    lambda a, b: a / (b * b + 1),
]


@st.composite
def programs(draw: st.DrawFn) -> tuple[Function, int]:
    """A pointwise DAG: steps that apply an operator to values made before; and how many of the last are returned."""
    steps = []
    for made in range(draw(st.integers(1, 7))):
        # Value 0 is the product; the next ones are operands; one operand of each step is an earlier result.
        source = draw(st.integers(0, made))
        unary = draw(st.booleans())
        other = draw(st.integers(-len(OPERANDS), made))
        operation = draw(st.sampled_from(UNARY if unary else BINARY))
        steps.append((operation, source, None if unary else other))

    def apply(product: torch.Tensor, *operands: torch.Tensor) -> list[torch.Tensor]:
        values = [product]
        for operation, source, other in steps:
            if other is None:
                values.append(operation(values[source]))
            else:
                values.append(operation(values[source], values[other] if other >= 0 else operands[-other - 1]))
        return values

    return apply, draw(st.integers(1, 2))


OPERANDS = ["scalar", "row", "column", "tile"]


def operands(lead: tuple[int, ...], n: int) -> list[torch.Tensor]:
    return [leaf(), leaf(n), leaf(*lead, 1), leaf(*lead, n)]


@SETTINGS
@given(
    program=programs(),
    lead=st.sampled_from([(5,), (2, 3), (1,), (4, 1, 2)]),
    n=st.sampled_from([6, 1, 9]),
    after=st.sampled_from(["", "transpose", "flatten", "unsqueeze", "split rows"]),
)
def test_any_pointwise_dag_after_a_linear_is_one_kernel(
    program: tuple[Function, int], lead: tuple[int, ...], n: int, after: str
) -> None:
    apply, count = program
    views: dict[str, Function] = {
        "": lambda v: v,
        "transpose": lambda v: v.transpose(0, -1) * 1.5,
        "flatten": lambda v: v.reshape(-1, n) + 1,
        "unsqueeze": lambda v: v.unsqueeze(1) * 2,
        "split rows": lambda v: v.reshape(-1, 1, lead[-1], n) - 1,
    }

    def model(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = apply(F.linear(x, w, b), *rest)
        return tuple(views[after](v) for v in values[-count:])

    with torch.no_grad():
        inputs = [leaf(*lead, 7), leaf(n, 7), leaf(n), *operands(lead, n)]
        record = check(model, *inputs)
    assert kernels(record) == [["gemm"]]
    assert record.plans[0].refusals == ()


# Of a linear's result [..., n], n even: each keeps every element once.
VIEWS: dict[str, Function] = {
    "t": lambda v: v.flatten(0, -2).t(),
    "transpose": lambda v: v.transpose(0, -1),
    "columns": lambda v: v.view(*v.shape[:-1], 2, -1),
    "columns and rows": lambda v: v.view(1, -1, 2, v.shape[-1] // 2),
    "heads": lambda v: v.view(*v.shape[:-1], 2, -1).transpose(-2, -3),
    "turned heads": lambda v: v.view(*v.shape[:-1], -1, 2).transpose(-1, 0),
    "there and back": lambda v: v.view(*v.shape[:-1], 2, -1).transpose(-2, -3).transpose(-2, -3).flatten(-2),
}


def viewed(program: tuple[Function, int], view: str) -> Function:
    """A DAG that follows the view of a linear's result, and reads its other operands through that view too."""
    apply, count = program

    def model(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, s: torch.Tensor, *rest: torch.Tensor) -> Any:
        y = F.linear(x, w, b)
        return tuple(apply(VIEWS[view](y), s, *(VIEWS[view](r.expand_as(y)) for r in rest))[-count:])

    return model


@SETTINGS
@given(
    program=programs(),
    lead=st.sampled_from([(5,), (2, 3), (1,)]),
    n=st.sampled_from([6, 10, 16, 2]),
    view=st.sampled_from(list(VIEWS)),
    gradients=st.booleans(),
)
def test_a_pointwise_dag_after_a_view_of_a_linear_is_one_kernel(
    program: tuple[Function, int], lead: tuple[int, ...], n: int, view: str, gradients: bool
) -> None:
    inputs = [leaf(*lead, 7), leaf(n, 7), leaf(n), *operands(lead, n)]
    with torch.set_grad_enabled(gradients):
        record = check(viewed(program, view), *inputs)
    assert kernels(record)[0] == ["gemm"]
    assert record.plans[0].refusals == ()
    for backward in kernels(record)[1:]:
        assert sum(k == "gemm" for k in backward) == 2
        assert set(backward) <= {"gemm", "pointwise", "sum"}


@pytest.mark.parametrize("activation", [torch.relu, F.gelu, lambda x: F.leaky_relu(x, -0.1) * 2])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("lead", [(5,), (3, 4)])
def test_an_activation_of_a_view_is_one_kernel_forward_and_three_backward(
    activation: Function, view: str, lead: tuple[int, ...]
) -> None:
    record = check(lambda x, w, b: activation(VIEWS[view](F.linear(x, w, b))), leaf(*lead, 12), leaf(24, 12), leaf(24))
    assert kernels(record) == [["gemm"], ["sum", "gemm", "gemm"]]


@SETTINGS
@given(program=programs(), lead=st.sampled_from([(5,), (2, 3)]), n=st.sampled_from([6, 8]))
def test_gradients_of_random_dags(program: tuple[Function, int], lead: tuple[int, ...], n: int) -> None:
    apply, count = program
    inputs = [leaf(*lead, 7), leaf(n, 7), leaf(n), *operands(lead, n)]

    def model(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(apply(F.linear(x, w, b), *rest)[-count:])

    record = check(model, *inputs)
    assert kernels(record)[0] == ["gemm"]
    backward = kernels(record)[1]
    assert sum(k == "gemm" for k in backward) == 2
    assert set(backward) <= {"gemm", "pointwise", "sum"}


@SETTINGS
@given(program=programs(), shape=st.sampled_from([(5, 6), (2, 3, 4), (7,), (1, 5)]))
def test_a_pointwise_dag_without_a_product_is_one_kernel(program: tuple[Function, int], shape: tuple[int, ...]) -> None:
    apply, count = program
    with torch.no_grad():
        tensors = [leaf(*shape), leaf(), leaf(shape[-1]), leaf(*shape[:-1], 1), leaf(*shape)]
        record = check(lambda *t: tuple(apply(*t)[-count:]), *tensors)
    assert kernels(record) == [["pointwise"]]


# ---- the headline

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("lead", [(6,), (2, 3), (1,), ()])
@pytest.mark.parametrize("slope", [0.1, -0.1])
def test_headline_is_one_kernel_forward_and_three_backward(
    dtype: torch.dtype, lead: tuple[int, ...], slope: float
) -> None:
    record = check(
        lambda x, w, b: F.leaky_relu(F.linear(x, w, b) * -2.0, slope),
        *(leaf(*lead, 12, dtype=dtype), leaf(20, 12, dtype=dtype), leaf(20, dtype=dtype)),
        tolerance={2: 5e-2, 4: 1e-5, 8: 1e-9}[dtype.itemsize],
    )
    assert kernels(record) == [["gemm"], ["sum", "gemm", "gemm"]]
    saved = [b for b in record.plans[0].buffers.values() if b.dtype == torch.uint8]
    assert [b.shape[-1] for b in saved] == [3]  # 20 columns, one bit each


# ---- models

MODELS: dict[str, tuple[Function, list[tuple[int, ...]], list[str], list[str]]] = {
    # name: function, shapes of its inputs, kernels forward, kernels backward
    "column vector from a row sum": (
        lambda x, w: F.linear(x, w) * x.sum(-1, keepdim=True),
        [(6, 12), (20, 12)],
        ["sum", "gemm"],
        ["sum", "gemm", "gemm"],
    ),
    "row vectors computed inside": (
        lambda x, w, b, s: F.linear(x, w, b * s) * torch.exp(s),
        [(6, 12), (20, 12), (20,), (20,)],
        ["gemm"],
        ["sum", "pointwise", "pointwise", "gemm", "gemm"],
    ),
    "gated": (
        lambda x, w, v: F.silu(F.linear(x, w)) * F.linear(x, v),
        [(6, 12), (20, 12), (20, 12)],
        ["gemm", "gemm"],
        ["pointwise", "gemm", "gemm", "gemm", "gemm"],
    ),
    "residual": (
        lambda x, w, b, v, c: x + F.linear(F.gelu(F.linear(x, w, b)), v, c),
        [(6, 12), (20, 12), (20,), (12, 20), (12,)],
        ["gemm", "gemm"],
        ["sum", "gemm", "sum", "gemm", "gemm", "gemm"],
    ),
    "two results": (
        lambda x, w: (F.linear(x, w), F.relu(F.linear(x, w))),
        [(6, 12), (20, 12)],
        ["gemm"],
        ["pointwise", "gemm", "gemm", "gemm", "gemm"],
    ),
    "equal results": (lambda x, y: (x + y, x + y), [(6, 12), (6, 12)], ["pointwise"], ["pointwise"]),
    "a result that is an input": (lambda x, y: (x, x + y), [(6, 12), (6, 12)], ["pointwise"], []),
    "transposed operand": (
        lambda x, w: torch.mm(x.t(), w).relu(),
        [(12, 6), (12, 20)],
        ["gemm"],
        ["pointwise", "gemm", "gemm"],
    ),
    "tile read transposed": (
        lambda x, w, y: F.linear(x, w).t() + y,
        [(6, 12), (20, 12), (20, 6)],
        ["gemm"],
        ["gemm", "gemm"],
    ),
    "addmm with factors": (
        lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2),
        [(6, 12), (12, 20), (20,)],
        ["gemm"],
        ["sum", "gemm", "gemm"],
    ),
    "one column": (lambda x, w: F.linear(x, w).tanh(), [(6, 12), (1, 12)], ["gemm"], ["pointwise", "gemm", "gemm"]),
    "one element": (lambda x, w: F.linear(x, w).tanh(), [(1, 12), (1, 12)], ["gemm"], ["pointwise", "gemm", "gemm"]),
    "nothing to sum": (lambda x, w: F.linear(x, w) + 1, [(6, 0), (20, 0)], ["gemm"], ["gemm", "gemm"]),
    "empty batch": (lambda x, w: F.linear(x, w).relu(), [(0, 12), (20, 12)], ["gemm"], ["pointwise", "gemm", "gemm"]),
    "weight computed first": (
        lambda x, w: F.linear(x, w * 2).relu(),
        [(6, 12), (20, 12)],
        ["pointwise", "gemm"],
        ["pointwise", "gemm", "gemm"],
    ),
    "columns cut in two": (
        lambda x, w, s: F.linear(x, w).view(6, 4, 5) * s,
        [(6, 12), (20, 12), (4, 5)],
        ["gemm"],
        ["sum", "gemm", "gemm"],
    ),
    "a factor for each part of the columns": (
        lambda x, w, s: torch.relu(F.linear(x, w).view(6, 4, 5) * s),
        [(6, 12), (20, 12), (4, 1)],
        ["gemm", "pointwise"],
        ["sum", "gemm", "gemm"],
    ),
    "a mask of parts of the columns": (
        lambda x, w, s: torch.relu(F.linear(x, w).view(6, 4, 5) * s.detach()),
        [(6, 12), (20, 12), (4, 1)],
        ["gemm", "pointwise", "pointwise"],
        ["pointwise", "gemm", "gemm"],
    ),
    "a mask of turned parts of the columns": (
        lambda x, w, s: (F.linear(x, w).view(6, 4, 5).transpose(1, 2) * s.detach()).contiguous().relu(),
        [(6, 12), (20, 12), (4,)],
        ["gemm", "pointwise"],
        ["pointwise", "gemm", "gemm"],
    ),
    "a mask of a sum laid out in another way": (
        lambda x, w, y: torch.relu(y + F.linear(x, w).view(3, 2, 4, 5).transpose(1, 2)),
        [(6, 12), (20, 12), (3, 4, 2, 5)],
        ["gemm", "pointwise"],
        ["pointwise", "pointwise", "gemm", "gemm"],
    ),
    "summed within parts of the columns": (
        lambda x, w, b: torch.relu(F.linear(x, w, b).view(6, 2, 12)).sum(-1),
        [(6, 12), (24, 12), (24,)],
        ["gemm", "sum"],
        ["pointwise", "sum", "gemm", "gemm"],
    ),
    "a mask of one column": (
        lambda x, w: torch.relu(F.linear(x, w)[:, 1:2]),
        [(6, 12), (20, 12)],
        ["gemm", "pointwise"],
        None,
    ),
    "a mask of one column, and sums": (
        lambda x, w, v: (lambda h: (F.linear(h, v), h.sum(0), h.sum(2)))(torch.relu(F.linear(x, w)[..., 1:2])),
        [(3, 6, 12), (20, 12), (5, 1)],
        None,
        None,
    ),
    "sums of views in other orders": (
        lambda x, y: (lambda h: (h, h.t().sum(0), h.t().sum(1), h.view(2, 3, 12).transpose(0, 2).sum((1, 2))))(x * y),
        [(6, 12), (6, 12)],
        None,
        ["pointwise"],
    ),
    "laid out anew": (
        lambda x, w, b: torch.relu(F.linear(x, w, b).view(2, 3, 4, 5).transpose(1, 2).contiguous()),
        [(6, 12), (20, 12), (20,)],
        ["gemm", "pointwise"],
        ["pointwise", "sum", "gemm", "gemm"],
    ),
    "product beside its transpose": (
        lambda x, w: F.linear(x, w) + F.linear(x, w).t(),
        [(6, 12), (6, 12)],
        ["gemm", "pointwise"],
        ["gemm", "gemm", "gemm", "gemm"],
    ),
    "slices": (lambda x: x[:, 1:5] * x[:, 5:9], [(6, 12)], ["pointwise"], None),
    "slice of a product": (lambda x, w: F.linear(x, w)[:, 1:5] * 2, [(6, 12), (20, 12)], ["gemm", "pointwise"], None),
    "halves of a product": (
        lambda x, w: (lambda a, b: a * torch.sigmoid(b))(*F.linear(x, w).chunk(2, -1)),
        [(6, 12), (20, 12)],
        ["gemm", "pointwise"],
        None,
    ),
    "expanded": (lambda x, y: (x * 2).unsqueeze(0).expand(4, 6, 12) + y, [(6, 12), (4, 6, 12)], ["pointwise"], None),
    "expanded result": (lambda x: (x * 2).unsqueeze(0).expand(4, 6, 12), [(6, 12)], ["pointwise"], None),
    "outer": (lambda x, y: x[:, None] * y, [(6,), (7,)], ["pointwise"], None),
    "sums": (lambda x, y: ((x * y).sum(0), (x + y).sum(1), x - y), [(6, 12), (6, 12)], None, ["pointwise"]),
    "sum over a middle dimension": (lambda x: (x * x).sum(1), [(4, 6, 12)], None, ["pointwise"]),
    "mean": (lambda x, w: (F.linear(x, w) ** 2).mean(), [(6, 12), (20, 12)], None, ["pointwise", "gemm", "gemm"]),
    "column sum of a product": (lambda x, w: F.linear(x, w).relu().sum(0), [(6, 12), (20, 12)], ["gemm", "sum"], None),
    "product of two products": (
        lambda x, q, k: torch.sigmoid(F.linear(x, q) @ F.linear(x, k).t()),
        [(6, 12), (5, 12), (5, 12)],
        ["gemm", "gemm", "gemm"],
        None,
    ),
    "copies": (lambda x: (x.clone(), x.t().contiguous()), [(6, 12)], None, ["pointwise"]),
    "largest of a row": (lambda x, w: F.linear(x, w).amax(1), [(6, 12), (20, 12)], None, None),
    "softmax": (lambda x, w: F.softmax(F.linear(x, w), -1), [(6, 12), (20, 12)], None, None),
    "norm": (lambda x, w: F.layer_norm(F.linear(x, w), (20,)), [(6, 12), (20, 12)], None, None),
    "running sum": (lambda x, w: F.linear(x, w).cumsum(0).relu(), [(6, 12), (20, 12)], None, None),
    "batched product": (lambda x, y: torch.bmm(x, y).relu(), [(2, 6, 12), (2, 12, 5)], ["bmm", "pointwise"], None),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    function, shapes, forward, backward = MODELS[name]
    record = check(function, *(leaf(*s) for s in shapes))
    found = kernels(record)
    if forward is not None:
        assert found[0] == forward
    if backward is not None:
        assert sorted(found[1]) == sorted(backward)


@pytest.mark.parametrize(
    "name", ["a factor for each part of the columns", "slice of a product", "batched product", "mean"]
)
def test_what_is_left_apart_says_why(name: str) -> None:
    function, shapes, *_ = MODELS[name]
    plan = check(function, *(leaf(*s) for s in shapes)).plans[0]
    assert plan.refusals or plan.fallbacks
    assert all(r.reason and r.operators for r in plan.refusals)
    assert all(f.reason for f in plan.fallbacks)


def test_what_is_left_apart_is_named_as_in_the_model() -> None:
    """The first step of an activation is no operator; the activation is."""
    plan = check(lambda x, w: F.gelu(F.linear(x, w)[:, :4]), leaf(6, 12), leaf(8, 12)).plans[0]
    assert [r.operators for r in plan.refusals] == [("gelu",)]


def test_kernels_of_one_level_that_read_each_other_are_ordered() -> None:
    """Two shapes at one level, each reading the other's result: the cycle is broken by another kernel."""

    def model(x: torch.Tensor, w: torch.Tensor) -> Any:
        h = F.linear(x, w)[:, 2:6]  # leaves the product's kernel
        a = torch.exp(h)
        b = a.t().reshape(-1)[:12] * 2  # another shape, reads a
        return a, b, torch.sin(h) * b.reshape(12, 1)[:6]  # a's shape, reads b

    check(model, leaf(6, 12), leaf(8, 12))


def test_a_long_chain_is_cut() -> None:
    count = 2 * LONGEST_CHAIN + 10

    def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, w)
        for i in range(count):
            y = y + i * 1e-3
        return y

    with torch.no_grad():
        record = check(model, leaf(3, 4), leaf(5, 4))
    assert kernels(record) == [["gemm", "pointwise", "pointwise"]]
    assert "longer" in record.plans[0].refusals[0].reason


def test_integers() -> None:
    x, y = torch.randint(-9, 9, (6, 12)), torch.randint(1, 9, (6, 12))
    record = check(lambda x, y: (x + y, x // y, x % 3, x % -y, x > y, x & y, x * 1.5, (x > 0) | (y > 4)), x, y)
    assert kernels(record) == [["pointwise"]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_sum_that_is_a_result_and_is_converted_has_memory(dtype: torch.dtype) -> None:
    """As a count, which is returned and divides something."""
    x = torch.randn(4, 3, dtype=torch.float64).to(dtype)
    check(lambda x: (x.sum(0), x.sum(0).double()), x)


def test_sums_of_different_dtypes_are_apart() -> None:
    """Each kernel adds up in one type."""
    x = torch.randn(6, 12)
    several = (x.double(), x, x.double().exp(), torch.randint(2**40, (6, 12)), x.half())
    record = check(lambda *xs: [t.sum(0) for t in xs], *several)
    assert kernels(record) == [["sum", "sum", "sum"]]  # 16 bits are added up in float32
    for region in record.plans[0].regions:
        assert len({s.value.dtype for s in region.sinks}) == 1


@pytest.mark.parametrize("layout", ["transposed", "sliced", "step", "expanded", "offset"])
def test_inputs_of_any_layout(layout: str) -> None:
    make: dict[str, Function] = {
        "transposed": lambda a, b: torch.randn(b, a).t(),
        "sliced": lambda a, b: torch.randn(a, b + 3)[:, :b],
        "step": lambda a, b: torch.randn(2 * a, 2 * b)[::2, ::2],
        "expanded": lambda a, b: torch.randn(1, b).expand(a, b),
        "offset": lambda a, b: torch.randn(a * b + 5)[5:].view(a, b),
    }
    x, w, y = (make[layout](a, b).double() for a, b in ((6, 12), (20, 12), (6, 20)))
    record = check(lambda x, w, y: F.relu(F.linear(x, w) + y), x, w, y)
    assert kernels(record) == [["gemm"]]


def test_a_tower_saves_each_activation_once() -> None:
    def model(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        for w in weights:
            x = F.relu(F.linear(x, w)) + x
        return x

    record = check(model, leaf(6, 12), *(leaf(12, 12) for _ in range(6)))
    assert kernels(record)[0] == ["gemm"] * 6
    assert sorted(kernels(record)[1]) == ["gemm"] * 12 + ["pointwise"]
