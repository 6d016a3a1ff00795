"""Which matrices are split into halves, that products share them, and what a training step keeps of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fusewright.fusion.plan import Encode, FusionPlan, Region, View
from fusewright.ir.encoding import Halves
from fusewright.ir.graph import Graph, Node
from fusewright.ir.rules import check as check_rules
from graphs import check, planned

M, K, N = 16, 24, 40


class Costs:
    """Products of at least `least` k gain one second, less `registers` where they round their right operand in
    registers; splits take `share` seconds an element. tf32: it is allowed."""

    def __init__(
        self, planes: int = 2, least: int = 0, share: float = 0.0, registers: float = math.inf, tf32: bool = False
    ) -> None:
        self.planes, self.least, self.share, self.longer, self.tf32 = planes, least, share, registers, tf32

    def gain(self, m: float, n: float, k: float, direct: int) -> float:
        return 1.0 if k >= self.least else -1.0

    def registers(self, m: float, n: float, k: float) -> float:
        return self.longer

    def split(self, elements: float) -> float:
        return self.share * elements


def leaf(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape).requires_grad_(grad)


def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(F.linear(x, w), 0.1)


def tower(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    for w in weights:
        x = linear(x, w)
    return x


def split(plan: FusionPlan) -> list[tuple[str, ...]]:
    """The buffers that each step of the plan splits."""
    return [tuple(m.buffer for m in e.matrices) for e in plan.encodes]


def plans(function: Callable[..., Any], *inputs: torch.Tensor, costs: Costs | None = None) -> list[FusionPlan]:
    return check(function, *inputs, tolerance=1e-4, capabilities=costs or Costs()).plans


def test_one_split_of_each_matrix_serves_a_training_step() -> None:
    forward, backward = plans(linear, leaf(M, K), leaf(N, K))
    assert len(forward.encodes) == 1 and len(forward.encodes[0].matrices) == 2  # x and w, together
    assert len(backward.encodes) == 1 and len(backward.encodes[0].matrices) == 1  # the gradient alone
    kept = [e.buffer for r in forward.regions if r.gemm for e in r.gemm.encoded or ()]
    assert {o.buffer for o in forward.outputs if isinstance(o, View)} >= set(kept)
    assert all(r.gemm.encoded for r in backward.regions if r.gemm)


def test_a_tower_splits_every_activation_once() -> None:
    forward, backward = plans(tower, leaf(M, K), leaf(N, K), leaf(K, N))
    assert [len(s) for s in split(forward)] == [2, 2]  # x and a weight; the activation and the other
    assert [len(s) for s in split(backward)] == [1, 1]  # the two gradients
    order = [type(s) for s in forward.steps]
    assert order == [Encode, Region, Encode, Region]  # each just before it is read


@pytest.mark.parametrize("wanted", ["x", "w"])
def test_partial_gradients(wanted: str) -> None:
    forward, backward = plans(linear, leaf(M, K, grad=wanted == "x"), leaf(N, K, grad=wanted == "w"))
    assert [len(s) for s in split(forward)] == [2] and [len(s) for s in split(backward)] == [1]
    (region,) = (r for r in backward.regions if r.gemm)
    assert region.gemm is not None and region.gemm.encoded is not None


def test_the_primal_is_kept_too() -> None:
    """The patch reads it."""
    _, backward = plans(tower, leaf(M, K), leaf(N, K), leaf(K, N))
    for region in backward.regions:
        if region.gemm:
            assert {region.gemm.a.buffer, region.gemm.b.buffer} <= set(region.reads())
            assert all(e.buffer in region.reads() for e in region.gemm.encoded or ())


def test_what_only_backward_reads_is_split_there() -> None:
    """The forward sums over too few products to gain anything; the input's gradient sums over many."""
    forward, backward = plans(linear, leaf(M, K), leaf(N, K, grad=False), costs=Costs(least=N))
    assert not forward.encodes
    assert [len(s) for s in split(backward)] == [2]


