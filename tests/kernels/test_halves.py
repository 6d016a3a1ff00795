"""Products by halves in the simulator, as they are launched: split, multiply, patch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func
from torch import Tensor

from fusewright import compiler
from fusewright.capture.backend import decompositions
from fusewright.capture.fx import from_fx
from fusewright.capture.joint import partition_joint
from fusewright.chip import CHIPS
from fusewright.kernels.choose import candidates
from fusewright.kernels.gemm_sm90 import HalfProducts
from fusewright.runtime.executable import Executable
from fusewright.runtime.target import SimulatorTarget

M, N, K = 24, 40, 136


class Always(HalfProducts):
    """Reads halves wherever it can, whatever would be faster."""

    def gain(self, m: float, n: float, k: float, direct: int) -> float:
        return 1.0

    def split(self, elements: float) -> float:
        return 0.0


class Rounded(Always):
    """And rounds right operands in registers."""

    def registers(self, m: float, n: float, k: float) -> float:
        return 0.0

    def split(self, elements: float) -> float:
        return 1e-3


def simulated(function: Callable[..., Any], rounded: bool = False, variant: str = "") -> Callable[..., Any]:
    """variant: of the tile, else the one that is thought to be the fastest."""
    target, device = SimulatorTarget(CHIPS["sm_90a"]), torch.device("cpu")
    always = (Rounded if rounded else Always)(target.chip, rounded, library=False)

    def compile_fx(module: torch.fx.GraphModule, inputs: Sequence[Any], capabilities: Any = None) -> Any:
        plan = compiler.plan(from_fx(module), (), capabilities)
        if rounded:
            assert all(r.gemm.encoded[1].halves.planes == 0 for r in plan.regions if r.gemm)
        found = candidates(plan, target.chip, library=False, tensor_maps=True)
        programs = {n: next((p for p in several if p.variant == variant), several[0]) for n, several in found.items()}
        assert not variant or any(p.variant == variant for p in programs.values())
        assert all(programs[r.name].family == "gemm_sm90" for r in plan.regions if r.gemm)
        return make_boxed_func(Executable(plan, programs, target, device))

    return aot_function(
        function,
        fw_compiler=compile_fx,
        inference_compiler=partial(compile_fx, capabilities=always),
        partition_fn=partial(partition_joint, capabilities=always),
        decompositions=decompositions(),
    )


@pytest.fixture(scope="module")
def product() -> Callable[[Tensor, Tensor], Tensor]:
    return simulated(torch.matmul)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def rounded() -> Callable[[Tensor, Tensor], Tensor]:
    """Of w, whose columns are rows to it, read across k."""
    return simulated(torch.matmul, rounded=True)  # type: ignore[no-any-return]


def error(found: Tensor, x: Tensor, w: Tensor) -> float:
    """The largest componentwise one, relative to |x| · |w|."""
    exact, size = x.double() @ w.double(), x.double().abs() @ w.double().abs()
    return float(((found.double() - exact).abs() / size).max())


def operands() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(M, K), torch.randn(K, N)


def test_more_accurate_than_float32_sums(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, w = operands()
    assert error(product(x, w), x, w) < 1.5e-7


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_special_values_reach_what_they_reach(product: Callable[[Tensor, Tensor], Tensor], value: float) -> None:
    x, w = operands()
    x[5, 7] = value
    found = product(x, w)
    assert torch.equal(found.isfinite(), (x @ w).isfinite())
    rest = [i for i in range(M) if i != 5]
    assert error(found[rest], x[rest], w) < 5e-7


def huge_row(x: Tensor, w: Tensor) -> None:
    x[3] *= 2.0**60


def tiny_column(x: Tensor, w: Tensor) -> None:
    w[:, 9] *= 2.0**-60


def opposed(x: Tensor, w: Tensor) -> None:
    """Large values of one operand meet small ones of the other throughout."""
    powers = torch.exp2(torch.randint(0, 41, (K,)).float())
    x *= powers
    w /= powers[:, None]


def opposed_column(x: Tensor, w: Tensor) -> None:
    """In one column alone: every row of results looks sound."""
    powers = torch.exp2(torch.randint(0, 41, (K,)).float())
    x *= powers
    w[:, 5] /= powers


@pytest.mark.parametrize("change", [huge_row, tiny_column, opposed, opposed_column])
def test_what_halves_cannot_hold_is_computed_again(
    product: Callable[[Tensor, Tensor], Tensor], change: Callable[[Tensor, Tensor], None]
) -> None:
    x, w = operands()
    change(x, w)
    assert error(product(x, w), x, w) < 1e-6  # without: 2e-4 and more


@pytest.fixture(scope="module")
def by_line() -> Callable[[Tensor, Tensor], Tensor]:
    """Of x and of w's transpose, each of whose lines has its own exponent."""
    return simulated(torch.nn.functional.linear)  # type: ignore[no-any-return]


