"""What an epilogue reads beside its product, through views of its rows and of its columns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graphs import check

# shape of y; y as it is added to a 6 × 6 product; kernels
OPERANDS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor], int]] = {
    "rows merged": ((2, 3, 6), lambda y: y.view(6, 6), 1),
    "rows permuted": ((6, 6), lambda y: y.view(2, 3, 6).transpose(0, 1).reshape(6, 6), 1),
    "computed, rows permuted": ((6, 6), lambda y: y.sigmoid().view(3, 2, 6).transpose(0, 1).reshape(6, 6), 1),
    "columns merged": ((6, 2, 3), lambda y: y.view(6, 6), 1),
    "columns permuted": ((6, 2, 3), lambda y: y.permute(0, 2, 1).reshape(6, 6), 3),
    "computed, columns permuted": ((6, 6), lambda y: y.exp().view(6, 3, 2).transpose(1, 2).reshape(6, 6), 3),
}


@pytest.mark.parametrize(("shape", "view", "kernels"), OPERANDS.values(), ids=OPERANDS)
def test_a_view_of_the_rows_is_an_index_and_one_of_the_columns_a_kernel(
    shape: tuple[int, ...], view: Callable[[Tensor], Tensor], kernels: int
) -> None:
    x, w, y = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 5), (5, 6), shape))
    record = check(lambda x, w, y: (x @ w + view(y)).relu(), x, w, y)
    assert not record.fallbacks
    assert len(record.plans[0].regions) == kernels
