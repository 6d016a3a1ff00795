"""One product and what follows it: the models that `sweep.py` and `epilogues.py` measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# name → function of the product so far, a tile of its size and a row vector
Step = Callable[[Tensor, Tensor, Tensor], Tensor]
BIAS = "bias"
ACTIVATIONS: dict[str, Step] = {
    "ReLU": lambda y, tile, row: F.relu(y),
    "LeakyReLU": lambda y, tile, row: F.leaky_relu(y, 0.1),
    "GELU": lambda y, tile, row: F.gelu(y),
    "GELU (tanh)": lambda y, tile, row: F.gelu(y, approximate="tanh"),
    "SiLU": lambda y, tile, row: F.silu(y),
}
OTHERS: dict[str, Step] = {
    "residual": lambda y, tile, row: y + tile,
    "scale and clamp": lambda y, tile, row: torch.clamp(y * 2.0, -1.0, 1.0),
    "gate": lambda y, tile, row: y * tile,
    "column scale": lambda y, tile, row: y * row,
    "tanh": lambda y, tile, row: torch.tanh(y),
}
STEPS = ACTIVATIONS | OTHERS
EIGHT = ((BIAS,), *((name,) for name in ACTIVATIONS), ("residual",), ("scale and clamp",))


class Product(nn.Module):
    """y = steps(x·Wᵀ), x [m, k], W [n, k]. steps: names in `STEPS`, in order; `bias` belongs to the product."""

    def __init__(self, n: int, k: int, steps: Sequence[str]) -> None:
        super().__init__()
        self.linear = nn.Linear(k, n, bias=BIAS in steps)
        self.row = nn.Parameter(torch.rand(n) + 0.5)
        self.steps = tuple(STEPS[name] for name in steps if name != BIAS)

    def forward(self, x: Tensor, tile: Tensor) -> Tensor:
        y = self.linear(x)
        for step in self.steps:
            y = step(y, tile, self.row)
        return y


def title(steps: Sequence[str]) -> str:
    return ", ".join(steps) or "nothing"


@dataclass(frozen=True)
class Precision:
    """tf32: whether torch's flags allow it. options: fusewright's, beside library=False. halves: of float32, the fp16
    products that make one, and bytes written for each element that is split."""

    dtype: torch.dtype
    tf32: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    halves: tuple[int, int] | None = None


PRECISIONS = {
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16),
    "float32": Precision(torch.float32, halves=(3, 4)),
    "TF32, frozen": Precision(torch.float32, True, {"freeze": True}, halves=(1, 2)),
}


@contextmanager
def flags(tf32: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def made(
    m: int, n: int, k: int, steps: Sequence[str], dtype: torch.dtype, device: str
) -> tuple[nn.Module, list[Tensor]]:
    """A product without gradients, and inputs for it, the same ones each time."""
    torch.manual_seed(m * n + k)
    with torch.device(device):
        model = Product(n, k, steps).to(dtype).requires_grad_(False)
        return model, [torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)]
