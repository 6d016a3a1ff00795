"""Kernels of functors that read and write masks in any order, in the simulator against eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusewright.fusion.expression import Access, Constant, Store
from fusewright.fusion.plan import Region
from graphs import gradients

N = 12
# Of a linear's result [..., N].
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "t": lambda y: torch.relu(y.flatten(0, -2).t()),
    "transpose": lambda y: F.leaky_relu(y.transpose(0, -1), -0.1),
    "columns": lambda y: torch.relu(y.view(y.shape[0], -1, 2, N // 2)),
    "heads": lambda y: torch.relu(y.view(y.shape[0], -1, 2, N // 2).transpose(1, 2) * 2),
    "turned, then the columns": lambda y: F.hardtanh(y.flatten(0, -2).t().reshape(3, 4, -1).transpose(0, 2)),
    "each half by its own factor": lambda y: torch.relu(y.view(-1, 2, N // 2) * torch.tensor([[2.0], [-1.0]])),
    "summed": lambda y: torch.relu(y.view(-1, 2, N // 2)).sum(-1),
    "one column": lambda y: torch.relu(y[..., 1:2]),
    "another order": lambda y: torch.relu(torch.ones(N, y.flatten(0, -2).shape[0]) / 2 + y.flatten(0, -2).t()),
    "laid out anew": lambda y: torch.relu(y.flatten(0, -2).t().contiguous()),
}


pytestmark = pytest.mark.usefixtures("nothing_compiled")


class Model(nn.Module):
    def __init__(self, then: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.then = nn.Linear(5, N), then

    def forward(self, x: torch.Tensor) -> Any:
        return self.then(self.layer(x))


@pytest.mark.parametrize(
    "name, dynamic", [*((name, False) for name in VIEWS), *((name, True) for name in ("t", "columns", "heads"))]
)
def test_masked_activations_of_views(name: str, dynamic: bool) -> None:
    model = Model(VIEWS[name])
    run = torch.compile(model, backend="fusewright", options={"simulate": True}, dynamic=dynamic, fullgraph=True)
    for batch in (3, 6) if dynamic else (3,):
        x = torch.randn(batch, 3, 5, requires_grad=True)
        expected, actual = model(x), run(x)
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
        assert actual.stride() == expected.stride()
        leaves = [x, *model.parameters()]
        for a, e in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
            torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("strides, offset", [((12, 1), 0), ((1, 16), 0), ((16, 2), 0), ((16, 1), 4)])
def test_a_mask_is_packed_in_whole_bytes(strides: tuple[int, int], offset: int) -> None:
    sink = Store(Constant(True, torch.bool), Access("mask", torch.uint8, strides, offset, bits=True))
    with pytest.raises(AssertionError, match="whole bytes"):
        Region("broken", (8,), 12, (sink,), ())
