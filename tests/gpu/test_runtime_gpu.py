"""How compiled calls behave beside torch's own: streams, CUDA graphs, devices, waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import gpu_support as support
import pytest
import torch
from gpu_support import SMALL, compiled, gradients, headline, random

pytestmark = pytest.mark.gpu

B, K, N = SMALL
DELAY = 100_000_000  # clock cycles: about 50 ms


@pytest.mark.parametrize("library", [True, False], ids=["library", "alone"])
def test_launches_follow_the_current_stream(library: bool) -> None:
    model = headline()
    call = compiled(model, library=library)
    x, g = random(B, K), random(B, N)
    fresh, fresh_g = random(B, K), random(B, N)
    gradients(call, model, x, g)
    expected = gradients(call, model, fresh, fresh_g)
    x.requires_grad_()
    model.zero_grad()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(DELAY)
        with torch.no_grad():  # late: a launch on another stream would read the old values
            x.copy_(fresh)
            g.copy_(fresh_g)
        y = call(x)
        y.backward(g)
    assert not stream.query(), "the delay was too short to show anything"
    torch.cuda.synchronize()
    assert torch.equal(y, expected["output"])
    assert torch.equal(x.grad, expected[support.GRADIENT + "x"])
    assert torch.equal(model.gemm.weight.grad, expected[support.GRADIENT + "gemm.weight"])


@pytest.mark.parametrize("library", [True, False], ids=["library", "alone"])
def test_forward_can_be_captured_in_a_graph(library: bool) -> None:
    model = headline()
    call = compiled(model, library=library)
    x = random(B, K)
    with torch.no_grad():
        call(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call(x)
        for seed in range(3):
            torch.manual_seed(seed)
            x.normal_()
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, call(x))


@contextmanager
def _no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("library", [True, False], ids=["library", "alone"])
def test_calls_do_not_wait_for_the_device(library: bool) -> None:
    model = headline()
    call = compiled(model, library=library)
    x, g = random(B, K), random(B, N)
    gradients(call, model, x, g)
    gradients(call, model, x, g)
    torch.cuda.synchronize()
    with _no_waiting():
        torch.cuda._sleep(DELAY)
        gradients(call, model, x, g)
        assert not torch.cuda.current_stream().query()  # the debug mode does not see the driver's own calls


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_tensors() -> None:
    first, second = headline(), headline().to("cuda:1")
    second.load_state_dict(first.state_dict())
    x, g = random(B, K), random(B, N)
    expected = gradients(compiled(first, library=False), first, x, g)
    assert torch.cuda.current_device() == 0
    found = gradients(compiled(second, library=False), second, x.to("cuda:1"), g.to("cuda:1"))
    assert all(value.device == torch.device("cuda:1") for value in found.values())
    assert support.same({n: v.to("cuda:0") for n, v in found.items()}, expected)


def test_two_threads_share_a_compiled_model() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = headline()
    call = compiled(model, library=False)
    inputs = [random(B, K) for _ in range(8)]
    with torch.no_grad():
        expected = [call(x) for x in inputs]

    def work(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            y = call(x)
            torch.cuda.current_stream().synchronize()
            return y

    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(work, inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
