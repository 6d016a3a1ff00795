"""`fusewright.linear`: results and gradients as in eager, one kernel, traced once, alone and inside torch.compile."""

from __future__ import annotations

import functools
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fusewright
from fusewright import compiler
from fusewright.capture import epilogues
from fusewright.errors import CannotFuse, EagerFailure, InvalidSetting, UnknownSetting
from fusewright.runtime.executable import Executable
from graphs import gradients

simulated = functools.partial(fusewright.linear, simulate=True)


@pytest.fixture(autouse=True)
def fresh(nothing_compiled: None) -> None:
    epilogues._kept.clear()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Executable]:
    """The executables made in a test, in order."""
    made: list[Executable] = []
    build = compiler.build

    def spy(*args: Any, **kwargs: Any) -> Any:
        made.append(build(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(compiler, "build", spy)
    return made


@pytest.fixture
def warned() -> Iterator[list[logging.LogRecord]]:
    """What Dynamo says in a test, warnings and errors."""
    handler = logging.Handler(logging.WARNING)
    records: list[logging.LogRecord] = []
    handler.emit = records.append  # type: ignore[method-assign]
    for log in epilogues._LOGS:
        log.addHandler(handler)
    yield records
    for log in epilogues._LOGS:
        log.removeHandler(handler)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def assert_as_eager(found: Any, expected: Any, *leaves: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    for f, e in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)


def test_operands_and_closed_over_tensors_get_gradients(built: list[Executable]) -> None:
    x, weight, bias, residual, scale = tensors((5, 9), (10, 9), (10,), (5, 10), (10,))

    def epilogue(y: Tensor, r: Tensor) -> Tensor:
        return F.silu(y) * scale + r

    found = simulated(x, weight, bias, epilogue, operands=(residual,))
    expected = epilogue(F.linear(x, weight, bias), residual)
    assert_as_eager(found, expected, x, weight, bias, residual, scale)
    (region,) = built[0].plan.regions
    assert {"addmm", "silu", "mul", "add"} <= set(region.operators)
    assert not built[1].plan.fallbacks


class Layer(nn.Module):
    """Makes its epilogue anew in each call, as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(10, 9)), nn.Parameter(torch.randn(10))

    def forward(self, x: Tensor, **settings: Any) -> Tensor:
        return fusewright.linear(x, self.weight, epilogue=lambda y: torch.relu(y * self.scale), **settings)

    def eager(self, x: Tensor) -> Tensor:
        return torch.relu(F.linear(x, self.weight) * self.scale)


def test_a_lambda_made_in_each_call_is_traced_once_and_batches_become_dynamic(built: list[Executable]) -> None:
    layer, other = Layer(), Layer()
    with torch.no_grad():
        for batch in (5, 5, 7, 3, 12, 70):
            x = torch.randn(batch, 9)
            torch.testing.assert_close(layer(x, simulate=True), layer.eager(x), rtol=2e-5, atol=2e-5)
        assert len(built) == 2  # one batch, then any
        torch.testing.assert_close(other(x, simulate=True), other.eager(x), rtol=2e-5, atol=2e-5)
        assert len(built) == 2


def test_another_layout_of_weights_makes_no_size_of_weights_dynamic(built: list[Executable]) -> None:
    """Whatever the epilogue: kernels know the sizes of weights."""
    for epilogue in (torch.relu, torch.sigmoid):
        for rows, columns in ((16, 8), (24, 16), (32, 40)):
            fusewright.linear(*tensors((4, columns), (rows, columns)), epilogue=epilogue, simulate=True)
            assert [built[-1].plan.buffers[name].shape for name in built[-1].plan.inputs[:2]] == [
                (4, columns),
                (rows, columns),
            ]
    assert len(built) == 6


def test_leading_dimensions_no_bias_and_no_epilogue() -> None:
    x, weight = tensors((2, 3, 9), (10, 9))
    with torch.no_grad():
        torch.testing.assert_close(simulated(x, weight), F.linear(x, weight), rtol=2e-5, atol=2e-5)


def planned(monkeypatch: pytest.MonkeyPatch) -> list[Executable]:
    """Runs plans in torch, which needs no kernels: for tests of the door alone. Returns what is built, in order."""
    from fusewright.fusion import reference

    made: list[Executable] = []

    class Planned(Executable):
        def __init__(self, plan: Any) -> None:
            self.plan = plan
            made.append(self)

        def __call__(self, *arguments: Any) -> list[Any]:
            return reference.run(self.plan, arguments, widen=False)

    monkeypatch.setattr(compiler, "build", lambda graph, *_, **__: Planned(compiler.plan(graph)))
    return made


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, y: Tensor) -> Tensor:
        return y * self.factor

    def twice(self, y: Tensor) -> Tensor:
        return y * self.factor * 2


def multiplied(factor: float, y: Tensor) -> Tensor:
    return y * factor


class Slotted:
    """Has no weak references and no hash."""

    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slotted) and self.factor == other.factor

    def __call__(self, y: Tensor) -> Tensor:
        return y * self.factor


EPILOGUES: dict[str, Callable[..., Any]] = {
    "module": nn.GELU(),
    "own module": Scale(3.0),
    "method": Scale(3.0).twice,
    "builtin": torch.tanh,
    "method of a tensor": Tensor.relu,
    "object": Slotted(3.0),
    "partial": functools.partial(multiplied, 0.5),
    "several results": lambda y: (y.relu(), y * 2),
    "view": lambda y: y.t(),
}


@pytest.mark.parametrize("name", EPILOGUES)
def test_any_callable_is_an_epilogue(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch)
    x, weight, bias = tensors((5, 9), (10, 9), (10,))
    epilogue = EPILOGUES[name]
    found, expected = simulated(x, weight, bias, epilogue), epilogue(F.linear(x, weight, bias))
    assert_as_eager(found, expected, x, weight, bias)


def test_layers_of_many_sizes_share_an_epilogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layout of weights is compiled for itself, so that none runs into Dynamo's limit of recompilations."""
    planned(monkeypatch)
    for n in range(2, 12):
        x, weight = torch.randn(4, n), torch.randn(2 * n, n)
        torch.testing.assert_close(simulated(x, weight, epilogue=F.relu), F.relu(F.linear(x, weight)))


class Leaky(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.weight, self.slope = nn.Parameter(torch.randn(9, 9)), slope

    def forward(self, x: Tensor) -> Tensor:
        return simulated(x, self.weight, epilogue=lambda y: F.leaky_relu(y, self.slope))


OTHER = torch.ones(5, 10)
FUNCTIONS = [torch.relu, torch.tanh, torch.exp, torch.neg, torch.abs, torch.sin, torch.cos, torch.erf, F.silu, F.gelu]


def test_an_epilogue_has_more_variations_than_dynamo_allows(
    monkeypatch: pytest.MonkeyPatch, warned: list[logging.LogRecord]
) -> None:
    built = planned(monkeypatch)
    missed: list[Any] = []
    room = epilogues._Calls._with_room
    monkeypatch.setattr(epilogues._Calls, "_with_room", lambda calls, args: missed.append(args) or room(calls, args))
    x, weight, bias, r = tensors((5, 9), (10, 9), (10,), (5, 10))
    tower = nn.Sequential(*(Leaky(0.1 * i) for i in range(12)))

    def sweep() -> None:
        for function in FUNCTIONS:
            y = simulated(x, weight, epilogue=lambda y: function(y))  # noqa: B023
            torch.testing.assert_close(y, function(F.linear(x, weight)))
        for i in range(16):
            for j, t in enumerate((x, weight, bias, r)):
                t.requires_grad_(bool(i >> j & 1))
            found = simulated(x, weight, bias, torch.add, (r,))
            assert found.requires_grad == bool(i)
        with torch.no_grad():
            expected = x
            for layer in tower:
                expected = F.leaky_relu(F.linear(expected, layer.weight), layer.slope)
            torch.testing.assert_close(tower(x), expected)

    sweep()
    count, misses = len(built), len(missed)
    assert count >= 12 + len(FUNCTIONS) + 16
    sweep()
    assert len(built) == count
    assert misses
    assert len(missed) == misses, "what is compiled already runs with Dynamo's configuration as it is"
    assert not warned


def test_an_epilogue_begins_anew_when_dynamo_can_hold_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    built = planned(monkeypatch)
    x, weight = torch.randn(5, 9), torch.randn(10, 9)
    with torch._dynamo.config.patch(accumulated_recompile_limit=4):
        for i in range(1, 11):
            bound = 0.1 * i
            found = simulated(x, weight, epilogue=lambda y: y.clamp(-bound, bound))  # noqa: B023
            torch.testing.assert_close(found, F.linear(x, weight).clamp(-bound, bound))
    assert len(built) == 10
    assert torch._dynamo.config.recompile_limit == 8


def test_numbers_that_scale_shift_and_compare_are_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    built = planned(monkeypatch)
    x, weight = torch.randn(5, 9), torch.randn(10, 9)
    for k in (0.5, 1.5, -2.5, 3.5):

        def epilogue(y: Tensor) -> Tensor:
            return torch.where(y > k, (y - k) * k, y / k + k)  # noqa: B023

        torch.testing.assert_close(simulated(x, weight, epilogue=epilogue), epilogue(F.linear(x, weight)))
    assert len(built) == 2


@pytest.mark.parametrize(
    ("epilogue", "operator"),
    [
        (lambda y: y.relu().cumsum(0), "cumsum"),
        (lambda y: y.softmax(-1), "softmax"),
        (lambda y: y @ y.t(), "mm"),
        (lambda y: y.sum(), "sum"),
        (lambda y: y.mean(-1, keepdim=True) + y, "mean"),
        (lambda y: y + OTHER.mean(), "mean"),
        (lambda y: y * OTHER.sum(1, keepdim=True), "sum"),
        (lambda y: (y.relu(), OTHER[0].exp()), "exp"),
        (lambda y: y + F.linear(OTHER, torch.ones(10, 10)), "mm"),
        (lambda y: y * y[0, 0].item(), "mul"),
        (lambda y: fusewright.linear(y, torch.ones(7, 10)), "mm"),
    ],
    ids=[
        "cumsum",
        "softmax",
        "mm",
        "sum",
        "mean",
        "another's mean",
        "another's sum",
        "apart",
        "two products",
        "item",
        "nested",
    ],
)
def test_an_operator_that_does_not_fit_is_named(epilogue: Any, operator: str) -> None:
    x, weight = torch.randn(5, 9), torch.randn(10, 9)
    with pytest.raises(CannotFuse, match=rf"{operator}.* cannot be fused .*fusewright\.compile"):
        simulated(x, weight, epilogue=epilogue)


@pytest.mark.parametrize(
    ("epilogue", "operator"),
    [
        (lambda y: y / y.norm(dim=-1, keepdim=True), "linalg_vector_norm"),
        (lambda y: y + torch.rand_like(y), "rand_like"),
    ],
    ids=["norm", "random"],
)
def test_only_what_has_no_kernel_is_blamed(epilogue: Any, operator: str) -> None:
    with pytest.raises(CannotFuse, match=f"^{operator} cannot be fused"):
        simulated(torch.randn(5, 9), torch.randn(10, 9), epilogue=epilogue)


def test_inside_a_transform_the_epilogue_is_not_blamed() -> None:
    weight = torch.randn(10, 9)
    for transform in (torch.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())):
        with pytest.raises(CannotFuse, match=r"transform of torch.func"):
            transform(lambda x: simulated(x, weight, epilogue=F.silu))(torch.randn(5, 9))


def test_an_epilogue_that_is_no_function_of_tensors_is_refused() -> None:
    with pytest.raises(CannotFuse, match=r"test_linear.py:\d+: .*print") as caught:
        simulated(torch.randn(5, 9), torch.randn(10, 9), epilogue=lambda y: print(y) or y)
    assert not re.search("Explanation:|Hint:|\n", str(caught.value))


@pytest.mark.parametrize(
    "epilogue",
    [
        lambda y: OTHER.exp(),
        lambda y: F.linear(OTHER.exp(), torch.ones(10, 10)),
        lambda y: torch.zeros_like(y) + F.linear(OTHER, torch.ones(10, 10)),
    ],
    ids=["pointwise", "another product", "a shape"],
)
@pytest.mark.parametrize("trains", [False, True])
def test_an_epilogue_without_the_product_is_refused(epilogue: Any, trains: bool) -> None:
    with pytest.raises(CannotFuse, match="do not depend on the product"):
        simulated(torch.randn(5, 9), torch.randn(10, 9, requires_grad=trains), epilogue=epilogue)


def test_a_product_that_the_epilogue_repeats_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch)
    x, weight = tensors((5, 9), (10, 9))
    found = simulated(x, weight, epilogue=lambda y: y * F.linear(x, weight))
    assert_as_eager(found, F.linear(x, weight).square(), x, weight)


def test_under_autocast_operands_are_cast_first(monkeypatch: pytest.MonkeyPatch) -> None:
    built = planned(monkeypatch)
    x, weight, bias = tensors((5, 9), (10, 9), (10,))
    with torch.autocast("cpu", torch.bfloat16):
        assert simulated(x, weight, bias, torch.relu).dtype == torch.bfloat16
    assert len(built[0].plan.regions) == 3


X, WEIGHT = torch.randn(5, 9), torch.randn(10, 9)
FAILING: dict[str, tuple[tuple[Any, ...], str]] = {
    "no function": ((X, WEIGHT, None, "relu"), "'str' object is not callable"),
    "no tensor": (([1, 2], WEIGHT), "must be Tensor, not list"),
    "weight": ((X, torch.ones(10, 8)), r"shapes cannot be multiplied \(5x9 and 8x10\)"),
    "bias": ((X, WEIGHT, torch.ones(9)), r"must match the existing size \(9\)"),
    "operand": ((X, WEIGHT, None, torch.add, (torch.ones(5, 9),)), "must match the size of tensor b"),
    "no dimensions": ((torch.tensor(1.0), WEIGHT), "at least 1D"),
    "dtypes": ((X.double(), WEIGHT), "same dtype"),
    "raises": ((X, WEIGHT, None, lambda y: y * (1 / 0)), r"\(.*test_linear.py:\d+\): ZeroDivisionError"),
    "no attribute": ((X, WEIGHT, None, lambda y: y.nope()), "no attribute 'nope'"),
    "arity": ((X, WEIGHT, None, lambda y, r: y + r), "missing 1 required positional argument: 'r'"),
}


@pytest.mark.parametrize("name", FAILING)
def test_what_fails_in_eager_mode_says_how_in_one_error(name: str, warned: list[logging.LogRecord]) -> None:
    arguments, says = FAILING[name]
    with pytest.raises(EagerFailure, match=says):
        simulated(*arguments)
    assert not warned
    assert not any(log.filters for log in epilogues._LOGS)


def test_only_the_calling_thread_is_quiet(warned: list[logging.LogRecord]) -> None:
    with epilogues._Quiet():
        epilogues._LOGS[0].warning("of this thread")
        other = threading.Thread(target=epilogues._LOGS[0].warning, args=("of another",))
        other.start()
        other.join()
    assert [r.getMessage() for r in warned] == ["of another"]


def test_a_failure_in_a_library_beside_torch_says_where() -> None:
    """As in torchvision, whose folder's name begins with torch's."""
    path = f"{Path(torch.__file__).parent}vision/ops.py"
    scope: dict[str, Any] = {}
    exec(compile("def fails(y):\n    return y.nope()", path, "exec"), scope)
    with pytest.raises(EagerFailure, match=re.escape(f"({path}:2)")):
        simulated(X, WEIGHT, epilogue=scope["fails"])


def test_a_failing_epilogue_is_not_run_for_its_effects() -> None:
    total, state = torch.zeros(10), torch.get_rng_state()
    for epilogue in (lambda y: (total.add_(1) + y).cumsum(0), lambda y: (torch.rand_like(y) + y).cumsum(0)):
        with pytest.raises(CannotFuse):
            simulated(X, WEIGHT, epilogue=epilogue)
    assert not total.any()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("x", "weight", "says"),
    [
        (X, WEIGHT[0], r"x float32 \[5, 9\] and weight float32 \[9\]"),
        (X.int(), WEIGHT.int(), "weight int32"),
        (X.to(torch.complex64), WEIGHT.to(torch.complex64), "weight complex64"),
    ],
    ids=["vector", "integers", "complex"],
)
def test_operands_that_no_kernel_multiplies_are_named(x: Tensor, weight: Tensor, says: str) -> None:
    with pytest.raises(CannotFuse, match=f"no kernel multiplies .*{says}.* float32, float64"):
        simulated(x, weight, epilogue=lambda y: y * 2)


