"""`torch.compile(backend="fusewright")` on the simulator: results, gradients, layouts, recompilations as in eager."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from fusewright.errors import MixedDevices, UnknownSetting
from graphs import gradients, planned_module

SIMULATE = {"simulate": True}


pytestmark = pytest.mark.usefixtures("nothing_compiled")


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="fusewright", options=SIMULATE, **options)


class Headline(nn.Module):
    """Every size is ragged, so that tiles have edges; 4 · 10 values decide masks."""

    def __init__(self, multiplier: float = 2.0, slope: float = 0.1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(9, 10, dtype=dtype)
        self.multiplier, self.slope = multiplier, slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(self.linear(x) * self.multiplier, self.slope)


def flat(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def assert_as_eager(run: Any, model: Any, *inputs: torch.Tensor) -> None:
    """Results, their layout, and gradients of every input and parameter."""
    expected, actual = flat(model(*inputs)), flat(run(*inputs))
    for a, e in zip(actual, expected, strict=True):
        tolerance = TOLERANCE.get(e.dtype, 0)
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert a.stride() == e.stride() or not e.numel()
        assert a.requires_grad == e.requires_grad
    if any(e.requires_grad for e in expected):
        leaves = [i for i in inputs if i.requires_grad]
        leaves += [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
        for a, e in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
            tolerance = TOLERANCE.get(e.dtype, 0) * 4
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_headline_in_every_dtype(dtype: torch.dtype) -> None:
    model = Headline(dtype=dtype)
    x = torch.randn(5, 9, dtype=dtype, requires_grad=True)
    assert_as_eager(compiled(model, fullgraph=True), model, x)


@pytest.mark.parametrize(("multiplier", "slope"), [(-1.5, 0.1), (0.0, 0.1), (2.0, -0.5), (2.0, 0.0), (-1.0, -1.0)])
def test_masks_with_negative_and_zero_factors(multiplier: float, slope: float) -> None:
    model = Headline(multiplier, slope, torch.float64)
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    run, record = planned_module(model)
    assert_as_eager(run, model, x)
    assert not record.fallbacks


def test_negative_factors_on_the_simulator() -> None:
    model = Headline(-1.5, -0.5)
    assert_as_eager(compiled(model), model, torch.randn(5, 9, requires_grad=True))


def test_every_size_may_change() -> None:
    """One compilation for all; the mask's rows have a size of bytes that follows from another size."""

    def model(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(F.linear(x, weight, bias) * 2, 0.1)

    run = compiled(model, dynamic=True)
    for m, k, n in ((5, 9, 10), (6, 7, 11), (3, 8, 16)):
        inputs = [torch.randn(shape, requires_grad=True) for shape in ((m, k), (n, k), (n,))]
        for x in inputs:
            for dim in range(x.dim()):
                torch._dynamo.mark_dynamic(x, dim)
        assert_as_eager(run, model, *inputs)
    assert counters["stats"]["unique_graphs"] == 1


class Everything(nn.Module):
    """Many kernels in one model, because each costs compile time in the simulator."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(9, 10), nn.Linear(9, 10, bias=False)
        self.down = nn.Linear(10, 9)
        self.scale = nn.Parameter(torch.randn(10))

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = F.silu(self.gate(x)) * self.up(x)
        hidden = torch.where(hidden > 0.1, hidden * self.scale, F.gelu(hidden, approximate="tanh"))
        out = self.down(hidden).clamp(-2, 2) + residual
        return out, hidden.mean(dim=-1, keepdim=True), out.t().contiguous()


def test_several_products_and_results() -> None:
    model = Everything()
    assert_as_eager(
        compiled(model, fullgraph=True),
        model,
        torch.randn(5, 9, requires_grad=True),
        torch.randn(5, 9, requires_grad=True),
    )


def test_inputs_of_other_layouts_and_gradients_of_other_layouts() -> None:
    model = Headline()
    run = compiled(model)
    storage = torch.randn(9, 6)
    x = storage[:, 1:].t().detach().requires_grad_()  # transposed, from the second element on
    assert_as_eager(run, model, x)
    grads = []
    for function in (run, model):
        weight = torch.arange(50.0).reshape(10, 5).t()
        grads.append(torch.autograd.grad(function(x), [x, *model.parameters()], weight))
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


class Calls(TorchDispatchMode):
    """Records the ATen operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # or torch.compile would run eagerly under this mode

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


# Memory and views only.
FREE = {
    "empty_strided",
    "empty",
    "as_strided",
    "detach",
    "view",
    "t",
    "transpose",
    "alias",
    "_unsafe_view",
    "unsqueeze",
}


def test_no_aten_operator_computes() -> None:
    model = Headline()
    run = compiled(model)
    x = torch.randn(5, 9, requires_grad=True)
    run(x).sum().backward()
    with Calls() as forward:
        y = run(x)
    weight = torch.ones_like(y)
    with Calls() as backward:
        torch.autograd.grad(y, [x, *model.parameters()], weight)
    assert set(forward.names) | set(backward.names) <= FREE
    assert forward.names
    assert backward.names


def test_a_step_sees_the_weights_as_they_are_now() -> None:
    model, run = Headline(), None
    run = compiled(model)
    x = torch.randn(5, 9)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    run(x).square().sum().backward()
    optimiser.step()
    assert_as_eager(run, model, x)
    model.linear.weight.data.mul_(-3)
    assert_as_eager(run, model, x)
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
    assert_as_eager(run, model, x)
    fused = torch.optim.Adam(model.parameters(), lr=0.5, fused=True)
    run(x).square().sum().backward()
    fused.step()
    assert_as_eager(run, model, x)


def test_accumulation_retain_graph_and_no_grad() -> None:
    model = Headline()
    run = compiled(model)
    x = torch.randn(5, 9, requires_grad=True)
    y = run(x).sum()
    y.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    y.backward()
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)
    with torch.no_grad():
        assert_as_eager(run, model, x)


