"""Replaying graphs: when one is captured, replayed or left out, by a recorder whose graphs are Python calls."""

from __future__ import annotations

import ctypes
import gc
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from fusewright import compiler
from fusewright.capture.backend import decompositions, donate_nothing, stationary
from fusewright.capture.fx import RESULTS, from_fx
from fusewright.capture.joint import partition_joint
from fusewright.errors import CannotReplay
from fusewright.fusion import reference
from fusewright.runtime import graphs
from fusewright.runtime.frozen import thaw
from fusewright.runtime.graphs import Replayed, check
from graphs import planned

CPU = torch.device("cpu")


class FakeRecorder:
    """A capture computes nothing, and a replay writes where the capture's results lie, as on a GPU."""

    def __init__(self) -> None:
        self.here, self.outer = 0, False
        self.captures = self.replays = 0

    def stream(self) -> int:
        return self.here

    def capturing(self) -> bool:
        return self.outer

    def record(self, run: Any, arguments: Sequence[Any]) -> tuple[Callable[[], None], list[Any]]:
        self.captures += 1
        frozen = [frozen_address(a) if isinstance(a, Tensor) else a for a in arguments]
        given = {a.untyped_storage()._cdata for a in arguments if isinstance(a, Tensor)}
        results = run(*arguments)
        own = {i: r for i, r in enumerate(results) if isinstance(r, Tensor) and r.untyped_storage()._cdata not in given}
        for result in own.values():
            result.fill_(-77)

        def replay() -> None:
            self.replays += 1
            for i, value in enumerate(run(*frozen)):
                if i in own:
                    own[i].copy_(value)

        return replay, results


