"""Numbers on the CPU among a GPU's tensors: Python floats that change reach a graph so, and do not break it up."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fusewright import compiler
from fusewright.capture.fx import from_fx, host_numbers
from fusewright.ir import rules


def test_a_number_that_is_an_argument_joins_the_kernel() -> None:
    def model(x: Tensor, factor: Tensor, shift: Tensor, unused: Tensor) -> list[Tensor]:
        return [torch.relu(x * factor) + shift.to(torch.float32) * 2]

    with FakeTensorMode():
        x, numbers = torch.empty(4, 8, device="cuda"), [torch.empty((), dtype=torch.float64) for _ in range(3)]
        module = make_fx(model)(x, *numbers)
    graph = from_fx(module)
    rules.check(graph)
    plan = compiler.plan(graph)
    assert not plan.fallbacks
    assert len(plan.regions) == 1
    assert {b.device.type for b in plan.buffers.values()} == {"cuda"}
    assert host_numbers(module) == [1, 2]


def test_a_number_that_is_returned_comes_back_on_the_cpu() -> None:
    with FakeTensorMode():
        x, factor = torch.empty(4, device="cuda"), torch.empty((), dtype=torch.float64)
        module = make_fx(lambda x, factor: [x * factor, factor * 2])(x, factor)
    plan = compiler.plan(from_fx(module))
    assert [f.name for f in plan.fallbacks] == ["_to_copy"]
    assert plan.buffers[plan.outputs[1].buffer].device.type == "cpu"


def test_on_the_cpu_they_are_ordinary_tensors() -> None:
    module = make_fx(lambda x, factor: [x * factor])(torch.ones(4), torch.tensor(2.0))
    plan = compiler.plan(from_fx(module))
    assert {b.device.type for b in plan.buffers.values()} == {"cpu"}