def test_lines_of_any_magnitude_keep_their_accuracy(by_line: Callable[[Tensor, Tensor], Tensor]) -> None:
    """As float32 sums cannot: they are not computed again."""
    x, w = operands()
    x *= torch.exp2(torch.randint(-60, 61, (M, 1)).float())
    w *= torch.exp2(torch.randint(-60, 61, (N,)).float())
    x[7], w[:, 11] = 0, 0
    found = by_line(x, w.T.contiguous())
    sound = (x @ w) != 0
    exact, size = x.double() @ w.double(), x.double().abs() @ w.double().abs()
    assert float(((found.double() - exact).abs() / size)[sound].max()) < 1.5e-7
    assert not found[7].any() and not found[:, 11].any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_special_values_of_a_line_reach_what_they_reach(
    by_line: Callable[[Tensor, Tensor], Tensor], value: float
) -> None:
    x, w = operands()
    x[5, 7], w[9, 3] = value, value
    found, expected = by_line(x, w.T.contiguous()), x @ w
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf() & (found > 0), expected == math.inf)
    sound = expected.isfinite()
    exact, size = x.double() @ w.double(), x.double().abs() @ w.double().abs()
    assert float(((found.double() - exact).abs() / size)[sound].max()) < 5e-7


def tiny_values(x: Tensor, w: Tensor) -> None:
    """Lines that no exponent brings into the halves' range, and one that the largest just does."""
    x[3], x[4] = x[3].sign() * 2.0**-148, x[4].sign() * 2.0**-139


def a_giant_meets_zeros(x: Tensor, w: Tensor) -> None:
    """A result is then what the halves of the rest, beside the giant, do not hold."""
    x[6, 20], w[20, ::2] = 1e20, 0


@pytest.mark.parametrize("change", [opposed, opposed_column, tiny_values, a_giant_meets_zeros])
def test_what_the_halves_of_lines_cannot_hold_is_computed_again(
    by_line: Callable[[Tensor, Tensor], Tensor], change: Callable[[Tensor, Tensor], None]
) -> None:
    x, w = operands()
    change(x, w)
    w = w * 2.0**60 if change is tiny_values else w
    assert error(by_line(x, w.T.contiguous()), x, w) < 1e-6


def test_a_tile_is_patched_where_any_of_the_products_below_it_lost_bits() -> None:
    """The patch has tiles of 128 columns; this column is in the second of the product's."""
    for variant in ("128×64×64", "128×96×64"):
        product = simulated(torch.matmul, variant=variant)
        x, w = torch.randn(M, K), torch.randn(K, 192)
        powers = torch.exp2(torch.randint(0, 41, (K,)).float())
        x *= powers
        w[:, 100] /= powers
        assert error(product(x, w), x, w) < 1e-6


def infinite(x: Tensor, w: Tensor) -> None:
    w[7, 5], x[3, 7] = math.inf, 0


def huge_column(x: Tensor, w: Tensor) -> None:
    w[:, 9] *= 2.0**60


@pytest.mark.parametrize("change", [infinite, huge_column, tiny_column, opposed_column])
def test_what_is_rounded_in_registers_is_watched_too(
    rounded: Callable[[Tensor, Tensor], Tensor], change: Callable[[Tensor, Tensor], None]
) -> None:
    x, w = operands()
    change(x, w)
    found, expected = rounded(x, w), x @ w
    assert torch.equal(found.isnan(), expected.isnan())
    sound = expected.isfinite().all(0)
    assert error(found[:, sound], x, w[:, sound]) < 1e-6  # the whole tile is computed again


def test_a_column_that_is_not_a_number_needs_no_patch(rounded: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, w = operands()
    w[7, 5] = math.nan
    found = rounded(x, w)
    assert torch.equal(found.isnan(), (x @ w).isnan())
    rest = [i for i in range(N) if i != 5]
    assert 1e-6 < error(found[:, rest], x, w[:, rest]) < 5e-4


def test_rows_beside_a_weight_in_registers_have_their_own_exponents(
    rounded: Callable[[Tensor, Tensor], Tensor],
) -> None:
    x, w = operands()
    x *= torch.exp2(torch.randint(-60, 61, (M, 1)).float())
    assert 1e-6 < error(rounded(x, w), x, w) < 5e-4


def test_a_weight_read_along_k_and_one_that_is_not_aligned() -> None:
    product = simulated(torch.nn.functional.linear, rounded=True)
    x, w = operands()
    found = product(x, w.T.contiguous())
    assert 1e-6 < error(found, x, w) < 5e-4
    w[:, 9] *= 2.0**-60
    assert error(product(x, w.T.contiguous()), x, w) < 1e-6
    shifted = torch.empty(N * K + 1)[1:].view(N, K).copy_(torch.randn(N, K))
    assert error(product(x, shifted), x, shifted.T) < 1e-6  # left to the patch


def test_a_product_of_few_rows_reads_its_weight_as_it_lies() -> None:
    """Also where a split costs nothing."""
    products = HalfProducts(CHIPS["sm_90a"], tf32=False, library=False)
    assert products.gain(16, 4096, 4096, direct=128) < 0 < products.gain(1024, 4096, 4096, direct=128)