def test_settings_are_checked() -> None:
    x, weight = torch.randn(5, 9), torch.randn(10, 9)
    with pytest.raises(UnknownSetting, match="did you mean 'simulate'"):
        fusewright.linear(x, weight, simulat=True)
    with pytest.raises(InvalidSetting, match="bool"):
        fusewright.linear(x, weight, simulate=1)


@pytest.mark.parametrize("backend", ["eager", "inductor", "fusewright"])
def test_inside_torch_compile_it_is_part_of_the_graph(backend: str, built: list[Executable]) -> None:
    layer = Layer()

    def model(x: Tensor) -> Tensor:
        return layer(x * 2) + 1

    options = {"simulate": True} if backend == "fusewright" else None
    x = torch.randn(5, 9, requires_grad=True)
    found = torch.compile(model, backend=backend, fullgraph=True, options=options)(x)
    assert_as_eager(found, layer.eager(x * 2) + 1, x, layer.weight, layer.scale)
    assert counters["stats"]["unique_graphs"] == 1
    if backend == "fusewright":
        (product,) = (r for r in built[0].plan.regions if r.gemm)
        assert {"relu", "add"} <= set(product.operators)


def test_trains_as_eager_does(monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch)
    layer, eager = Layer().double(), Layer().double()
    eager.load_state_dict(layer.state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), 0.05) for m in (layer, eager)]
    for _ in range(5):
        x = torch.randn(6, 9, dtype=torch.float64)
        for call, optimizer in ((functools.partial(layer, simulate=True), optimizers[0]), (eager.eager, optimizers[1])):
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
    for a, e in zip(layer.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_on_the_cpu_inductor_compiles_it() -> None:
    x, weight, bias = tensors((5, 9), (10, 9), (10,))
    assert_as_eager(fusewright.linear(x, weight, bias, F.gelu), F.gelu(F.linear(x, weight, bias)), x, weight, bias)


def test_the_doors_leave_dynamo_to_the_first_call() -> None:
    asks = "import sys, fusewright; fusewright.linear; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
