"""What the forward keeps for the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_function, make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fusewright.fusion.plan import View
from graphs import Planned, check, planned, planned_module

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, -0.1),
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "hardsigmoid": F.hardsigmoid,
    "threshold": lambda x: F.threshold(x, 0.2, 0.1),
    "abs": torch.abs,
}
SIXTH = 1e-6  # hard sigmoid: ATen multiplies by 1/6 rounded to float32
M, K, N = 16, 12, 40


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def saved(record: Planned) -> list[Any]:
    """Buffers that the forward plan returns beyond the first result, and that are no inputs."""
    plan = record.plans[0]
    names = [o.buffer for o in plan.outputs[1:] if isinstance(o, View) and o.buffer not in plan.inputs]
    return [plan.buffers[n] for n in dict.fromkeys(names)]


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "hardsigmoid", "hardtanh", "relu6", "threshold"])
def test_a_piecewise_linear_activation_keeps_one_bit_an_element(name: str) -> None:
    function = ACTIVATIONS[name]
    inputs = leaf(M, K), leaf(N, K), leaf(N)
    record = check(lambda x, w, b: function(F.linear(x, w, b) * 1.5) * 2, *inputs, tolerance=SIXTH)
    assert [(b.dtype, b.shape) for b in saved(record)] == [(torch.uint8, (M, N // 8))]


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "t": lambda v: v.t(),
    "columns": lambda v: v.view(M, -1, 5),
    "rows": lambda v: v.view(2, -1, N),
    "heads": lambda v: v.view(2, M // 2, -1, 5).transpose(1, 2),
    "turned": lambda v: v.view(M, -1, 10).permute(2, 0, 1),
}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    activation=st.sampled_from(["relu", "leaky_relu", "hardtanh", "relu6", "threshold"]),
    before=st.sampled_from([lambda v: v, lambda v: v * 1.5]),
    view=st.sampled_from(list(VIEWS)),
    after=st.sampled_from([lambda v: v, torch.neg, lambda v: v.transpose(0, -1) * 2]),
)
def test_the_mask_of_a_view_lies_as_the_product_does(
    activation: str, before: Callable[..., Any], view: str, after: Callable[..., Any]
) -> None:
    """Wherever the view is, the product's kernel packs whole bytes: one bit an element."""
    function = ACTIVATIONS[activation]
    inputs = leaf(M, K), leaf(N, K), leaf(N)
    record = check(lambda x, w, b: after(function(VIEWS[view](before(F.linear(x, w, b))))), *inputs)
    assert [(b.dtype, b.shape) for b in saved(record)] == [(torch.uint8, (M, N // 8))]
    assert len(record.plans[0].steps) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_keeps_16_bit_values(dtype: torch.dtype) -> None:
    record = check(
        lambda x, w: torch.tanh(F.gelu(F.linear(x, w)) * 1.5),
        leaf(M, K, dtype=dtype),
        leaf(N, K, dtype=dtype),
        tolerance=5e-2,
    )
    assert saved(record)
    assert all(b.dtype.itemsize <= 2 for b in saved(record))


def test_the_place_of_a_maximum_is_what_the_forward_found() -> None:
    """Computed again, from the rounded product, the maximum could be none of the values: gradients of 0, or NaN."""
    x, w = (torch.randn(16, 16).bfloat16().requires_grad_() for _ in range(2))
    run, record = planned(lambda x, w: F.silu(x @ w).amax(0))
    run(x, w).sum().backward()
    assert "eq" not in {n.op for n in record.graphs[1].nodes()}
    assert w.grad is not None
    assert bool((w.grad != 0).any(0).all())


def test_what_the_next_product_reads_is_kept_rather_than_what_it_came_from() -> None:
    """It is in memory anyway; beside it a mask is enough."""
    record = check(lambda x, w, v: F.linear(F.leaky_relu(F.linear(x, w)), v), leaf(M, K), leaf(N, K), leaf(K, N))
    assert {(b.dtype, b.shape) for b in saved(record)} == {(torch.float64, (M, N)), (torch.uint8, (M, N // 8))}
    assert [len(set(r.writes())) for r in record.plans[0].regions] == [2, 1]


def test_what_a_product_of_the_backward_reads_is_kept_although_it_could_be_computed_again() -> None:
    """That would take a pass over memory. What only a kernel reads is computed there, from what is kept."""
    record = check(lambda x, w, v: F.linear(F.gelu(F.linear(x, w)), v), leaf(M, K), leaf(N, K), leaf(K, N))
    assert [b.shape for b in saved(record)] == [(M, N), (M, N)]
    assert len(record.plans[1].regions) == 4
    record = check(lambda x, w: F.gelu(F.linear(x, w)).sin(), leaf(M, K), leaf(N, K))
    assert [b.shape for b in saved(record)] == [(M, N)]


@pytest.mark.parametrize("view", [lambda h: h, lambda h: h.view(-1), lambda h: h.permute(2, 0, 1)])
def test_a_result_that_the_backward_reads_is_saved_as_it_is(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Whatever view of it is returned: it is in memory anyway."""

    def model(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = F.linear(x, w)
        return F.linear(h, v), view(h)

    record = check(model, leaf(2, M, K), leaf(N, K), leaf(K, N))
    assert len({s for r in record.plans[0].regions for s in r.writes()}) == 2


@pytest.mark.parametrize("result", [lambda h: h, lambda h: h * 2])
def test_a_result_is_saved_rather_than_what_is_computed_of_it(result: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def model(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = result(F.linear(x, w))
        return z, z.exp().sin()

    record = check(model, leaf(M, K), leaf(N, K))
    assert [len(r.writes()) for r in record.plans[0].regions] == [2]


def test_what_no_result_depends_on_is_computed_in_the_backward() -> None:
    """A gradient that is 0 whatever the incoming one is, say: of the weights, a product."""
    record = check(lambda x, w: torch.floor(F.linear(x, w)), leaf(M, K), leaf(N, K))
    assert not saved(record)
    assert [len(r.writes()) for r in record.plans[0].regions] == [1]


def test_what_aten_reads_is_saved_rather_than_what_is_computed_of_it() -> None:
    """It is in memory anyway; what its mean is taken off would be written beside it."""
    record = check(lambda x, w: F.linear(x, w).var(-1), leaf(M, K), leaf(N, K))
    assert [b.shape for b in saved(record)] == [(M, N)]
    assert [s.name for s in record.plans[0].steps] == ["fused_mm", "var"]


def test_a_mask_feeds_values_that_the_backward_computes_again() -> None:
    """`amax` divides the gradient among equal values: the count is computed from the mask, in the backward too."""
    record = check(lambda x, w: F.linear(x, w).amax(1), leaf(M, K), leaf(N, K))
    assert torch.uint8 in [b.dtype for b in saved(record)]


def default_bytes(function: Callable[..., Any], inputs: list[torch.Tensor]) -> int:
    """What AOTAutograd's default partition keeps beside inputs and results."""
    kept = 0

    def forward(module: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal kept
        (output,) = module.graph.find_nodes(op="output")
        results = {n for n in output.args[0][1:] if isinstance(n, torch.fx.Node) and n.op != "placeholder"}
        storages = {n.meta["val"].untyped_storage()._cdata: n.meta["val"].untyped_storage().nbytes() for n in results}
        kept = sum(storages.values())
        return make_boxed_func(module)

    run = aot_function(function, fw_compiler=forward, bw_compiler=lambda module, _: make_boxed_func(module))
    run(*inputs)
    return kept


def tower(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    for w in weights:
        x = F.leaky_relu(F.linear(x, w), 0.1) + x
    return x


MODELS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    **{
        name: (lambda x, w, b, f=f: f(F.linear(x, w, b)) * 2.0, [(M, K), (N, K), (N,)])
        for name, f in {**ACTIVATIONS, "gelu": F.gelu, "silu": F.silu, "mish": F.mish, "tanh": torch.tanh}.items()
    },
    "gated": (lambda x, w, v: F.silu(F.linear(x, w)) * F.linear(x, v), [(M, K), (N, K), (N, K)]),
    "tower": (tower, [(M, K), *[(K, K)] * 4]),
    "norm": (lambda x, w: F.layer_norm(F.linear(x, w), (N,)) * 2, [(M, K), (N, K)]),
    "loss": (lambda x, w, y: F.mse_loss(F.linear(x, w).sigmoid(), y), [(M, K), (N, K), (M, N)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_never_keeps_more_than_the_default(name: str) -> None:
    function, shapes = MODELS[name]
    inputs = [leaf(*s) for s in shapes]
    record = check(function, *inputs, tolerance=SIXTH)
    ours = sum(int(torch.tensor(b.shape).prod()) * b.dtype.itemsize for b in saved(record))
    assert ours <= default_bytes(function, inputs)


@pytest.mark.parametrize("stride", [(4, 1), (1, 3), (16, 2)], ids=["rows", "columns", "a slice"])
def test_an_input_that_the_model_overwrites_is_kept_as_it_was(stride: tuple[int, int]) -> None:
    """The sum is cheapest computed again, from x and y; but by then y holds something else."""

    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = F.layer_norm((x + y).t(), (3,))
        y.mul_(2)
        return h

    first, second = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    results = []
    for run in (model, planned(model)[0], planned_module(model)[0]):
        x = first.clone().requires_grad_()
        y = torch.empty_strided((3, 4), stride, dtype=torch.float64).copy_(second)
        out = run(x, y)
        out.square().sum().backward()
        results.append((out.detach(), y, x.grad))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])


class Tower(torch.nn.Module):
    """Each layer's result is the next one's input, and a checkpoint's result."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(K, K, dtype=torch.float64) for _ in range(3))
        self.checkpointed = checkpointed

    def block(self, x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        return torch.tanh(F.gelu(layer(F.silu(layer(x)))) + x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(self.block, x, layer, use_reentrant=False) if self.checkpointed else self.block(x, layer)
        return x


def test_within_a_checkpoint_nothing_is_kept() -> None:
    """Between the blocks their results are; products within are computed again, once."""
    kept, products, found = [], [], []
    for checkpointed in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Tower(checkpointed)
        x = leaf(M, K)
        run, record = planned_module(model)
        found.append(torch.autograd.grad(run(x).square().sum(), [x, *model.parameters()]))
        kept.append([tuple(b.shape) for b in saved(record)])
        products.append(sum(n.op == "matmul" for n in record.graphs[1].nodes()))
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e)
    assert len(kept[0]) >= 6 and kept[1] == [(M, K)] * 3  # the last is the model's result
    assert products == [12, 12 + 6]


def test_random_numbers_within_a_checkpoint_are_kept() -> None:
    """Drawn again they would be others, and gradients those of another function."""
    layer = torch.nn.Linear(K, K)

    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(layer(F.dropout(x) * (torch.rand_like(x) > 0.5)))

    torch._dynamo.reset()
    run = torch.compile(
        lambda x: checkpoint(block, x, use_reentrant=False), backend="fusewright", options={"simulate": True}
    )
    x = torch.ones(M, K, requires_grad=True)
    y = run(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    read = (gradient != 0).float()
    assert 0 < read.mean() < 0.5
    torch.testing.assert_close(y, torch.tanh(layer(2 * read)))
