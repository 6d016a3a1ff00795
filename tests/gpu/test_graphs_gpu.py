"""CUDA graphs on a GPU: what replays give, in inference and training, whatever the caller does in between."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gpu_support as support
import pytest
import torch
from gpu_support import random
from torch import Tensor, nn

import fusewright
from fusewright.errors import CannotReplay
from fusewright.runtime.graphs import CudaRecorder

pytestmark = pytest.mark.gpu

BATCH, WIDTH = 16, 256
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Counter:
    def __init__(self) -> None:
        self.captures = self.replays = 0


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """Counts captures and replays."""
    seen, record = Counter(), CudaRecorder.record

    def counted(self: CudaRecorder, run: Any, arguments: Sequence[Any]) -> tuple[Callable[[], None], list[Any]]:
        graph, results = record(self, run, arguments)
        seen.captures += 1

        def replay() -> None:
            seen.replays += 1
            graph()

        return replay, results

    monkeypatch.setattr(CudaRecorder, "record", counted)
    yield seen


def tower(layers: int = 3, activation: type[nn.Module] = nn.LeakyReLU) -> nn.Sequential:
    torch.manual_seed(0)
    stack = [m for _ in range(layers) for m in (nn.Linear(WIDTH, WIDTH), activation())]
    return nn.Sequential(*stack).to(support.DEVICE)


def replayed(model: Any, **settings: Any) -> Any:
    return fusewright.compile(model, cuda_graphs=True, fullgraph=True, **settings)


def test_inference_replays_and_sees_new_inputs_and_weights(count: Counter) -> None:
    model = tower()
    call = replayed(model)
    with torch.no_grad():
        for n in range(20):
            x = random(BATCH, WIDTH)
            torch.testing.assert_close(call(x), model(x), **CLOSE)
            if n % 5 == 4:
                model[0].weight.mul_(0.9)
                model[2].bias.data.add_(0.1)
    assert count.replays >= 12
    assert count.captures <= 4


def test_results_that_are_kept_stay_as_they_are(count: Counter) -> None:
    model = tower()
    call = replayed(model)
    kept = []
    with torch.no_grad():
        for _ in range(20):
            x = random(BATCH, WIDTH)
            kept.append((call(x), model(x)))
    for found, expected in kept:
        torch.testing.assert_close(found, expected, **CLOSE)
    assert count.replays >= 8


def test_training_by_replays_is_training(count: Counter) -> None:
    model, eager = tower(), tower()
    call = replayed(model)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-3, fused=True) for m in (model, eager)]
    for _ in range(30):
        x, target = random(BATCH, WIDTH), random(BATCH, WIDTH)
        losses = []
        for run, optimizer in zip((call, eager), optimizers, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(run(x), target)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert count.replays >= 30  # forward and backward


def test_memory_does_not_grow() -> None:
    model = tower()
    call = replayed(model)
    used = []
    for _ in range(60):
        model.zero_grad()
        call(random(BATCH, WIDTH)).sum().backward()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] <= used[20]


def test_several_forwards_before_their_backwards() -> None:
    model, eager = tower(), tower()
    call = replayed(model)
    for forwards in (1, 1, 1, 1, 3, 1, 2, 2, 1, 1):
        inputs = [random(BATCH, WIDTH) for _ in range(forwards)]
        for m, run in ((model, call), (eager, eager)):
            m.zero_grad()
            outputs = [run(x) for x in inputs]
            for output in reversed(outputs):
                output.square().sum().backward()
        for a, e in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, e.grad, rtol=1e-3, atol=1e-3)


def test_gradients_accumulate_and_graphs_are_retained() -> None:
    model, eager = tower(), tower()
    call = replayed(model)
    for step in range(12):
        x = random(BATCH, WIDTH)
        for m, run in ((model, call), (eager, eager)):
            if step % 4 == 0:
                m.zero_grad(set_to_none=step % 8 == 0)
            y = run(x).square().sum()
            y.backward(retain_graph=True)
            y.backward()
        for a, e in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, e.grad, rtol=1e-3, atol=1e-2)


def test_each_batch_has_a_graph_of_its_own(count: Counter) -> None:
    model = tower()
    call = replayed(model, dynamic=True)
    with torch.no_grad():
        for batch in (16, 48, 33) * 8:
            x = random(batch, WIDTH)
            torch.testing.assert_close(call(x), model(x), **CLOSE)
    assert count.replays >= 9


def test_two_models_of_one_class(count: Counter) -> None:
    models = [tower(2), tower(2)]
    nn.init.normal_(models[1][0].weight)
    calls = [replayed(m) for m in models]
    with torch.no_grad():
        for _ in range(12):
            for model, call in zip(models, calls, strict=True):
                x = random(BATCH, WIDTH)
                torch.testing.assert_close(call(x), model(x), **CLOSE)
    assert count.replays >= 10


def test_dropout_draws_anew_in_each_replay(count: Counter) -> None:
    call = replayed(lambda x: nn.functional.dropout(x, 0.5) * 2)
    x = torch.ones(4096, device=support.DEVICE)
    masks = [(call(x) == 0) for _ in range(10)]
    assert count.replays
    assert all(0.4 < float(m.float().mean()) < 0.6 for m in masks)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(masks))


def test_inputs_that_the_model_changes(count: Counter) -> None:
    def model(x: Tensor) -> Tensor:
        x.mul_(2)
        return x + 1

    call = replayed(model)
    for n in range(8):
        x = torch.full((64,), float(n), device=support.DEVICE)
        y = call(x)
        assert torch.equal(x, torch.full_like(x, 2.0 * n))
        assert torch.equal(y, x + 1)
    assert count.replays


def test_a_float_that_changes(count: Counter) -> None:
    call = replayed(lambda x, factor: torch.relu(x * factor))
    x = random(64)
    for factor in (0.5, 1.5, 2.5, 2.5, -3.5, 1.0, 0.25, 4.5, 5.5, 6.5):
        torch.testing.assert_close(call(x, factor), torch.relu(x * factor))
    assert count.replays


def test_an_operator_that_waits_is_refused_by_name() -> None:
    def model(x: Tensor, value: Tensor) -> Tensor:
        y = x * 2
        y[x > 0] = value
        return y + 1

    with pytest.raises(Exception, match=r"CannotReplay[\s\S]*index_put"):
        replayed(model)(random(64), random(1))
    assert issubclass(CannotReplay, Exception)


def test_inside_a_graph_of_the_callers_own() -> None:
    model = tower()
    call = replayed(model)
    x = random(BATCH, WIDTH)
    with torch.no_grad():
        for _ in range(3):
            call(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call(x)
        x.copy_(random(BATCH, WIDTH))
        graph.replay()
        torch.testing.assert_close(y, model(x), **CLOSE)


def test_on_another_stream() -> None:
    model = tower()
    call = replayed(model)
    side = torch.cuda.Stream()
    with torch.no_grad():
        for n in range(12):
            x = random(BATCH, WIDTH)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side if n % 2 else torch.cuda.current_stream()):
                y = call(x)
            torch.cuda.current_stream().wait_stream(side)
            torch.testing.assert_close(y, model(x), **CLOSE)


def test_autocast_and_inference_mode(count: Counter) -> None:
    model = tower()
    call = replayed(model)
    for mode in (torch.inference_mode, torch.no_grad):
        for _ in range(8):
            x = random(BATCH, WIDTH)
            with mode(), torch.autocast("cuda", torch.bfloat16):
                torch.testing.assert_close(call(x), model(x), rtol=3e-2, atol=3e-2)
    assert count.replays >= 4


def test_replays_equal_calls_without_graphs_bit_for_bit() -> None:
    model = tower(2, nn.Sigmoid)
    plain, call = support.compiled(copy.deepcopy(model), library=False), replayed(model, library=False)
    with torch.no_grad():
        for _ in range(8):
            x = random(BATCH, WIDTH)
            assert torch.equal(call(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_that_begin_early_read_nothing_early(dtype: torch.dtype) -> None:
    """A tower whose launches overlap, with and without graphs, on inputs and weights that were written just before."""
    torch.manual_seed(0)
    width = 2048
    model = nn.Sequential(*[m for _ in range(5) for m in (nn.Linear(width, width), nn.LeakyReLU())])
    model = model.to(support.DEVICE, dtype).requires_grad_(False)
    x = torch.empty(BATCH, width, device=support.DEVICE, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for graphs in (False, True):
        compiled = fusewright.compile(copy.deepcopy(model), cuda_graphs=graphs, library=False)
        weights = zip(compiled.parameters(), model.parameters(), strict=True)
        with torch.no_grad():
            for ours, theirs in itertools.islice(itertools.cycle(list(weights)), 100):
                ours.copy_(theirs.mul_(-1))
                found = compiled(x.normal_())
                expected = model(x)
                assert (found - expected).norm() <= tolerance * expected.norm()
                del found
