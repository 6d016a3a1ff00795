"""Operators that a formula alone does not say, against eager through their plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graphs import check, planned_module

SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.5, -70000.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_nan_to_num_takes_the_limits_of_the_results_dtype(dtype: torch.dtype) -> None:
    x = torch.tensor(SPECIAL if dtype.is_floating_point else [0, 3, -7], dtype=torch.float64).to(dtype)
    record = check(lambda x: (torch.nan_to_num(x), torch.nan_to_num(x, nan=2.0, posinf=3.0, neginf=-4.0)), x)
    assert not record.fallbacks


@pytest.mark.parametrize(
    "told",
    [
        lambda y: y == y.amax(0),
        lambda y: torch.eq(y[:, None], torch.sort(y)[0]),
        lambda y: torch.where(y == 0, torch.ones_like(y), y),
        lambda y: torch.where(torch.isinf(y), torch.full_like(y, 65504.0), y),
        torch.isfinite,
        torch.nan_to_num,
        lambda y: y.bool(),
        torch.logical_not,
        lambda y: y.float() <= y,
        lambda y: torch.isinf(y.float().t()),
    ],
)
def test_what_tells_the_least_difference_reads_values_as_eager_stores_them(told: Any) -> None:
    """Squares that have more digits in float32, and there are neither infinite nor 0."""
    run, _ = planned_module(lambda x: told(x * x))
    x = torch.cat((torch.linspace(1, 2, 30), torch.tensor([300.0, 1e-4]))).half()
    for part in (x[:30], x):
        assert torch.equal(run(part), told(part * part))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradient_of_smooth_l1_keeps_nan(reduction: str) -> None:
    x = torch.tensor(SPECIAL, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(len(SPECIAL), dtype=torch.float64, requires_grad=True)
    record = check(lambda x, y: F.smooth_l1_loss(x, y, reduction=reduction, beta=0.5), x, y)
    assert not record.fallbacks


def test_filled_tensors() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    record = check(lambda x: (x + torch.full_like(x, 2), torch.zeros_like(x).fill_(3) * x), x)
    assert not record.fallbacks


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_numbers_that_the_model_makes_tensors_of(dtype: torch.dtype) -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        number = torch.tensor(1.5).to(dtype)
        return x * number, torch.where(x > 0, x, number), x + torch.tensor(2)

    run, record = planned_module(model)
    x = torch.randn(3, 4)
    torch.testing.assert_close(run(x), model(x), rtol=0, atol=0)
    assert not record.fallbacks


def test_tensors_that_the_model_holds() -> None:
    run, record = planned_module(lambda x: x * torch.tensor([1.0, 2.0, 3.0]) + 1)
    x = torch.randn(4, 3)
    torch.testing.assert_close(run(x), x * torch.tensor([1.0, 2.0, 3.0]) + 1)
    assert len(record.plans[0].regions) >= 1


@pytest.mark.parametrize("cut", [lambda x: x.split([1, 3], -1)[1], lambda x: x.chunk(2)[1], lambda x: x.unbind(1)[1]])
@pytest.mark.parametrize("turned", [False, True])
def test_pieces_of_an_input_lie_in_it(cut: Any, turned: bool) -> None:
    x = torch.randn(4, 1, dtype=torch.float64).expand(4, 4)
    x = (x.t() if turned else x).requires_grad_()
    check(lambda x: (cut(x), x * 2), x)


def test_neighbours_of_16_bit_floats_are_left_to_aten() -> None:
    x = torch.tensor([1.0, -2.0, 0.0], dtype=torch.bfloat16)
    run, record = planned_module(lambda x: torch.nextafter(x, x + 1) * 2)
    torch.testing.assert_close(run(x), torch.nextafter(x, x + 1) * 2, rtol=0, atol=0)
    assert [f.split(":")[0] for f in record.fallbacks] == ["nextafter"]
