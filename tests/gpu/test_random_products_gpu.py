"""500 random products with random epilogues, each held to eager's error against float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from gpu_support import DEVICE, compiled
from test_fusion_gpu import BINARY, UNARY
from torch import Tensor

from fusewright.tools.comparison import Judge, measure

GROUPS, BATCHES = 50, 10  # one compilation serves all batches of a group
LARGEST, WIDE = 2048, 2048
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A comparison that rounding decides otherwise changes its result by a jump.
CONTINUOUS = sorted((UNARY.keys() | BINARY.keys()) - {"where"})
DRAWS: tuple[Callable[..., Tensor], ...] = (torch.randn, torch.rand)


@dataclass(frozen=True)
class Group:
    """f(x [m, k] · w [k, n], row [n], tile [m, n]) for several m. transposed: w is a contiguous tensor's transpose."""

    dtype: torch.dtype
    n: int
    k: int
    transposed: bool
    steps: tuple[str, ...]
    draw: int
    batches: tuple[int, ...]

    def __call__(self, x: Tensor, w: Tensor, row: Tensor, tile: Tensor) -> Tensor:
        return self.after(x @ w, row, tile)

    def after(self, y: Tensor, row: Tensor, tile: Tensor) -> Tensor:
        for i, name in enumerate(self.steps):
            y = UNARY[name](y) if name in UNARY else BINARY[name](y, (row, tile)[i % 2])
        return y


def _size(r: random.Random, step: int) -> int:
    """Evenly on a logarithmic scale."""
    return max(1, round(math.exp(r.uniform(0, math.log(LARGEST))) / step) * step)


def group(seed: int) -> Group:
    r = random.Random(seed)
    return Group(
        dtype=DTYPES[seed % len(DTYPES)],
        n=_size(r, r.choice((1, 8, 64))),
        k=_size(r, (1, 8, 64)[seed // 6 % 3]),
        transposed=seed // 3 % 2 == 0,
        steps=(*CONTINUOUS[seed : seed + 1], *r.choices(CONTINUOUS, k=r.randint(0, 3))),  # each of them at least once
        draw=r.randrange(len(DRAWS)),
        batches=tuple(_size(r, 1) for _ in range(BATCHES)),
    )


def _inputs(of: Group, m: int) -> list[Tensor]:
    """Products of about unit size, where activations bend."""
    draw = DRAWS[of.draw]
    x, row, tile = (draw(shape, device=DEVICE).to(of.dtype) for shape in ((m, of.k), (of.n,), (m, of.n)))
    w = draw((of.n, of.k) if of.transposed else (of.k, of.n), device=DEVICE) / math.sqrt(of.k)
    return [x, (w.T if of.transposed else w).to(of.dtype), row, tile]


def _usual(of: Group, inputs: list[Tensor], exact: Tensor) -> dict[str, float]:
    """Eager's errors where cuBLAS has enough tiles. Where it has few, it splits the sums into shorter ones, as the
    shape has it; another order of summation cannot be held to that."""
    x, w, row, tile = inputs
    y = F.pad(x, (0, 0, 0, WIDE - len(x))) @ F.pad(w, (0, WIDE - of.n))
    found = of.after(y[: len(x), : of.n].contiguous(), row, tile)
    return measure(found.double().flatten(), exact.flatten(), of.dtype).figures


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(GROUPS))
def test_as_accurate_as_eager(seed: int) -> None:
    of, found = group(seed), {}
    call = compiled(of.__call__, library=False)
    with torch.no_grad():
        for m in of.batches:
            inputs = _inputs(of, m)
            for tensor in (inputs[0], inputs[3]):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            exact = of(*(t.double() for t in inputs))
            judge = Judge(usual={"output": _usual(of, inputs, exact)})
            judge.add({"output": call(*inputs)}, {"output": of(*inputs)}, {"output": exact})
            if problems := judge.verdict().problems:
                found[m] = problems
    assert not found, of


def test_the_draws_are_varied() -> None:
    every = [group(seed) for seed in range(GROUPS)]
    assert len({(g, m) for g in every for m in g.batches}) >= 450
    assert {name for g in every for name in g.steps} == set(CONTINUOUS)
    assert {(g.dtype, g.transposed, g.k % 8 == 0) for g in every} == {
        (d, t, aligned) for d in DTYPES for t in (True, False) for aligned in (True, False)
    }