def frozen_address(tensor: Tensor) -> Tensor:
    """What lies where `tensor` lies now, whoever owns it."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    memory = (ctypes.c_char * (span * tensor.itemsize)).from_address(tensor.data_ptr())
    there = torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())
    return torch._conj(there) if tensor.is_conj() else there


def shapes(arguments: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(a.shape if isinstance(a, Tensor) else a for a in arguments)


def product(x: Tensor, w: Tensor) -> list[Any]:
    """A result, a size, nothing, and what a backward needs."""
    y = x @ w
    return [y, x.shape[0], None, x, y * 2]


def replayed(run: Callable[..., list[Any]] = product, **options: Any) -> tuple[Replayed, FakeRecorder]:
    recorder = FakeRecorder()
    return Replayed(run, shapes, recorder, **options), recorder


def same(found: Sequence[Any], expected: Sequence[Any]) -> None:
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e) if isinstance(e, Tensor) else f == e


def test_same_addresses_are_captured_at_the_second_call_and_replayed_from_the_third() -> None:
    call, recorder = replayed()
    x, w = torch.randn(3, 4), torch.randn(4, 2)
    for n in range(6):
        x.normal_(), w.normal_()
        same(call(x, w), product(x, w))
        assert (recorder.captures, recorder.replays) == (n >= 1, max(0, n - 1))


def test_an_argument_that_keeps_moving_is_copied_in() -> None:
    call, recorder = replayed()
    w = torch.randn(4, 2)
    inputs = [torch.randn(3, 4) for _ in range(20)]
    for x in inputs:
        same(call(x, w), product(x, w))
    assert recorder.captures == 1
    assert recorder.replays >= 15


def test_two_sets_of_fixed_arguments_have_a_graph_each_and_are_not_copied() -> None:
    """Two models of one class share what Dynamo compiled."""
    call, recorder = replayed(fixed=[1])
    x, weights = torch.randn(3, 4), [torch.randn(4, 2) for _ in range(3)]
    for n in range(21):
        weights[n % 3].normal_()
        same(call(x, weights[n % 3]), product(x, weights[n % 3]))
    assert recorder.captures == 3
    (sized,) = call._kept.values()
    assert all(not r.buffers for r in sized.recordings.values())


def test_results_that_are_held_are_never_overwritten() -> None:
    call, recorder = replayed()
    w, held = torch.randn(4, 2), []
    for _ in range(20):
        x = torch.randn(3, 4)
        held.append((call(x, w), product(x, w)))
    for found, expected in held:
        same(found, expected)
    assert recorder.captures <= 3  # the first does not copy results out
    assert recorder.replays >= 10


@pytest.mark.parametrize("alias", [lambda y: y.view(-1)[1:], lambda y: y.detach(), lambda y: y, None])
def test_any_alias_holds_a_result(alias: Any) -> None:
    call, recorder = replayed(lambda x: [x + 1])
    x = torch.zeros(4)
    for _ in range(3):
        call(x)
    result = call(x)[0]
    kept = [alias(result)] if alias else []
    del result
    x.add_(5)
    replays = recorder.replays
    same(call(x), [x + 1])
    assert recorder.replays == replays + (alias is None)
    assert all(bool((k == 1).all()) for k in kept)


def test_results_that_are_dropped_cost_no_copy() -> None:
    call, _ = replayed(lambda x: [x + 1])
    x = torch.zeros(4)
    addresses = [call(x)[0].data_ptr() for _ in range(8)]
    assert len(set(addresses[2:])) == 1


def test_a_forward_before_the_backward_of_the_last_runs_without_a_graph() -> None:
    call, recorder = replayed(results=3)
    x, w = torch.randn(3, 4), torch.randn(4, 2)
    for _ in range(3):
        call(x, w)
    first = call(x, w)[3:]
    expected = [t.clone() for t in first]
    replays = recorder.replays
    for _ in range(5):
        x.normal_()
        same(call(x, w), product(x, w))
    assert recorder.replays == replays
    same(first[1:], expected[1:])
    del first
    call(x, w)
    assert (recorder.captures, recorder.replays) == (1, replays + 1)


def test_saved_arguments_are_the_callers_own_where_they_were_read_in_place_and_buffers_where_copied() -> None:
    call, _ = replayed(results=3)
    x, w = torch.randn(3, 4), torch.randn(4, 2)
    for _ in range(4):
        assert call(x, w)[3] is x
    saved = set()
    others = [torch.randn(3, 4) for _ in range(10)]
    for x in others:
        result = call(x, w)
        assert torch.equal(result[3], x)
        saved.add(result[3].data_ptr())
        del result
    assert len(saved) < 6


def test_views_of_arguments_follow_the_call() -> None:
    call, _ = replayed(lambda x: [x.t(), x[1:]])
    x = torch.randn(3, 4)
    for _ in range(4):
        x.normal_()
        found = call(x)
        same(found, [x.t(), x[1:]])
        assert all(f.untyped_storage().data_ptr() == x.data_ptr() for f in found)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "complex": lambda x: torch.view_as_complex(x)[1:],
    "conjugate": lambda x: torch.view_as_complex(x).conj(),
    "negative": lambda x: torch.view_as_complex(x).conj().imag,
    "bits": lambda x: x.view(torch.int32)[1:],
    "wider": lambda x: x.view(torch.float64),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_arguments_keep_their_dtype_and_what_is_lazy(name: str) -> None:
    call, recorder = replayed(lambda x: [VIEWS[name](x)])
    x = torch.randn(13, 2)[2:]
    for _ in range(4):
        x.normal_()
        (found,) = call(x)
        expected = VIEWS[name](x)
        assert torch.equal(found.resolve_conj(), expected.resolve_conj())
        assert (found.dtype, found.is_conj(), found.is_neg()) == (expected.dtype, expected.is_conj(), expected.is_neg())
        assert found._version == x._version
    assert recorder.replays


def test_one_result_in_two_places_stays_one_tensor() -> None:
    def run(x: Tensor) -> list[Any]:
        y = x + 1
        return [y, y]

    call, _ = replayed(run)
    x = torch.zeros(3)
    for _ in range(4):
        a, b = call(x)
        assert a is b


def test_arguments_of_other_layouts_are_copied_as_they_lie() -> None:
    call, recorder = replayed(lambda x: [x * 2, x.stride()[0]])
    for n in range(20):
        x = torch.randn(5, 1).expand(5, 3) if n % 2 else torch.randn(3, 9)[:, ::2]
        same(call(x), [x * 2, x.stride()[0]])
    assert recorder.replays


def test_sizes_have_graphs_of_their_own_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "SIZES", 3)
    call, recorder = replayed(lambda x: [x + 1])
    inputs = [torch.zeros(n) for n in range(5)]
    for _ in range(4):
        for x in inputs:
            x.add_(1)
            same(call(x), [x + 1])
    assert (recorder.captures, recorder.replays) == (2, 4)  # an empty tensor needs no graph


def test_captures_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CAPTURES", 3)
    call, recorder = replayed(lambda x: [x + 1], fixed=[0])
    inputs = [torch.zeros(4) for _ in range(10)]
    for _ in range(3):
        for x in inputs:
            for _ in range(3):
                same(call(x), [x + 1])
    assert recorder.captures == 3


def test_another_stream_and_a_capture_of_the_callers_own_do_not_replay() -> None:
    call, recorder = replayed()
    x, w = torch.randn(3, 4), torch.randn(4, 2)
    for _ in range(3):
        call(x, w)
    recorder.here = 1
    same(call(x, w), product(x, w))
    recorder.here, recorder.outer = 0, True
    same(call(x, w), product(x, w))
    assert (recorder.captures, recorder.replays) == (1, 1)


def test_threads_capture_one_after_the_other() -> None:
    underway: list[int] = []
    most = 0

    def alone(record: Any) -> Any:
        def recording(run: Any, arguments: Any) -> Any:
            nonlocal most
            underway.append(1)
            most = max(most, len(underway))
            time.sleep(0.05)
            underway.pop()
            return record(run, arguments)

        return recording

    def use(start: threading.Barrier) -> None:
        call, recorder = replayed(lambda x: [x + 1])
        recorder.record = alone(recorder.record)  # type: ignore[method-assign]
        x = torch.zeros(3)
        start.wait()
        for _ in range(3):
            same(call(x), [x + 1])

    start = threading.Barrier(4)
    threads = [threading.Thread(target=use, args=(start,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_capture_that_runs_out_of_memory_says_that() -> None:
    call, recorder = replayed(lambda x: [x + 1])

    def record(run: Any, arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    recorder.record = record  # type: ignore[method-assign]
    x = torch.zeros(3)
    call(x)
    with pytest.raises(torch.OutOfMemoryError):
        call(x)


def test_a_failed_capture_names_what_runs_as_aten() -> None:
    call, recorder = replayed(lambda x: [x + 1], fallbacks=["nonzero"])

    def record(run: Any, arguments: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    recorder.record = record  # type: ignore[method-assign]
    x = torch.zeros(3)
    call(x)
    with pytest.raises(CannotReplay, match=r"nonzero.*not permitted.*cuda_graphs"):
        call(x)


def test_operators_that_wait_are_refused_before_anything_runs() -> None:
    def masked(x: Tensor) -> Tensor:
        y = x * 1
        y[x > 0] = x[:1]
        return y

    run, record = planned(masked)
    run(torch.randn(4))
    with pytest.raises(CannotReplay, match="index_put"):
        check(record.plans[0], CPU)
    run, record = planned(lambda x: x.cumsum(0) + 1)
    run(torch.randn(4))
    check(record.plans[0], CPU)
    with pytest.raises(CannotReplay, match="cumsum"):
        check(record.plans[0], torch.device("cuda:0"))


# ---- under torch.compile, with autograd


class Towers:
    """A backend that plans as usual and replays the plan's reference."""

    def __init__(self) -> None:
        self.recorders: list[FakeRecorder] = []

    def compile(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        plan = compiler.plan(from_fx(module))
        self.recorders.append(FakeRecorder())
        run = Replayed(
            lambda *a: reference.run(plan, a, widen=False),
            shapes,
            self.recorders[-1],
            fixed=stationary(module),
            results=module.meta.get(RESULTS),
        )
        donate_nothing()
        return make_boxed_func(run)

    def backend(self) -> Any:
        return aot_autograd(
            fw_compiler=self.compile,
            bw_compiler=self.compile,
            inference_compiler=self.compile,
            partition_fn=partition_joint,
            decompositions=decompositions(),
        )

    @property
    def replays(self) -> list[int]:
        return [r.replays for r in self.recorders]


def tower() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()


def pair() -> tuple[nn.Module, Any, nn.Module, Towers]:
    towers, model = Towers(), tower()
    torch._dynamo.reset()
    return model, torch.compile(model, backend=towers.backend()), tower(), towers


def assert_parameters(model: nn.Module, expected: nn.Module) -> None:
    for a, e in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_training_as_in_eager_by_replays() -> None:
    model, call, expected, towers = pair()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, expected)]
    for _ in range(20):
        x = torch.randn(7, 4, dtype=torch.float64)
        for run, optimizer in zip((call, expected), optimizers, strict=True):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
        assert_parameters(model, expected)
    assert len(towers.replays) == 2
    assert min(towers.replays) >= 10


