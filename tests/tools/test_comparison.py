"""What the judge lets pass and what it does not, tensor by tensor."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fusewright.tools.comparison import EVERY_ELEMENT, FLOORS, Judge, luck, measure, misses, same_bits


def judged(candidate: Tensor, eager: Tensor, oracle: Tensor | None, name: str = "output") -> tuple[str, ...]:
    judge = Judge(EVERY_ELEMENT)
    judge.add({name: candidate}, {name: eager}, {} if oracle is None else {name: oracle})
    return judge.verdict().problems


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_error(exact: Tensor, relative: float, seed: int = 1) -> Tensor:
    return (exact * (1 + relative * drawn(*exact.shape, seed=seed))).float()


def test_measure_is_as_defined() -> None:
    exact = torch.tensor([1.0, -2.0, 4.0, 0.0], dtype=torch.float64)
    found = measure(exact + torch.tensor([0.1, -0.2, 0.4, 0.0]), exact, torch.float32).figures
    rms = math.sqrt(21 / 4)
    assert found["frobenius"] == pytest.approx(0.1)
    assert found["median"] == pytest.approx(0.1)
    assert found["bias"] == pytest.approx(0.1)
    assert found["maximum"] == found["p99.9"] == pytest.approx(0.4 / (4 + rms))
    assert measure(exact + torch.tensor([0.1, 0.2, 0.4, 0.0]), exact, torch.float32).figures["bias"] < 0.1


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (40, 11), (300, 200)])
def test_equally_good_results_pass(shape: tuple[int, ...], seed: int) -> None:
    exact = drawn(*shape, seed=100 + seed)
    assert judged(with_error(exact, 3e-7, seed), with_error(exact, 3e-7, 50 + seed), exact) == ()


@pytest.mark.parametrize("factor", [1.5, 10.0])
def test_worse_results_fail(factor: float) -> None:
    exact = drawn(300, 200)
    assert judged(with_error(exact, 5e-7 * factor, 1), with_error(exact, 5e-7, 2), exact)


def test_ratio_to_eager_is_reported() -> None:
    exact, judge = drawn(300, 200), Judge()
    judge.add({"y": with_error(exact, 1e-5, 1)}, {"y": with_error(exact, 5e-6, 2)}, {"y": exact})
    assert judge.verdict().figures["frobenius"] == pytest.approx(2, rel=0.05)


def test_one_wrong_element_of_many_fails() -> None:
    exact = drawn(300, 200)
    candidate = with_error(exact, 1e-7, 1)
    candidate[-1, -1] += 1e-3
    assert any("maximum" in problem for problem in judged(candidate, with_error(exact, 1e-7, 2), exact))


def test_small_drift_fails() -> None:
    exact = drawn(300, 200)
    drift = with_error(exact * (1 - 2e-6), 2e-6, 1)
    assert any("bias" in problem for problem in judged(drift, with_error(exact, 3e-6, 2), exact))


@pytest.mark.parametrize("oracle", [True, False])
def test_zero_is_no_answer(oracle: bool) -> None:
    exact = drawn(30, 20)
    for eager in (exact.float(), with_error(exact, 5.0)):
        assert judged(torch.zeros(30, 20), eager, exact if oracle else None)


def test_noise_around_zero_is_judged_by_its_ratio() -> None:
    exact, noise = drawn(500) * 1e-16, drawn(500, seed=3).float() * 1e-8
    assert judged(drawn(500, seed=4).float() * 1e-8, noise, exact) == ()
    assert judged(drawn(500, seed=4).float() * 1e-7, noise, exact)


def test_zero_where_zero_is_right() -> None:
    zero = torch.zeros(5, 5)
    assert judged(zero, zero, zero.double()) == ()
    assert judged(zero + 1e-30, zero, zero.double())


def test_underflow_may_be_rounded_otherwise() -> None:
    exact = drawn(50, 50) * 2.0**-24
    half = exact.half()
    next_to_it = torch.where(half == 0, half, half + torch.finfo(torch.float16).smallest_normal * 2.0**-10)
    assert judged(exact.float().half(), half, exact) == ()
    assert judged(next_to_it * 4, half, exact)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_classes_are_eagers(special: float) -> None:
    exact = drawn(4, 4)
    eager = exact.float()
    eager[1, 2] = special
    marked = exact.clone()
    marked[1, 2] = special
    assert judged(eager.clone(), eager, marked) == ()
    for other in {0.0, math.nan, math.inf, -math.inf} - {special}:
        wrong = eager.clone()
        wrong[1, 2] = other
        if not (math.isnan(special) and math.isnan(other)):
            assert any("[1, 2]" in problem for problem in judged(wrong, eager, marked))


def test_an_overflow_that_only_eager_has_may_be_avoided() -> None:
    exact = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    eager = torch.tensor([1.0, math.inf, 3.0])
    assert judged(exact.float(), eager, exact) == ()
    assert judged(torch.tensor([1.0, 0.0, 3.0]), eager, exact)


def test_integers_are_exact() -> None:
    exact = torch.arange(10)
    assert judged(exact.clone(), exact, exact) == ()
    assert judged(exact + (exact == 3), exact, exact)
    assert judged((exact > 3), (exact > 4), exact > 4)


def test_kinds() -> None:
    exact = drawn(3, 4)
    assert "dtype" in judged(exact, exact.float(), exact)[0]
    assert "shape" in judged(exact.float()[:2], exact.float(), exact)[0]
    judge = Judge()
    judge.add({"gradient of x": None}, {"gradient of x": exact.float(), "output": exact.float()}, {})
    assert len(judge.verdict().problems) == 2


def test_without_an_oracle_eager_serves_at_the_fields_tolerance() -> None:
    exact = drawn(30, 20)
    assert judged(with_error(exact, 1e-5), exact.float(), None) == ()
    assert judged(with_error(exact, 1e-3), exact.float(), None)


def test_a_broadcast_row_counts_once() -> None:
    assert measure(drawn(500).expand(100, 500).reshape(-1), drawn(500).repeat(100), torch.float32).count == 500
    assert measure(drawn(9000), drawn(9000), torch.float32).count == 9000


def test_luck_shrinks_with_the_sample() -> None:
    for metric in FLOORS:
        few, many = luck(metric, 100), luck(metric, 10**7)
        assert many < few
        assert many < (0.5 if metric == "maximum" else 0.02)


def test_misses_of_what_is_no_float() -> None:
    """Booleans cannot be subtracted, and 0 - 1 is 255 in bytes."""
    no, yes = torch.tensor(False), torch.tensor(True)
    assert misses(yes, no, no) == 1 and misses(yes, no, yes) == 0
    candidate, eager, exact = torch.tensor([0, 3, 1], dtype=torch.uint8)
    assert misses(candidate, eager, exact) == 0 and misses(eager, candidate, exact) == 1


def test_misses_count_only_where_eager_is_nearer() -> None:
    exact = torch.full((4,), 100.0, dtype=torch.float64)
    eager, candidate = torch.full((4,), 100.03), torch.full((4,), 100.0)
    assert misses(candidate, eager, exact) == 0
    assert misses(candidate, eager, None) == 4
    assert misses(eager, candidate, exact) == 4


def test_same_bits() -> None:
    nan = torch.tensor([math.nan, 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.ones(2), torch.ones(2).double())
    transposed = drawn(3, 4).T
    assert same_bits(transposed, transposed.contiguous())


def test_where_masks_flip_only_the_bulk_can_be_compared() -> None:
    """Two results of which neither is better: each one's mask comes from a pre-activation with an error of the same
    size. A flipped bit moves a gradient by a million times its rounding error, in a direction that is luck."""
    unlucky = 0
    for seed in range(10):
        x, z, incoming = drawn(512, 64, seed=seed), drawn(512, 256, seed=100 + seed), drawn(512, 256, seed=200 + seed)

        def gradient(z: Tensor, rounding: int, incoming: Tensor = incoming, x: Tensor = x) -> Tensor:
            return with_error(torch.where(z > 0, incoming, 0.1 * incoming).T @ x, 1e-6, rounding)

        found = [gradient(z + 1e-4 * drawn(512, 256, seed=300 + 2 * seed + i), 2 * seed + i) for i in range(2)]
        exact = torch.where(z > 0, incoming, 0.1 * incoming).T @ x
        assert judged(gradient(z, 50), gradient(z, 51), exact) == ()
        unlucky += judged(found[0], found[1], exact) != ()
        bulk = Judge()
        bulk.add({"gradient of w": found[0]}, {"gradient of w": found[1]}, {"gradient of w": exact})
        assert bulk.verdict().problems == ()
    assert unlucky >= 3