def test_a_graph_is_retained_after_a_backward_that_was_not() -> None:
    model = Headline(dtype=torch.float64)
    run = compiled(model)
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    run(x).sum().backward()
    y = run(x).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(y, x)[0])


def test_same_result_twice() -> None:
    model = Headline()
    run, x = compiled(model), torch.randn(5, 9)
    assert torch.equal(run(x), run(x))


def test_special_values() -> None:
    model = Headline()
    run = compiled(model)
    for value in (float("nan"), float("inf"), -float("inf"), 3e38, 1e-41):
        x = torch.randn(5, 9)
        x[2, 3] = value
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4, equal_nan=True)


# ---- shapes never seen before; by the plan's reference, which is as strict and needs no simulator


@pytest.mark.parametrize("sizes", [(6, 8, 3), (2, 7, 9)])
def test_second_batch_size_recompiles_once(sizes: Sequence[int]) -> None:
    model = Headline(dtype=torch.float64)
    run, record = planned_module(model)
    for n in sizes:
        assert_as_eager(run, model, torch.randn(n, 9, dtype=torch.float64, requires_grad=True))
    assert len(record.plans) == 4  # forward and backward, static and dynamic


def test_marked_dynamic_never_recompiles() -> None:
    model = Everything().double()
    run, record = planned_module(model)
    for n in (6, 8, 3, 11):
        x, y = (torch.randn(n, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(y, 0)
        assert_as_eager(run, model, x, y)
    assert len(record.plans) == 2


def test_dynamic_batch_on_the_simulator() -> None:
    model = Headline()
    run = compiled(model, fullgraph=True)
    for n in (5, 70, 0, 2):
        x = torch.randn(n, 9, requires_grad=True)
        if n:
            torch._dynamo.mark_dynamic(x, 0)
        assert_as_eager(run, model, x)
    assert counters["stats"]["unique_graphs"] <= 2  # an empty batch is a size of its own


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single_batch(batch: int) -> None:
    model = Headline(dtype=torch.float64)
    run, _ = planned_module(model)
    assert_as_eager(run, model, torch.randn(batch, 9, dtype=torch.float64, requires_grad=True))


def test_every_size_symbolic() -> None:
    def model(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.gelu(F.linear(x, w, b)) + x.shape[0] * 0.5

    run, record = planned_module(model, dynamic=True)
    for n in (4, 7, 16):
        shapes = ((n, n + 1), (n + 2, n + 1), (n + 2,))
        assert_as_eager(run, model, *(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes))
    assert len(record.plans) == 2
    assert not record.fallbacks


@pytest.mark.parametrize("view", ["halves", "flat", "merged", "strided"])
def test_views_of_symbolic_sizes(view: str) -> None:
    functions = {
        "halves": lambda x, w: F.linear(x, w).view(x.shape[0] // 2, 2, 5) * 2,
        "flat": lambda x, w: (F.linear(x, w).view(-1) * 2).view(-1, 5) + 1,
        "merged": lambda x, w: F.linear(x.view(-1, 2, 3), w).relu().view(-1, 10),
        "strided": lambda x, w: F.linear(x[::2], w).relu(),
    }
    model = functions[view]
    run, _ = planned_module(model)
    for n in (6, 8, 10):
        x = torch.randn(n, 3, dtype=torch.float64, requires_grad=True)
        w = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        assert_as_eager(run, model, x, w)


def test_python_floats_that_change() -> None:
    model = Headline(dtype=torch.float64)
    run, record = planned_module(lambda x, f: model(x) * f, dynamic=True)
    for factor in (2.5, 3.5, -1.0):
        x = torch.randn(6, 9, dtype=torch.float64)
        torch.testing.assert_close(run(x, factor), model(x) * factor)
    assert len(record.plans) <= 4


# ---- graphs


def test_graph_breaks() -> None:
    model = Headline(dtype=torch.float64)

    def broken(x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        torch._dynamo.graph_break()
        return y.sigmoid() * 2 + model(x)

    run, record = planned_module(broken)
    assert_as_eager(run, broken, torch.randn(5, 9, dtype=torch.float64, requires_grad=True))
    assert len(record.plans) == 4


@pytest.mark.parametrize("share", [False, True])
def test_mutated_and_aliased_inputs(share: bool) -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        y.mul_(3)
        return x * 2 + y

    run, _ = planned_module(model)
    first, second = torch.randn(20, dtype=torch.float64), torch.randn(16, dtype=torch.float64).view(4, 4)
    results = []
    for function in (run, model):
        base, other = first.clone(), second.clone()
        x, y = base[:16].view(4, 4), base[4:].view(4, 4) if share else other
        results.append((function(x, y), base, other))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


def test_results_that_are_inputs_views_or_equal() -> None:
    def model(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = F.linear(x, w)
        return x, h, h.t(), h.view(-1)[3:], h * 1.0, (x + 1), (x + 1), x.view(-1)

    x, w = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    run, _ = planned_module(model)
    assert_as_eager(run, model, x, w)
    actual, expected = run(x, w), model(x, w)
    same = [
        [i for i, r in enumerate(rs) if r.untyped_storage()._cdata == rs[0].untyped_storage()._cdata]
        for rs in (actual, expected)
    ]
    assert same[0] == same[1]
    assert actual[5].data_ptr() != actual[6].data_ptr()


def assert_same_views(run: Any, model: Any, *inputs: torch.Tensor) -> None:
    """Values, strides, offsets, and which results share memory."""
    results = flat(run(*inputs)), flat(model(*inputs))
    assert_as_eager(lambda *_: results[0], lambda *_: results[1], *inputs)
    actual, expected = (
        [(r.storage_offset(), r.untyped_storage().data_ptr() == found[0].untyped_storage().data_ptr()) for r in found]
        for found in results
    )
    assert actual == expected


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_one_slice_of_another_result(dynamic: bool, requires_grad: bool) -> None:
    """AOTAutograd makes the slice again from the whole, by the offset that the graph's own result has."""

    def model(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = torch.einsum("...k,nk->...n", x, weight).reshape(2, x.shape[1], 1, 3, 9)
        part = whole.flatten(3, 4)[1:]
        return (whole, part) if dynamic else (part, whole)

    x = torch.randn(2, 7, 3, 3, dtype=torch.float64)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    weight = torch.randn(9, 3, dtype=torch.float64, requires_grad=requires_grad)
    assert_same_views(compiled(model), model, x, weight)


@pytest.mark.parametrize("view", ["heads", "windows"])
def test_one_slice_of_reshaped_columns(view: str) -> None:
    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, weight)
        if view == "heads":
            return y.flatten(0, 1)[:, :12].unflatten(-1, (3, 4)).transpose(0, 1)[:1]
        return y.narrow(2, 1, 7).unflatten(0, (3, 1))[1:2]

    assert_same_views(compiled(model), model, torch.randn(3, 7, 8), torch.randn(24, 8))


def test_results_that_share_part_of_a_product() -> None:
    """None is dense; of a graph with gradients as of one without."""

    def model(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half = F.linear(x, weight).chunk(2, 2)[0]
        return half[:, ::2], half

    assert_same_views(compiled(model), model, torch.randn(3, 7, 8), torch.randn(24, 8, requires_grad=True))


def test_only_some_inputs_need_gradients() -> None:
    model = Headline(dtype=torch.float64)
    for wanted in ("linear.weight", "linear.bias"):
        torch._dynamo.reset()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == wanted)
        run, record = planned_module(model)
        assert_as_eager(run, model, torch.randn(5, 9, dtype=torch.float64))
        assert sum(r.gemm is not None for r in record.plans[1].regions) == (wanted == "linear.weight")


def test_autocast() -> None:
    model = Headline()

    def run_under_autocast(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    run, record = planned_module(run_under_autocast)
    x = torch.randn(5, 9, requires_grad=True)
    actual, expected = run(x), run_under_autocast(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    leaves = [x, *model.parameters()]
    for a, e in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=4e-2, atol=4e-2)
    assert not record.fallbacks


@pytest.mark.parametrize("name", ["cumsum", "bmm", "sort", "dropout"])
def test_operators_without_a_kernel_run_as_aten(name: str) -> None:
    functions = {
        "cumsum": lambda x: (x * 2).cumsum(0).relu(),
        "bmm": lambda x: torch.bmm(x.unsqueeze(0), x.t().unsqueeze(0)).sigmoid(),
        "sort": lambda x: x.sigmoid().sort(dim=1)[0] * 2,
        "dropout": lambda x: F.dropout(x.relu(), 0.0) * 3,
    }
    run, record = planned_module(functions[name])
    assert_as_eager(run, functions[name], torch.randn(5, 9, dtype=torch.float64, requires_grad=True))
    if name != "dropout":
        assert any(f.startswith(name) for f in record.fallbacks)


NUMBERS = {
    "slope": lambda x, number: F.leaky_relu(x, number.item()),
    "integer": lambda x, number: torch.relu(x + number.long().item()),
    "filled": lambda x, number: torch.full_like(x, number.item()) * x,
    "size": lambda x, number: x.flatten()[x.flatten() > number] * 2,
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_a_tensor_gives(name: str, requires_grad: bool) -> None:
    """Where Dynamo keeps them within a graph, no call's sizes give them: the graph runs as ATen's operators."""
    function = NUMBERS[name]
    torch._dynamo.reset()
    config = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
    with torch._dynamo.config.patch(config):
        compiled = torch.compile(function, backend="fusewright", options={"simulate": True}, fullgraph=True)
        for value in (0.25, 0.5):
            x = torch.randn(8, 8, requires_grad=requires_grad)
            other = x.detach().clone().requires_grad_(requires_grad)
            results = [f(t, torch.tensor(value)) for f, t in ((function, x), (compiled, other))]
            torch.testing.assert_close(*results)
            if requires_grad:
                for result in results:
                    result.square().sum().backward()
                torch.testing.assert_close(x.grad, other.grad)


def test_dropout_draws_as_many_as_it_should() -> None:
    run, _ = planned_module(lambda x: F.dropout(x, 0.5) * 2)
    zeros = (run(torch.ones(100, 100)) == 0).float().mean()
    assert 0.4 < zeros < 0.6


# ---- the door itself


def test_cpu_tensors_go_to_inductor_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    from fusewright.capture import backend

    backend._announced.clear()
    with caplog.at_level("WARNING", logger="fusewright"):
        x = torch.randn(4)
        torch.testing.assert_close(torch.compile(lambda x: x + 1, backend="fusewright")(x), x + 1)
        torch.testing.assert_close(torch.compile(lambda x: x + 2, backend="fusewright")(x), x + 2)
    assert [r for r in caplog.messages if "Inductor" in r] == caplog.messages
    assert len(caplog.messages) == 1
    for door in ("simulate=True,", "options={'simulate': True}"):  # fusewright.compile's and linear's; torch.compile's
        assert door in caplog.messages[0]


def test_frozen_parameters_refuse_gradients() -> None:
    model, x = Headline(), torch.randn(5, 9)
    run = torch.compile(model, backend="fusewright", options={**SIMULATE, "freeze": True})
    with pytest.raises(Exception, match=r"torch\.no_grad") as error:
        run(x)
    assert "FrozenGradients" in repr(error.value)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)


def test_bad_options_and_devices_are_named() -> None:
    with pytest.raises(Exception, match="speed") as error:
        torch.compile(lambda x: x + 1, backend="fusewright", options={"speed": 1})(torch.randn(3))
    assert isinstance(error.value, UnknownSetting) or "UnknownSetting" in repr(error.value)
    with pytest.raises(Exception, match="one device") as error:
        torch.compile(lambda x, y: (x + 1, y + 1), backend="fusewright")(torch.randn(3), torch.randn(3, device="meta"))
    assert isinstance(error.value, MixedDevices) or "MixedDevices" in repr(error.value)