def test_splits_are_shared_by_products_that_could_not_pay_for_them_alone() -> None:
    x, weights = torch.randn(M, K), [torch.randn(N, K) for _ in range(3)]

    def several(x: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
        return [F.linear(x, w) for w in weights]

    costs = Costs(share=0.9 / (N * K))  # a weight takes .9 s, x .36
    (alone,) = plans(linear, x, weights[0], costs=costs)
    (shared,) = plans(several, x, *weights, costs=costs)
    (four,) = plans(several, x, *weights, torch.randn(N, K), costs=costs)
    assert not alone.encodes and not shared.encodes  # 3 · (1 - .9) < .36
    assert sum(len(s) for s in split(four)) == 5


@pytest.mark.parametrize("turned", [False, True])
def test_either_major_and_any_view(turned: bool) -> None:
    x = torch.randn(K, M).T if turned else torch.randn(M, K)
    (plan,) = plans(lambda x, w: (x @ w, x.T @ x), x, torch.randn(K, N))
    encodings = [e for r in plan.regions if r.gemm for e in r.gemm.encoded or ()]
    assert len({e.buffer for e in encodings}) == 2
    assert Halves(*((K, M) if turned else (M, K)), 2) in [e.halves for e in encodings]
    (three,) = plans(lambda x, w: F.linear(x, w), torch.randn(2, M, K), torch.randn(N, K))
    assert Halves(2 * M, K, 2, by_line=True) in [r.halves for e in three.encodes for r in e.results]


def test_matrices_without_contiguous_lines_and_vectors_are_not_split() -> None:
    for x, w in (
        (torch.randn(M, 2 * K)[:, ::2], torch.randn(N, K)),
        (torch.randn(1, K), torch.randn(N, K)),
        (torch.randn(1, K).expand(M, K), torch.randn(N, K)),
        (torch.randn(M, K).double(), torch.randn(N, K).double()),
        (torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16()),
    ):
        call, record = planned(linear, Costs())
        call(x, w)
        assert not record.plans[0].encodes


def encoded_graph() -> Graph:
    from fusewright.passes.format import encode_operands

    call, record = planned(linear)
    call(torch.randn(M, K), torch.randn(N, K))
    return encode_operands(record.graphs[0], Costs())


def test_an_encoding_of_something_else_is_illegal() -> None:
    graph = encoded_graph()
    check_rules(graph)
    (matmul,) = (n for n in graph.nodes() if n.op == "matmul")
    a, b, first, second = matmul.inputs
    for inputs, changes in (
        ((a, b, second, first), {}),
        ((a, b, first), {}),
        ((a, b, first, second), {"planes": (1, 1)}),
        ((a, b, first, second), {"transposed": (False, False)}),
        ((a, b, first, second), {"planes": (2, 0)}),
        ((a, b, first, second), {"planes": (0, 2)}),
        ((a, b, first, second), {"by_line": (True, False)}),
        ((a, b, first, second), {"by_line": (False, False)}),
    ):
        attributes = {**dict(matmul.attributes), **changes}
        broken = Node("matmul", inputs, tuple(sorted(attributes.items())), matmul.type)
        with pytest.raises(AssertionError, match="matmul"):
            check_rules(Graph(graph.inputs, (broken,)))


def test_frozen_parameters_cost_nothing_and_have_steps_of_their_own() -> None:
    from fusewright import compiler

    call, record = planned(linear)
    call(torch.randn(M, K), torch.randn(N, K))
    costs = Costs(share=0.9 / (N * K))
    assert not compiler.plan(record.graphs[0], (), costs).encodes
    plan = compiler.plan(record.graphs[0], (), costs, kept=(1,))
    assert [(split, kept) for split, kept in zip(split(plan), [e.kept for e in plan.encodes], strict=True)] == [
        (("x1",), False),
        (("x2",), True),
    ]


# ---- Exponents by line


def by_line(plan: FusionPlan) -> dict[str, bool]:
    """Whether each split matrix has exponents by line."""
    return {m.buffer: r.halves.by_line for e in plan.encodes for m, r in zip(e.matrices, e.results, strict=True)}


def test_lines_have_exponents_in_inference() -> None:
    (plan,) = plans(linear, torch.randn(M, K), torch.randn(N, K))
    assert by_line(plan) == {"x1": True, "x2": True}
    words = [plan.buffers[r.buffer].shape[0] for e in plan.encodes for r in e.results]
    assert words == [64 * M + M, 64 * N + N]  # two planes of lines of 128 bytes, and magnitudes
    (plan,) = plans(tower, torch.randn(M, K), torch.randn(N, K), torch.randn(K, N))
    assert len(by_line(plan)) == 4 and all(by_line(plan).values())


def test_a_training_step_reads_its_matrices_either_way_round() -> None:
    for plan in plans(linear, leaf(M, K), leaf(N, K)):
        assert not any(by_line(plan).values())


def test_without_the_weights_gradient_all_but_the_weight_is_read_along_its_lines() -> None:
    forward, backward = plans(linear, leaf(M, K), leaf(N, K, grad=False))
    assert by_line(forward) == {"x1": True, "x2": False}
    assert list(by_line(backward).values()) == [True]
    (region,) = (r for r in backward.regions if r.gemm)
    assert region.gemm and [e.halves.by_line for e in region.gemm.encoded or ()] == [True, False]


def test_one_product_across_the_lines_is_enough_for_a_common_exponent() -> None:
    x, w, y = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)
    (plan,) = plans(lambda x, w, y: (x @ w.T, y @ w), x, w, y)
    assert by_line(plan) == {"x1": True, "x2": False, "x3": True}
    (plan,) = plans(lambda x, w: x @ w, x, torch.randn(K, N))
    assert by_line(plan) == {"x1": True, "x2": False}
    (plan,) = plans(lambda x, w: x @ w, torch.randn(K, M).T, torch.randn(N, K).T)
    assert by_line(plan) == {"x1": False, "x2": True}
    (plan,) = plans(lambda x: x @ x.T, x)
    assert by_line(plan) == {"x1": True}
    (plan,) = plans(lambda x: x.T @ x, x)
    assert by_line(plan) == {"x1": False}


