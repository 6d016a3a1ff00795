"""What a whole model is captured as."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import nn

from fusewright.capture.model import capture
from fusewright.capture.without_gpu import without_gpu


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu() * 2


class WithPositions(nn.Module):
    """Its one row is no batch: it is added to each of four others."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(4, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.positions).sigmoid()


@pytest.mark.parametrize("batch", [0, 1, 2, 12])
def test_the_batch_is_a_symbol_whatever_the_file_s_own_is(batch: int) -> None:
    captured = capture(Scaled(), [torch.randn(batch, 9)])
    (rows,) = captured.sizes
    assert captured.sizes == {rows: batch}
    for graph in (captured.inference, captured.forward):
        assert graph is not None
        (output, *_) = graph.outputs
        assert output is not None and output.type is not None
        assert isinstance(output.type.shape[0], sympy.Symbol)
        assert output.type.shape[1] == 5


def test_a_single_row_that_is_no_batch_stays_one() -> None:
    captured = capture(WithPositions(), [torch.randn(1, 9)])
    assert captured.sizes == {}
    (output,) = captured.inference.outputs
    assert output is not None and output.type is not None
    assert output.type.shape == (4, 9)


class Heads(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (3, -1)).transpose(0, 1) * 2


def test_unflatten_where_cuda_is_redirected() -> None:
    """A method of Tensor in Python, which Dynamo did not follow there."""
    with without_gpu():
        (result,) = capture(Heads(), [torch.randn(4, 12)]).inference.outputs
    assert result is not None and result.tensor.shape[0] == 3
