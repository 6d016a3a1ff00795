"""A compiled plan runs as it was planned, whatever its operators do."""

from __future__ import annotations

import torch


@torch.library.custom_op("fusewright_test::laid_out_otherwise", mutates_args=())
def laid_out_otherwise(x: torch.Tensor) -> torch.Tensor:
    return (2 * x).t().contiguous().t()


@laid_out_otherwise.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)  # a promise of rows that lie one after another


def test_an_operator_that_breaks_its_promise_of_a_layout_is_read_right() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return laid_out_otherwise(x.relu()) + x

    torch._dynamo.reset()
    x = torch.randn(5, 7)
    run = torch.compile(model, backend="fusewright", options={"simulate": True})
    assert torch.equal(run(x), model(x))
