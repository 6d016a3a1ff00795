"""Halves on a GPU: shared by a training step, never stale, and kept between calls only where a user says so."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import gpu_support as support
import pytest
import torch
from gpu_support import building, compiled, gradients, headline, problems, random
from torch import Tensor, nn

from fusewright.runtime.executable import Executable
from fusewright.runtime.frozen import thaw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

SIZES = (1024, 1536, 2048)  # batch, inputs, outputs: products that read halves
B, K, N = SIZES


def smooth() -> nn.Module:
    """Without a kink, at which rounding would flip single elements' gradients."""
    return nn.Sequential(nn.Linear(K, N), nn.GELU()).cuda()


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    thaw()
    yield
    thaw()


def split(executable: Executable) -> list[int]:
    """How many matrices each step of a plan splits."""
    return [len(e.matrices) for e in executable.plan.encodes]


def test_a_training_step_splits_three_matrices() -> None:
    model = headline(SIZES)
    call = compiled(model)
    with building() as built:
        assert problems(call, model, 2, *SIZES) == ()
    assert [split(e) for e in built] == [[2], [1]]


def test_a_tower_with_partial_gradients() -> None:
    sizes = (1536, 2048, 1024, 2048)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.GELU())]
    model = nn.Sequential(*layers).cuda()
    model[2].weight.requires_grad_(False)
    call = compiled(model)
    x, g = random(B, sizes[0]), random(B, sizes[-1])
    with building() as built:
        y = call(x)
        y.backward(g)
    assert [sum(split(e)) for e in built] == [6, 3]
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    expected = exact(x.double())
    expected.backward(g.double())
    assert support.distance(y, expected) < 1e-5
    for name, parameter in exact.named_parameters():
        if parameter.requires_grad:
            assert support.distance(found[name], parameter.grad) < 1e-5, name


def _adamw(model: nn.Module) -> None:
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


def _sgd(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), lr=0.5).step()


def _data(model: nn.Module) -> None:
    model[0].weight.data.mul_(-300)  # another exponent


def _state(model: nn.Module) -> None:
    model.load_state_dict(smooth().state_dict())


@pytest.mark.parametrize("change", [_adamw, _sgd, _data, _state])
def test_nothing_goes_stale(change: Callable[[nn.Module], None]) -> None:
    model = smooth()
    call = compiled(model)
    x, g = random(B, K), random(B, N)
    with torch.no_grad():
        call(x)
    before = gradients(call, model, x, g)
    change(model)
    with torch.no_grad():
        inference = call(x)
    found, expected = gradients(call, model, x, g), support.oracle(model, x, g)
    assert not torch.allclose(before["output"], found["output"], atol=1e-2)
    for name, value in [*found.items(), ("output", inference)]:
        assert support.distance(value, expected[name]) <= 1e-5, name


def test_any_batch_in_training() -> None:
    """The weight's gradient sums over the batch: over few, float32 sums are needed; over none, zeros."""
    model = smooth()
    call = compiled(model, dynamic=True)
    with building() as built:
        for batch in (B, 1000, 40, 3, 0):
            x, g = random(batch, K), random(batch, N)
            torch._dynamo.mark_dynamic(x, 0)
            found, expected = gradients(call, model, x, g), support.oracle(model, x, g)
            for name, value in found.items():
                if value.numel():
                    assert support.distance(value, expected[name]) <= 1e-5, (batch, name)
    assert any(split(e) for e in built)


def frozen(model: Any, **options: Any) -> Any:
    return compiled(model, freeze=True, **options)


def run(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return call(x)


def test_frozen_weights_are_split_once(caplog: pytest.LogCaptureFixture) -> None:
    model, x = headline(SIZES), random(B, K)
    expected = run(compiled(model), x)
    torch._dynamo.reset()
    call = frozen(model)
    with building() as built, caplog.at_level("WARNING", logger="fusewright"):
        first = run(call, x)
    assert torch.equal(first, expected) and torch.equal(run(call, x), expected)
    assert [e.kept for e in built[0].plan.encodes] == [False, True]
    words = K * N + N  # two planes, and the magnitudes of lines
    assert f"keeps {4 * words} bytes" in caplog.text
    model.gemm.weight.data.mul_(2)  # what was promised not to happen
    assert torch.equal(run(call, x), expected)
    assert thaw() == 4 * words
    assert support.distance(run(call, x), model.double()(x.double())) < 1e-5


def test_another_model_has_halves_of_its_own() -> None:
    models, x = [headline(SIZES) for _ in range(2)], random(B, K)
    calls = [frozen(m) for m in models]
    for _ in range(2):
        for model, call in zip(models, calls, strict=True):
            assert support.distance(run(call, x), model(x)) < 1e-5
    models[0].gemm.weight = nn.Parameter(random(N, K))
    assert support.distance(run(calls[0], x), models[0](x)) < 1e-5


def test_frozen_in_a_graph_survives_thawing() -> None:
    model, x = headline(SIZES), random(B, K)
    call = frozen(model)
    expected = run(call, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(call, x)
    thaw()
    random(N * K * 2)  # takes memory that was given back
    graph.replay()
    assert torch.equal(y, expected)


def test_frozen_parameters_have_no_gradients() -> None:
    model = headline(SIZES)
    with pytest.raises(Exception, match="freeze") as error:
        frozen(model)(random(B, K))
    assert "FrozenGradients" in repr(error.value)
    run(frozen(model), random(B, K))
