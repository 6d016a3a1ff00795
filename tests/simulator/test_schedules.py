"""How many orders of threads to try: from each of the places where a user says it, to the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fusewright.cli.app import app
from fusewright.simulator.errors import OrderDependentResult
from fusewright.simulator.simulate import SimulatedKernel, Simulator
from kernels import launch

MODEL = """import torch
from torch import nn


class Model(nn.Module):
    def forward(self, x):
        return torch.relu(x) * 2


def get_inputs():
    return [torch.rand(3, 40)]


def get_init_inputs():
    return []
"""


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of orders of every launch that runs."""
    found: list[int] = []
    call = SimulatedKernel.__call__

    def counted(self: SimulatedKernel, arguments: Sequence[Any], grid: Sequence[int]) -> None:
        found.append(len(self.orders))
        call(self, arguments, grid)

    monkeypatch.setattr(SimulatedKernel, "__call__", counted)
    return found


def test_of_a_compiled_model(tried: list[int]) -> None:
    torch._dynamo.reset()
    options = {"simulate": True, "schedules": 3, "arch": "sm_80"}
    torch.compile(torch.nn.ReLU(), backend="fusewright", options=options)(torch.randn(8))
    assert tried == [3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, nothing is simulated")
def test_of_the_command_line(tried: list[int], tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    names = [str(tmp_path / name) for name in ("model.py", "new.py")]
    for command, orders in ((["optimize", names[0], "-o", names[1]], 3), (["verify", *names], 4)):
        tried.clear()
        done = CliRunner().invoke(app, [*command, "--schedules", str(orders)])
        assert done.exit_code == 0, done.output
        assert tried and set(tried) == {orders}


def test_a_bug_that_one_order_hides() -> None:
    """Whoever comes first leaves its mark: in the natural order thread 0."""
    source = """extern "C" __global__ void first(int* out) {
        if (atomicAdd(out + 1, 1) == 0) out[0] = threadIdx.x; }"""
    one, two = (Simulator().load([launch(source, 64)], schedules=n)[0] for n in (1, 2))
    out = torch.zeros(2, dtype=torch.int32)
    one([out], (1,))
    assert out.tolist() == [0, 64]
    with pytest.raises(OrderDependentResult, match="element 0 of `out` differs between orders 0 and 1"):
        two([torch.zeros_like(out)], (1,))
