"""A model, a right fused candidate for it, and the way to make wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusewright.tools.verify import Report, Subject, verify

ROWS, INNER, COLUMNS = 24, 160, 20


class Model(nn.Module):
    def __init__(self, multiplier: float = 2.0, slope: float = 0.1) -> None:
        super().__init__()
        self.gemm = nn.Linear(INNER, COLUMNS)
        self.multiplier, self.slope = multiplier, slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.gemm(x) * self.multiplier, self.slope)


class Steps:
    """A right fused implementation, step by step; each mistake overrides one step."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Another order of summation than eager's: K in two halves, in float32 or wider."""
        wide = torch.promote_types(a.dtype, torch.float32)
        a, b, half = a.to(wide), b.to(wide), a.shape[1] // 2
        return a[:, :half] @ b[:half] + a[:, half:] @ b[half:]

    def backward_product(self, a: Tensor, b: Tensor) -> Tensor:
        return self.product(a, b)

    def activate(self, y: Tensor, slope: float) -> Tensor:
        return torch.where(y > 0, y, y * slope)

    def mask(self, y: Tensor, out: Tensor) -> Tensor:
        return y > 0

    def store(self, out: Tensor, x: Tensor) -> Tensor:
        return out.to(x.dtype)

    def gradient(self, g: Tensor, mask: Tensor, slope: float) -> Tensor:
        return torch.where(mask, g, g * slope)

    def weight_gradient(self, g: Tensor, x: Tensor) -> Tensor:
        return self.backward_product(g.T, x)


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, steps: Steps, multiplier: float, slope: float) -> Tensor:
        y = (steps.product(x, w.T) + b) * multiplier
        out = steps.store(steps.activate(y, slope), x)
        ctx.save_for_backward(x, w, steps.mask(y, out))
        ctx.steps, ctx.multiplier, ctx.slope = steps, multiplier, slope
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("no second derivatives")
        return Fused.first_order(ctx, g)

    @staticmethod
    def first_order(ctx: Any, g: Tensor) -> Any:
        x, w, mask = ctx.saved_tensors
        wide = torch.promote_types(g.dtype, torch.float32)
        g = ctx.steps.gradient(g.to(wide), mask, ctx.slope) * ctx.multiplier
        gx, gw = ctx.steps.backward_product(g, w), ctx.steps.weight_gradient(g, x)
        return gx.to(x.dtype), gw.to(w.dtype), g.sum(0).to(w.dtype), None, None, None


class ModelNew(Model):
    steps = Steps()
    function: Any = Fused

    def forward(self, x: Tensor) -> Tensor:
        arguments = (self.gemm.weight, self.gemm.bias, self.steps, self.multiplier, self.slope)
        return self.function.apply(x, *arguments)


def inputs() -> list[Tensor]:
    return [torch.rand(ROWS, INNER)]


def check(
    candidate: Callable[[], nn.Module],
    reference: Callable[[], nn.Module] = Model,
    get_inputs: Callable[[], list[Any]] = inputs,
    dtype: torch.dtype | None = None,
) -> Report:
    return verify(Subject("Model", reference, get_inputs), Subject("ModelNew", candidate, get_inputs), dtype=dtype)


def failed(report: Report) -> dict[str, str]:
    return {c.name: c.detail for c in report.checks if not c.passed}


def with_steps(**steps: Any) -> type[ModelNew]:
    return type("ModelNew", (ModelNew,), {"steps": type("Mistaken", (Steps,), steps)()})


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def ten_bits(t: Tensor) -> Tensor:
    """Rounded to TF32's ten explicit bits."""
    scaled = t.contiguous().view(torch.int32)
    return ((scaled + 0x1000) & ~0x1FFF).view(torch.float32)


def tf32(self: Steps, a: Tensor, b: Tensor) -> Tensor:
    return ten_bits(a) @ ten_bits(b)


def partly_written(self: Steps, out: Tensor, x: Tensor) -> Tensor:
    fresh = torch.empty_like(out, dtype=x.dtype)
    fresh[: 16 * (len(out) // 16)] = out[: 16 * (len(out) // 16)].to(x.dtype)
    return fresh


def check_on_gpu(candidate: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> Report:
    reference = Subject("Model", Model, inputs)
    return verify(reference, Subject("ModelNew", candidate, inputs), device="cuda", dtype=dtype)


class Exits(ModelNew):
    def forward(self, x: Tensor) -> Tensor:
        raise SystemExit(0)


class RaisesAlways(ModelNew):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no kernel for this chip")
