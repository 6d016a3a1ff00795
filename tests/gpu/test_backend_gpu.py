"""The whole compiler on a GPU: values and gradients against float64, specials, stale weights, sizes, determinism."""

from __future__ import annotations

import copy
import math

import gpu_support as support
import pytest
import torch
from gpu_support import DTYPES, FULL, SMALL, AtenSeen, building, compiled, gradients, headline, problems, random
from torch import nn

pytestmark = pytest.mark.gpu

B, K, N = SMALL


@pytest.mark.parametrize("library", [True, False], ids=["library", "alone"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [SMALL, FULL], ids=["small", "full"])
def test_headline_is_as_accurate_as_eager(sizes: tuple[int, int, int], dtype: torch.dtype, library: bool) -> None:
    batch, inputs, outputs = sizes
    model = headline(sizes, dtype)
    call = compiled(model, library=library)
    assert problems(call, model, 2 if sizes is FULL else 5, batch, inputs, outputs) == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [SMALL, FULL], ids=["small", "full"])
def test_headline_is_one_kernel_forward_and_three_backward(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """On tensor cores a float32 product is several launches: they split its operands and patch its result."""
    model = headline(sizes, dtype)
    call = compiled(model, library=False)
    x = random(sizes[0], sizes[1], dtype=dtype).requires_grad_()
    g = random(sizes[0], sizes[2], dtype=dtype)
    with building() as built:
        call(x).backward(g)
    forward, backward = built
    assert not forward.plan.fallbacks and not backward.plan.fallbacks
    x.grad = None
    model.zero_grad()
    with AtenSeen() as seen:
        call(x).backward(g)
    assert seen.compute == []
    assert seen.every  # it sees something
    assert len(forward.plan.regions) == 1 and len(backward.plan.regions) <= 3
    if all(p.family != "gemm_sm90" for e in built for p in e.programs.values()) or dtype != torch.float32:
        assert support.launches(forward) == 1
        # Where the columns alone do not fill the chip, the bias gradient takes a second launch.
        assert support.launches(backward) <= (3 if sizes is FULL else 4)


def test_a_backward_compiles_beside_its_forward() -> None:
    with building() as built:
        y = compiled(headline(), library=False)(random(B, K).requires_grad_())
    assert len(built) == 2
    y.sum().backward()
    assert len(built) == 2


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.1, 1.5])
@pytest.mark.parametrize("multiplier", [-2.0, 0.0, 2.0])
def test_mask_comes_from_the_pre_activation(multiplier: float, slope: float) -> None:
    model = headline((32, 64, 96), multiplier=multiplier, slope=slope)
    x, g = random(32, 64), random(32, 96)
    found = gradients(compiled(model, library=False), model, x, g)
    expected = support.oracle(model, x, g)
    for name, value in found.items():
        assert support.distance(value, expected[name]) <= 1e-5, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    model = headline((200, 1000, 776), dtype)
    call = compiled(model)
    x, g = random(200, 1000, dtype=dtype), random(200, 776, dtype=dtype)
    first = gradients(call, model, x, g)
    assert all(support.same(first, gradients(call, model, x, g)) for _ in range(5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.GELU, nn.Sigmoid, nn.Hardswish])
def test_nan_and_infinity_reach_the_elements_that_they_reach_in_eager(
    activation: type[nn.Module], dtype: torch.dtype
) -> None:
    model = nn.Sequential(nn.Linear(72, 40), activation()).to(support.DEVICE, dtype)
    x, g = random(64, 72, dtype=dtype), random(64, 40, dtype=dtype)
    x[3, 5], x[10, 71], x[20, 0], x[30] = math.nan, math.inf, -math.inf, math.inf
    found, expected = gradients(compiled(model, library=False), model, x, g), gradients(model, model, x, g)
    for name in ("output", support.GRADIENT + "x", support.GRADIENT + "0.weight"):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(found[name]), kind(expected[name])), (name, kind)
    assert bool(found["output"].isnan().any())


@pytest.mark.parametrize("library", [True, False], ids=["library", "alone"])
def test_empty_batch_gives_empty_outputs_and_zero_gradients(library: bool) -> None:
    model = headline()
    call = compiled(model, library=library)
    gradients(call, model, random(B, K), random(B, N))
    found = gradients(call, model, random(0, K), random(0, N))
    assert found["output"].shape == (0, N)
    assert found[support.GRADIENT + "x"].shape == (0, K)
    for name in ("gemm.weight", "gemm.bias"):
        assert not found[support.GRADIENT + name].any(), name


def test_second_batch_size_costs_one_recompilation_at_most() -> None:
    model = headline()
    call = compiled(model, library=False)
    with building() as built, torch.no_grad():
        for batch in (64, 96, 33, 200, 1000):
            x = random(batch, K)
            torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(built) <= 2


def test_marked_dynamic_batch_costs_no_recompilation() -> None:
    model = headline()
    call = compiled(model, library=False)
    with building() as built:
        for batch in (64, 96, 33):
            model.zero_grad()
            x, g = random(batch, K), random(batch, N)
            torch._dynamo.mark_dynamic(x, 0)
            y = call(x)
            y.backward(g)
            expected = support.oracle(model, x, g)
            torch.testing.assert_close(y.double(), expected["output"], rtol=1e-4, atol=1e-4)
            assert support.distance(model.gemm.weight.grad, expected[support.GRADIENT + "gemm.weight"]) <= 1e-5
    assert len(built) == 2  # one forward, one backward


def _step(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), lr=0.5, fused=True).step()


def _data(model: nn.Module) -> None:
    model.gemm.weight.data.mul_(-3)
    model.gemm.bias.data.add_(1)


def _state(model: nn.Module) -> None:
    model.load_state_dict(headline().state_dict())


@pytest.mark.parametrize("change", [_step, _data, _state])
def test_changed_weights_are_used(change: object) -> None:
    model = headline()
    call = compiled(model)
    x, g = random(B, K), random(B, N)
    with torch.no_grad():
        call(x)
    before = gradients(call, model, x, g)
    change(model)  # type: ignore[operator]
    with torch.no_grad():
        inference = call(x)
    found, expected = gradients(call, model, x, g), support.oracle(model, x, g)
    assert not torch.allclose(before["output"], found["output"], atol=1e-2)
    for name, value in [*found.items(), ("output", inference)]:
        assert support.distance(value, expected[name]) <= 1e-5, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_input_takes_the_unaligned_launch(dtype: torch.dtype) -> None:
    model = headline(dtype=dtype)
    call = compiled(model, library=False, dynamic=False)
    x = random(B, K, dtype=dtype)
    shifted = torch.empty(B * K + 1, device=support.DEVICE, dtype=dtype)[1:].view(B, K).copy_(x)
    assert shifted.data_ptr() % 16
    with building() as built, torch.no_grad():
        aligned = call(x)
        loaded = sum(len(b.loaded) for b in built)
        unaligned = call(shifted)
    assert sum(len(b.loaded) for b in built) > loaded
    exact = copy.deepcopy(model).double()(x.double())
    for found in (aligned, unaligned):
        assert support.distance(found, exact) <= (1e-5 if dtype == torch.float32 else 1e-2)


def test_accumulates_and_retains() -> None:
    model = headline()
    call = compiled(model)
    x, g = random(B, K), random(B, N)
    single = gradients(call, model, x, g)[support.GRADIENT + "gemm.weight"].clone()
    model.zero_grad()
    y = call(x)
    y.backward(g, retain_graph=True)
    y.backward(g)
    torch.testing.assert_close(model.gemm.weight.grad, 2 * single)