def test_a_product_that_is_not_split_has_no_say() -> None:
    """Here y @ w has too few products to gain from halves."""
    x, w, y = torch.randn(M, N), torch.randn(K, N), torch.randn(M, K)
    (plan,) = plans(lambda x, w, y: (x @ w.T, y @ w), x, w, y, costs=Costs(least=N))
    assert by_line(plan) == {"x1": True, "x2": True}


def test_what_is_kept_has_exponents_by_line_too() -> None:
    from fusewright import compiler

    call, record = planned(linear)
    call(torch.randn(M, K), torch.randn(N, K))
    plan = compiler.plan(record.graphs[0], (), Costs(), kept=(1,))
    assert by_line(plan) == {"x1": True, "x2": True}


# ---- Operands that are rounded in registers

# A weight's split takes a second; rounding it takes less for one product, more for two.
ROUNDED = Costs(1, share=1 / (N * K), registers=0.6)


def planes(plan: FusionPlan) -> list[tuple[int, int]]:
    """Of both operands of each product."""
    return [
        (r.gemm.encoded[0].halves.planes, r.gemm.encoded[1].halves.planes)
        for r in plan.regions
        if r.gemm and r.gemm.encoded
    ]


def test_a_weight_that_one_product_reads_is_rounded_in_registers() -> None:
    (plan,) = plans(linear, torch.randn(M, K), torch.randn(N, K), costs=ROUNDED)
    assert planes(plan) == [(1, 0)]
    (encode,) = plan.encodes  # x by line, while the weight's exponent is found
    assert [(r.halves.planes, r.halves.by_line) for r in encode.results] == [(1, True), (0, False)]
    assert plan.buffers[encode.results[1].buffer].shape == (1,)