def test_a_saved_complex_view_of_a_parameter() -> None:
    """As of the factors of a rotation: forward saves the view, for a graph of backward that reads the parameter."""
    pairs = torch.randn(4, 2, requires_grad=True)
    weight = torch.randn(4, 4, dtype=torch.complex64, requires_grad=True)

    def model() -> Tensor:
        return torch.view_as_real(torch.view_as_complex(pairs) @ weight.conj())

    towers = Towers()
    torch._dynamo.reset()
    call = torch.compile(model, backend=towers.backend())
    expected = torch.autograd.grad(model().square().sum(), (pairs, weight))
    for _ in range(6):
        same(torch.autograd.grad(call().square().sum(), (pairs, weight)), expected)
    assert towers.replays[0]


def test_inputs_that_the_model_changes() -> None:
    towers = Towers()

    def model(x: Tensor) -> Tensor:
        x.mul_(2)
        return x + 1

    torch._dynamo.reset()
    call = torch.compile(model, backend=towers.backend())
    for n in range(8):
        x = torch.full((4,), float(n))
        y = call(x)
        assert x.tolist() == [2.0 * n] * 4
        assert y.tolist() == [2.0 * n + 1] * 4
    assert towers.replays[0]


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_calls_gives_what_eager_gives(seed: int) -> None:
    """Results kept or dropped, backwards late, twice or never, weights changed, in any order."""
    choose = random.Random(seed)
    model, call, expected, towers = pair()
    inputs = [torch.randn(n, 4, dtype=torch.float64) for n in (7, 7, 5)]
    kept: list[tuple[Tensor, Tensor]] = []
    for _ in range(120):
        action = choose.choice(("call", "call", "step", "backward", "again", "drop", "weights", "no_grad"))
        if action == "call" or action == "no_grad":
            x = choose.choice(inputs) if choose.random() < 0.7 else torch.randn(7, 4, dtype=torch.float64)
            with torch.set_grad_enabled(action == "call"):
                kept.append((call(x), expected(x)))
        elif action == "step":
            x = choose.choice(inputs)
            call(x).sum().backward(), expected(x).sum().backward()
        elif action in ("backward", "again") and kept:
            found, wanted = kept.pop(choose.randrange(len(kept)))
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
            if found.requires_grad:
                for _ in range(1 + (action == "again")):
                    found.square().sum().backward(retain_graph=True), wanted.square().sum().backward(retain_graph=True)
        elif action == "drop":
            kept.clear()
        elif action == "weights":
            for m in (model, expected):
                for p in m.parameters():
                    p.data.mul_(0.9)
                    p.grad = None
            kept.clear()
        for found, wanted in kept:
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        for a, e in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a.grad, e.grad, rtol=1e-9, atol=1e-9)
    assert sum(towers.replays) > 5


def test_what_was_made_of_frozen_parameters_is_not_replayed_after_a_thaw() -> None:
    call, recorder = replayed(frozen=[1])
    x, w = torch.randn(3, 4), torch.randn(4, 2)
    for n in range(9):
        if n % 3 == 0:
            thaw()
        same(call(x, w), product(x, w))
    assert (recorder.captures, recorder.replays) == (3, 3)


@pytest.mark.parametrize("frozen", [False, True])
def test_only_frozen_parameters_are_kept_alive(frozen: bool) -> None:
    call, _ = replayed(lambda x, w: [x @ w, w.t()], frozen=[1] if frozen else [])
    x = torch.randn(3, 4)
    w = torch.randn(4, 2)
    storage = w.untyped_storage()._cdata
    base = graphs._holders(storage)
    for _ in range(4):
        call(x, w.detach())
    gc.collect()
    assert graphs._holders(storage) == base + frozen