def test_a_weight_that_several_products_read_is_split_once() -> None:
    x, y, w = torch.randn(M, K), torch.randn(M, K), torch.randn(N, K)
    (plan,) = plans(lambda x, y, w: (x @ w.T, y @ w.T), x, y, w, costs=ROUNDED)
    assert planes(plan) == [(1, 1), (1, 1)]
    assert sum(len(s) for s in split(plan)) == 3
    cheap = Costs(1, share=1 / (N * K), registers=0.4)
    (plan,) = plans(lambda x, y, w: (x @ w.T, y @ w.T), x, y, w, costs=cheap)
    assert planes(plan) == [(1, 0), (1, 0)]


@pytest.mark.parametrize(("longer", "weight"), [(0.4, 0), (0.6, 1)])
def test_of_a_training_step_the_weight_alone_may_be_rounded(longer: float, weight: int) -> None:
    """x is the right operand of the weight's gradient, but the left one of forward."""
    forward, backward = plans(linear, leaf(M, K), leaf(N, K), costs=Costs(1, share=1 / (N * K), registers=longer))
    assert planes(forward) == [(1, weight)]
    assert sorted(planes(backward)) == sorted([(1, weight), (1, 1)])
    assert [len(s) for s in split(backward)] == [1]  # what the weight's exponent is has been kept


def test_lines_must_be_copied_in_bulk() -> None:
    costs = Costs(1, share=0.5 / (N * K), registers=0.3)
    for k, weight in ((K, 0), (K + 1, 1)):
        (plan,) = plans(linear, torch.randn(M, k), torch.randn(N, k), costs=costs)
        assert planes(plan) == [(1, weight)]


def test_a_product_of_a_matrix_with_itself_has_planes() -> None:
    (plan,) = plans(lambda x: x @ x.T, torch.randn(M, K), costs=Costs(1, registers=0.0))
    assert planes(plan) == [(1, 1)]


def test_what_is_kept_is_not_rounded_again() -> None:
    from fusewright import compiler

    call, record = planned(linear)
    call(torch.randn(M, K), torch.randn(N, K))
    assert planes(compiler.plan(record.graphs[0], (), ROUNDED)) == [(1, 0)]
    assert planes(compiler.plan(record.graphs[0], (), ROUNDED, kept=(1,))) == [(1, 1)]


# ---- Floats as they lie


def as_they_lie(function: Callable[..., Any], *inputs: torch.Tensor, costs: Costs) -> list[bool]:
    """Of each product."""
    (plan,) = plans(function, *inputs, costs=costs)
    return [r.gemm.tf32 for r in plan.regions if r.gemm]


def test_where_tf32_is_allowed_lines_along_k_may_be_read_as_they_lie() -> None:
    x, w, no_gain = torch.randn(M, K), torch.randn(N, K), Costs(1, least=10**6, tf32=True)
    assert as_they_lie(linear, x, w, costs=no_gain) == [True]
    assert as_they_lie(lambda x, w: torch.relu(x @ w), x, torch.randn(K, N), costs=no_gain) == [False]
    assert as_they_lie(linear, torch.randn(M, K + 1), torch.randn(N, K + 1), costs=no_gain) == [False]
    assert as_they_lie(linear, x, w, costs=Costs(2, least=10**6)) == [False]
    assert as_they_lie(linear, x, w, costs=Costs(1, tf32=True)) == [False]  # it reads halves


def test_how_lines_are_aligned_decides() -> None:
    class Told(Costs):
        def gain(self, m: float, n: float, k: float, direct: int) -> float:
            told.append(direct)
            return -1.0

    told: list[int] = []
    for k in (32, 16, 24, 20, 21):
        plans(linear, torch.randn(M, k), torch.randn(N, k), costs=Told(1, tf32=True))
    wide = torch.randn(M, 36)[:, :32]  # lines 144 bytes apart
    plans(linear, wide, torch.randn(N, 32), costs=Told(1, tf32=True))
    assert told == [128, 64, 32, 16, 0, 16]
